"""A video that is saved, and gone on with by other workers, is the same bit by bit as one that nobody disturbed."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.core.errors import SnapshotError
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.core.snapshots import rank_file
from pipedit.worker.block_worker import BlockWorker
from tests import tiny_pipelines
from tests.worker.block_crew import BlockCrew, Frames, Making, begin, block_crew, resumed, stages_of

Folder = Callable[[str], Path]
STEPS = 3
UNGUIDED: dict[str, dict[str, Any]] = {"hunyuan": {"true_cfg_scale": 1.0}, "wan": {"guidance_scale": 1.0}}
GUIDED: dict[str, dict[str, Any]] = {"hunyuan": {"true_cfg_scale": 3.0, "negative_prompt": "green"}}


def request_of(crew: BlockCrew, kind: str, latents: int, **changes: Any) -> VideoRequest:
    settings = {**tiny_pipelines.QUICK_SETTINGS[kind], "num_inference_steps": STEPS, "seed": 3}
    settings |= {"num_frames": 4 * (latents - 1) + 1, **GUIDED.get(kind, {}), **changes}
    return crew.adapter.complete(VideoRequest(prompt="a red ball", **settings))


def plan_of(
    latents: int, prefix: Prefix = Prefix.CACHE, *, context: int = 1, block: int = 2, steps: int = STEPS
) -> BlockPlan:
    return BlockPlan(latents=latents, block_latents=block, context_latents=context, num_steps=steps, prefix=prefix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """A snapshot, and the frames that had come by then."""

    path: Path
    at: int
    decoded: int
    frames: list[Frames]


def saved_everywhere(making: Making, folder: Path) -> Iterator[Cut]:
    """Runs the video op by op; a snapshot after each. The last one is whole but for its end."""
    total = making.plan.num_operations or 0
    for at in range(1, total):
        making.denoise(1)
        making.decode()
        making.save(folder / str(at))
        yield Cut(path=folder / str(at), at=at, decoded=making.decoded, frames=list(making.frames))


def rest(crew: BlockCrew, cut: Cut, request: VideoRequest, plan: BlockPlan, name: str = "again") -> Frames:
    making = resumed(crew, name, request, plan, cut.path, at=cut.at, decoded=cut.decoded)
    making.frames += cut.frames
    return making.finish(piece=4)


WAYS: dict[str, tuple[str, Placement, Prefix, dict[str, Any]]] = {
    "wan": ("wan", stages_of(1), Prefix.CACHE, {}),
    "wan, rerun": ("wan", stages_of(1), Prefix.RERUN, {}),
    "wan, 2 stages": ("wan", stages_of(2), Prefix.CACHE, {}),
    "wan, 2 stages, rerun": ("wan", stages_of(2), Prefix.RERUN, {}),
    "wan, 3 stages, int8": ("wan", stages_of(3), Prefix.CACHE, {"context_storage": "int8"}),
    "wan, 1 + 1, host": ("wan", stages_of(1, decoder=1), Prefix.CACHE, {"context_storage": "host"}),
    "wan, 2 + 1": ("wan", stages_of(2, decoder=2), Prefix.CACHE, {}),
    "wan22": ("wan22", stages_of(1), Prefix.CACHE, {}),
    "wan22, 2 stages, rerun": ("wan22", stages_of(2), Prefix.RERUN, {}),
    "hunyuan": ("hunyuan", stages_of(1), Prefix.CACHE, {}),
    "hunyuan, 2 stages, rerun": ("hunyuan", stages_of(2), Prefix.RERUN, {}),
    "hunyuan, 3 stages": ("hunyuan", stages_of(3), Prefix.CACHE, {}),
}


@pytest.mark.parametrize("way", WAYS)
def test_from_everywhere_the_same_frames(way: str, tiny_folder: Folder, tmp_path: Path) -> None:
    kind, placement, prefix, settings = WAYS[way]
    plan = plan_of(5, prefix)
    with block_crew(tiny_folder(kind), placement, **settings) as crew:
        request = request_of(crew, kind, 5)
        whole = begin(crew, "whole", request, plan).finish()
        assert len(whole) == request.num_frames
        making = begin(crew, "saved", request, plan)
        cuts = list(saved_everywhere(making, tmp_path))
        assert np.array_equal(making.finish(), whole), "saving changed the video"
        for cut in cuts:
            assert np.array_equal(rest(crew, cut, request, plan), whole), cut.at
            assert not nothing_new(crew), cut.at
        if prefix is Prefix.CACHE:
            with block_crew(tiny_folder(kind), placement, **settings) as others:
                assert np.array_equal(rest(others, cuts[4], request, plan), whole)


def nothing_new(crew: BlockCrew) -> list[BlockWorker]:
    """Workers that keep something."""
    return [
        worker
        for worker in crew.workers
        if worker._shelf.held_bytes or worker._decoders or (worker._work and worker._work._context.entries)
    ]


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_without_guidance_and_with_wide_context(kind: str, tiny_folder: Folder, tmp_path: Path) -> None:
    plan = plan_of(8, context=3, block=3)
    with block_crew(tiny_folder(kind), stages_of(2)) as crew:
        request = request_of(crew, kind, 8, **UNGUIDED[kind])
        whole = begin(crew, "whole", request, plan).finish()
        cuts = list(saved_everywhere(begin(crew, "saved", request, plan), tmp_path))
        for cut in cuts[1::3]:
            assert np.array_equal(rest(crew, cut, request, plan), whole), cut.at


@pytest.mark.parametrize("kind", ["wan", "wan_ti2v", "hunyuan"])
def test_a_decoder_with_tiles(kind: str, tiny_folder: Folder, tmp_path: Path) -> None:
    plan = plan_of(7)
    size = {"height": 64, "width": 96} if kind == "wan_ti2v" else {"height": 32, "width": 48}
    with block_crew(tiny_folder(kind), stages_of(1), vae_tiling=True) as crew:
        stage: Any = crew.workers[0]._stages.decode
        tiles = {"min": 32, "stride": 24} if kind != "wan_ti2v" else {"min": 64, "stride": 48}
        sides = itertools.product(tiles.items(), ("height", "width"))
        stage.vae.enable_tiling(**{f"tile_sample_{name}_{side}": pixels for (name, pixels), side in sides})
        request = request_of(crew, kind, 7, **size)
        whole = begin(crew, "whole", request, plan).finish()
        cuts = list(saved_everywhere(begin(crew, "saved", request, plan), tmp_path))
        decoding = [cut for cut in cuts if cut.decoded]
        assert len({cut.decoded for cut in decoding}) > 1
        for cut in decoding[::2]:
            assert np.array_equal(rest(crew, cut, request, plan), whole), cut.at


def test_a_snapshot_of_a_snapshot(tiny_folder: Folder, tmp_path: Path) -> None:
    plan = plan_of(7)
    with block_crew(tiny_folder("wan"), stages_of(2)) as crew:
        request = request_of(crew, "wan", 7)
        whole = begin(crew, "whole", request, plan).finish()
        making = begin(crew, "0", request, plan)
        for life, count in enumerate((3, 1, 2, 3), start=1):
            making.denoise(count)
            making.decode()
            path = tmp_path / str(making.done)
            making.save(path)
            at, decoded, frames = making.done, making.decoded, making.frames
            making.release(failed=True)  # as if it were lost
            crew.epoch += 1
            making = resumed(crew, str(life), request, plan, path, at=at, decoded=decoded)
            making.frames += frames
        assert np.array_equal(making.finish(), whole)


def test_blocks_that_wait_for_the_decoder_are_saved(tiny_folder: Folder, tmp_path: Path) -> None:
    plan = plan_of(7)
    with block_crew(tiny_folder("wan"), stages_of(1, decoder=1)) as crew:
        request = request_of(crew, "wan", 7)
        whole = begin(crew, "whole", request, plan).finish()
        making = begin(crew, "saved", request, plan)
        told = 0
        while making.finished == told:
            making.denoise(1)
            told = making.finished
            making.save(tmp_path / str(making.done))
        assert making.finished > making.decoded == 0, "its last result was still on its way"
        cut = Cut(path=tmp_path / str(making.done), at=making.done, decoded=0, frames=[])
        making.release(failed=True)
        crew.epoch += 1
        assert np.array_equal(rest(crew, cut, request, plan), whole)


# -- controls -------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone(tiny_folder: Folder) -> Iterator[BlockCrew]:
    with block_crew(tiny_folder("wan"), stages_of(1)) as crew:
        yield crew


LONG = plan_of(9, steps=5)


def long_request(crew: BlockCrew) -> VideoRequest:
    return request_of(crew, "wan", 9, num_inference_steps=5)


@pytest.fixture
def cut(alone: BlockCrew, tmp_path: Path) -> Cut:
    """In the middle of denoising and of decoding."""
    making = begin(alone, "saved", long_request(alone), LONG)
    cuts = list(saved_everywhere(making, tmp_path))
    making.release(failed=True)
    return next(cut for cut in cuts if cut.decoded)


def changed(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> None:
    """Changes a file's tensors, and the header's text."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    tensors, form = load_file(path), json.loads(metadata["form"])
    change(tensors, form)
    save_file(tensors, path, metadata={**metadata, "form": json.dumps(form)})


