"""`pipedit.parallelize` on 3 and 4 gloo ranks against plain diffusers pipelines, with every parameter randomised."""

import functools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pipedit
from pipedit.core.errors import InvalidRequestError
from tests import tiny_pipelines
from tests.parallel.ranks import Ranks
from tests.untouched import state_of

Settings = dict[str, Any]
PROMPTS = ["a red ball moves right", "two green triangles"]
EXPERTS = ("transformer", "transformer_2")
NEGATIVE = "blurry"


@pytest.fixture
def four(gloo: Callable[[int], Ranks]) -> Ranks:
    return gloo(4)


@pytest.fixture
def three(gloo: Callable[[int], Ranks]) -> Ranks:
    return gloo(3)


@functools.cache
def load(folder: str) -> Any:
    return tiny_pipelines.load_diffusers(Path(folder))


def settings_of(kind: str, **changes: Any) -> Settings:
    """3 x 2 x 3 = 18 latent tokens, which neither 4 ranks nor 4 heads on 3 ranks share evenly."""
    return {"prompt": PROMPTS[0], "seed": 3, **tiny_pipelines.QUICK_SETTINGS[kind], **changes}


def make_latents(pipe: Any, *, seed: int, **settings: Any) -> torch.Tensor:
    """The clean latents, float32."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    latents: torch.Tensor = pipe(generator=generator, output_type="latent", **settings).frames
    return latents.float()


def parts_of(pipe: Any) -> list[Any]:
    return [part for name in EXPERTS if (part := getattr(pipe, name, None)) is not None]


# -- what the ranks do --------------------------------------------------------------------------------------------


def make_videos(_rank: int, _world_size: int, folder: str, degrees: Settings, *videos: Settings) -> list[torch.Tensor]:
    """All videos in one context; says that the pipeline was left as it was found."""
    pipe = load(folder)
    before = [state_of(part) for part in parts_of(pipe)]
    with pipedit.parallelize(pipe, **degrees) as same:
        assert same is pipe
        results = [make_latents(pipe, **settings) for settings in videos]
    assert [state_of(part) for part in parts_of(pipe)] == before
    assert dist.is_initialized(), "somebody else's process group"
    return results


def make_invalid(rank: int, _world_size: int, folder: str, degrees: Settings, by_rank: list[Settings]) -> list[str]:
    """The problems of a video whose settings depend on the rank; then the pipeline is as it was, and works."""
    pipe = load(folder)
    before = [state_of(part) for part in parts_of(pipe)]
    with pytest.raises(InvalidRequestError) as caught, pipedit.parallelize(pipe, **degrees):
        make_latents(pipe, **by_rank[min(rank, len(by_rank) - 1)])
    assert [state_of(part) for part in parts_of(pipe)] == before
    return list(caught.value.problems)


# -- the same video -----------------------------------------------------------------------------------------------


def assert_same(group: Ranks, folder: Path, degrees: Settings, *videos: Settings) -> None:
    """Every rank's latents are within 1e-5 of one process, and all ranks have the very same."""
    first, *others = group.run(make_videos, str(folder), degrees, *videos)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    for ours, settings in zip(first, videos, strict=True):
        theirs = make_latents(load(str(folder)), **settings)
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() <= 1e-5
        # The same comparison must fail for another video.
        assert (ours - make_latents(load(str(folder)), **{**settings, "seed": 99})).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("kind", "degrees", "changes"),
    [
        ("wan", {}, {}),
        ("wan", {"ulysses_degree": 2, "ring_degree": 2, "pipesp_chunks": 2}, {"guidance_scale": 1.0}),
        ("wan", {"cfg_degree": 2, "pipesp_chunks": 1}, {"negative_prompt": NEGATIVE}),
        ("wan22", {"cfg_degree": 2}, {}),
        ("wan22", {"ulysses_degree": 4, "pipesp_chunks": 1}, {}),
        ("wan_ti2v", {"ring_degree": 2}, {}),
        ("wan_ti2v", {"cfg_degree": 2, "ring_degree": 2, "ulysses_degree": 1}, {}),
        ("hunyuan", {}, {}),
        ("hunyuan", {"ring_degree": 2, "pipesp_chunks": 2}, {"prompt": PROMPTS}),
        ("hunyuan", {"cfg_degree": 2}, {"true_cfg_scale": 2.0, "negative_prompt": NEGATIVE}),
    ],
)
def test_four_ranks_make_the_video_of_one_process(
    kind: str, degrees: Settings, changes: Settings, four: Ranks, tiny_folder: Callable[[str], Path]
) -> None:
    assert_same(four, tiny_folder(kind), degrees, settings_of(kind, **changes))


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_three_ranks_share_four_heads(kind: str, three: Ranks, tiny_folder: Callable[[str], Path]) -> None:
    assert_same(three, tiny_folder(kind), {"ulysses_degree": 3}, settings_of(kind))


