"""Every model family under every number of head chunks, with guidance and without, on gloo ranks against one process.

Seven heads, so that ranks have unequal shares; all parameters randomised.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import pipedit
from pipedit.parallel.calls import Call, Result
from pipedit.parallel.runtime import ParallelRuntime
from tests.parallel.ranks import Ranks
from tests.parallel.videos import EXPERTS, NEGATIVE, Settings, make_latents, settings_of
from tests.tiny_pipelines import load_diffusers, randomise

Gloo = Callable[[int], Ranks]
Folder = Callable[[str], Path]

HEADS = 7
CHUNKS = (1, 2, 3, 4, "auto")  # two ranks have 4 and 3 heads
TOLERANCE = 1e-5
GUIDED: dict[str, Settings] = {
    "wan": {"negative_prompt": NEGATIVE},
    "wan22": {"negative_prompt": NEGATIVE, "num_inference_steps": 4},  # two for each expert
    "wan_ti2v": {"negative_prompt": NEGATIVE},
    "hunyuan": {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVE},
}
UNGUIDED: dict[str, Settings] = {
    "wan": {"guidance_scale": 1.0},
    "wan22": {"guidance_scale": 1.0, "guidance_scale_2": 1.0, "num_inference_steps": 4},
    "wan_ti2v": {"guidance_scale": 1.0},
    "hunyuan": {},  # its guidance is an input of the one prediction
}
KINDS = tuple(GUIDED)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One video. `is_wrong`: heads come back in another order than they were asked for, which must be noticed."""

    degrees: Settings
    video: Settings
    is_wrong: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """Clean latents, and in how many runs of heads the attentions came back."""

    latents: torch.Tensor
    runs: frozenset[int]


@functools.cache
def load_with_seven_heads(folder: str) -> Any:
    """The pipeline with other transformers: the same random ones in every process."""
    # One of its own: others get theirs from `load`, which keeps it.
    pipe, generator = load_diffusers(Path(folder)), torch.Generator("cpu").manual_seed(11)
    for name in EXPERTS:
        if (expert := getattr(pipe, name, None)) is not None:
            wider = type(expert).from_config({**expert.config, "num_attention_heads": HEADS})
            randomise(wider, generator)
            setattr(pipe, name, wider.eval())
    return pipe


# -- what the ranks do --------------------------------------------------------------------------------------------


@contextlib.contextmanager
def counted_runs(*, is_wrong: bool) -> Iterator[set[int]]:
    attend, counts = ParallelRuntime.attend, set[int]()

    def watched(runtime: ParallelRuntime, call: Call) -> Iterator[Result]:
        count = 0
        for result in attend(runtime, call):
            count += 1
            yield dataclasses.replace(result, latents=result.latents.roll(1, dims=2)) if is_wrong else result
        counts.add(count)

    with mock.patch.object(ParallelRuntime, "attend", watched):
        yield counts


def make_each(_rank: int, _world_size: int, folder: str, jobs: Sequence[Job]) -> list[Made]:
    pipe, made = load_with_seven_heads(folder), []
    for job in jobs:
        with counted_runs(is_wrong=job.is_wrong) as counts, pipedit.parallelize(pipe, **job.degrees):
            latents = make_latents(pipe, **job.video)
        made.append(Made(latents=latents, runs=frozenset(counts)))
    return made


# -- the same video -----------------------------------------------------------------------------------------------


def largest_differences(group: Ranks, folder: Path, jobs: Sequence[Job]) -> tuple[list[float], list[frozenset[int]]]:
    """Of each job to one process, over all ranks, with the runs of heads. All ranks have the very same latents."""
    first, *others = group.run(make_each, str(folder), jobs)
    pipe = load_with_seven_heads(str(folder))
    expected: dict[str, torch.Tensor] = {}
    differences = []
    for index, job in enumerate(jobs):
        ours = first[index]
        for other in others:
            assert torch.equal(ours.latents, other[index].latents)
            assert ours.runs == other[index].runs
        key = repr(job.video)
        if key not in expected:
            expected[key] = make_latents(pipe, **job.video)
        differences.append(float((ours.latents - expected[key]).abs().max()))
    return differences, [made.runs for made in first]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_video_of_one_process(kind: str, gloo: Gloo, tiny_folder: Folder) -> None:
    guided, unguided = settings_of(kind, **GUIDED[kind]), settings_of(kind, **UNGUIDED[kind])
    by_chunks = [
        Job(degrees={"ulysses_degree": 2, "pipesp_chunks": chunks}, video=video)
        for video in (guided, unguided)
        for chunks in CHUNKS
    ]
    halves = Job(degrees={"cfg_degree": 2}, video=guided)
    wrong = Job(degrees=by_chunks[1].degrees, video=guided, is_wrong=True)
    jobs = [*by_chunks, halves, wrong]
    (*differences, control), runs = largest_differences(gloo(2), tiny_folder(kind), jobs)
    assert max(differences) <= TOLERANCE, list(zip(jobs, differences, strict=False))
    assert control > 100 * TOLERANCE, "heads in a wrong order must be noticed"
    for job, counts in zip(by_chunks, runs, strict=False):
        chunks = job.degrees["pipesp_chunks"]
        assert counts == ({1, 2, 4} if chunks == "auto" else {chunks}), (job, counts)


@pytest.mark.parametrize(("world_size", "kind"), [(3, "wan"), (4, "hunyuan")])
def test_more_ranks_make_the_video_of_one_process(world_size: int, kind: str, gloo: Gloo, tiny_folder: Folder) -> None:
    """Seven heads on three ranks, and on four."""
    video = settings_of(kind, **GUIDED[kind])
    degrees = {"ulysses_degree": world_size, "pipesp_chunks": 2}
    jobs = [Job(degrees=degrees, video=video), Job(degrees=degrees, video=video, is_wrong=True)]
    (difference, control), (runs, _) = largest_differences(gloo(world_size), tiny_folder(kind), jobs)
    assert difference <= TOLERANCE
    assert control > 100 * TOLERANCE
    assert runs == {2}