def tensors_of(form: Any) -> list[str]:
    match form:
        case {"$tensor": name, "axes": _}:
            return [name]
        case dict():
            return [name for part in form.values() for name in tensors_of(part)]
        case list():
            return [name for part in form for name in tensors_of(part)]
    return []


PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "latents of a block": lambda tree: tree["denoising"]["denoiser"]["blocks"][-1]["state"]["latents"],
    "what its noise scheduler remembers": lambda tree: [
        block["state"]["noise_scheduler"]["memory"]["model_outputs"]
        for block in tree["denoising"]["denoiser"]["blocks"]
    ],
    "its last sample": lambda tree: [
        block["state"]["noise_scheduler"]["memory"]["last_sample"] for block in tree["denoising"]["denoiser"]["blocks"]
    ],
    "context": lambda tree: tree["denoising"]["denoiser"]["entries"],
    "what the decoder keeps": lambda tree: tree["decoding"]["state"]["caches"],
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_matters(part: str, alone: BlockCrew, cut: Cut) -> None:
    request, plan = long_request(alone), LONG
    whole = begin(alone, "whole", request, plan).finish()
    assert np.array_equal(rest(alone, cut, request, plan), whole)

    def change(tensors: dict[str, torch.Tensor], form: dict[str, Any]) -> None:
        names = tensors_of(PARTS[part](form["tree"]))
        assert names
        for name in names:
            tensors[name] = tensors[name] + 1.0

    changed(rank_file(cut.path, 0), change)
    assert not np.array_equal(rest(alone, cut, request, plan), whole)