def test_several_videos_in_one_context(four: Ranks, tiny_folder: Callable[[str], Path]) -> None:
    first = settings_of("wan", num_inference_steps=2)
    second = {**first, "prompt": PROMPTS[1], "negative_prompt": NEGATIVE, "num_frames": 13, "num_inference_steps": 4}
    assert_same(four, tiny_folder("wan"), {"cfg_degree": 2}, first, second, first)


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"seed": 4}], "rank 1 has other latents than rank 0; pass generator=torch.Generator('cpu').manual_seed("),
        ([{"num_inference_steps": 5}, {}], "rank 1 has other timesteps than rank 0"),
        ([{}, {"prompt": PROMPTS[1]}], "rank 1 has other prompts than rank 0"),
    ],
)
def test_ranks_with_different_inputs(
    changes: list[Settings], message: str, four: Ranks, tiny_folder: Callable[[str], Path]
) -> None:
    by_rank = [settings_of("wan", **each) for each in changes]
    for problems in four.run(make_invalid, str(tiny_folder("wan")), {}, by_rank):
        assert any(problem.startswith(message) for problem in problems), problems
    assert_same(four, tiny_folder("wan"), {}, by_rank[0])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("wan", {"guidance_scale": 1.0}), ("wan", {"guidance_scale": 1.0, "num_inference_steps": 1}), ("hunyuan", {})],
)
def test_two_branches_without_guidance(
    kind: str, changes: Settings, four: Ranks, tiny_folder: Callable[[str], Path]
) -> None:
    settings = [settings_of(kind, **changes)]
    for problems in four.run(make_invalid, str(tiny_folder(kind)), {"cfg_degree": 2}, settings):
        assert "cfg_degree=2 needs guidance" in problems[0]


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"ulysses_degree": 3}, "does not divide 4"),
        ({"cfg_degree": 3, "pipesp_chunks": 0}, "cfg_degree=3 is too many"),
        ({"ulysses_degree": 2, "ring_degree": 1}, "nearest that can"),
    ],
)
def test_impossible_degrees(degrees: Settings, message: str, four: Ranks, tiny_folder: Callable[[str], Path]) -> None:
    for problems in four.run(make_invalid, str(tiny_folder("wan")), degrees, [settings_of("wan")]):
        assert message in "\n".join(problems)


# -- torch.distributed --------------------------------------------------------------------------------------------


def test_one_process_without_torchrun(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(InvalidRequestError, match="torchrun"), pipedit.parallelize(load(str(tiny_folder("wan")))):
        pass


def test_process_group_is_made_and_ended(tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    pipe, settings = load(str(tiny_folder("wan"))), settings_of("wan")
    theirs = make_latents(pipe, **settings)
    with pipedit.parallelize(pipe):
        ours = make_latents(pipe, **settings)
    assert not dist.is_initialized()
    assert (ours - theirs).abs().max() <= 1e-5
    with pytest.raises(KeyError), pipedit.parallelize(pipe):
        raise KeyError
    assert not dist.is_initialized()
    assert torch.equal(make_latents(pipe, **settings), theirs)