# -- files that are not what they should be -------------------------------------------------------------------------


def refused(crew: BlockCrew, cut: Cut, request: VideoRequest | None = None, plan: BlockPlan | None = None) -> str:
    request, plan = request or long_request(crew), plan or LONG
    making = resumed(crew, "refused", request, plan, cut.path, at=cut.at, decoded=cut.decoded)
    with pytest.raises(SnapshotError) as error:
        making.denoise(1)
    making.release(failed=True)
    return str(error.value)


def test_files_that_are_torn_or_missing_are_refused(alone: BlockCrew, cut: Cut) -> None:
    file = rank_file(cut.path, 0)
    whole = file.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], whole[:5], b"", whole + b"x", b"x" * 100):
        file.write_bytes(content)
        assert "rank-0.safetensors is torn or no file of pipedit" in refused(alone, cut)
    file.unlink()
    assert "rank-0.safetensors is missing; resume from another checkpoint" in refused(alone, cut)
    save_file({"weight": torch.ones(3)}, file)
    assert "is no part of a checkpoint that this pipedit can read" in refused(alone, cut)
    file.write_bytes(whole)
    changed(file, lambda _tensors, form: form.pop("tree"))
    assert "torn or no file of pipedit" in refused(alone, cut)


def test_snapshots_of_other_videos_are_refused(alone: BlockCrew, cut: Cut) -> None:
    request = long_request(alone)
    assert "its request differ" in refused(alone, cut, dataclasses.replace(request, seed=4))
    assert "its blocks differ" in refused(alone, cut, plan=dataclasses.replace(LONG, prefix=Prefix.RERUN))
    assert "its at differ" in refused(alone, dataclasses.replace(cut, at=cut.at - 1))


def test_a_disk_that_refuses_is_told(alone: BlockCrew, tmp_path: Path) -> None:
    making = begin(alone, "saved", request_of(alone, "wan", 5), plan_of(5))
    making.denoise(1)
    (tmp_path / "file").touch()
    with pytest.raises(SnapshotError, match="could not be written"):
        making.save(tmp_path / "file" / "1")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
