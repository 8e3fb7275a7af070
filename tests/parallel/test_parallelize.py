"""`pipedit.parallelize` on 3 and 4 gloo ranks against plain diffusers pipelines, with every parameter randomised."""

import contextlib
import copy
import dataclasses
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import pipedit
from pipedit.core.errors import InvalidRequestError
from pipedit.worker.pipeline_calls import check_same_inputs
from tests.parallel.ranks import Ranks
from tests.parallel.videos import NEGATIVE, PROMPTS, Settings, load, make_latents, parts_of, settings_of
from tests.untouched import state_of


@pytest.fixture
def four(gloo: Callable[[int], Ranks]) -> Ranks:
    return gloo(4)


@pytest.fixture
def three(gloo: Callable[[int], Ranks]) -> Ranks:
    return gloo(3)


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


# -- the decode ---------------------------------------------------------------------------------------------------

GREY_LEVEL = 2 / 255  # between -1 and 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decode:
    """Random latents [batch, channels, *size] for a copy of the pipeline's VAE, whose tiles have 4 x 4 positions."""

    kind: str
    size: tuple[int, int, int]
    batch: int = 1
    is_tiled: bool = False
    is_sliced: bool = False
    is_recorded: bool = False  # with gradients
    dtype: torch.dtype = torch.float32

    def make_vae(self, pipe: Any) -> Any:
        vae = copy.deepcopy(pipe.vae).to(self.dtype)
        if self.is_tiled:
            side, stride = (vae.spatial_compression_ratio * positions for positions in (4, 3))
            vae.enable_tiling(side, side, tile_sample_stride_height=stride, tile_sample_stride_width=stride)
        if self.is_sliced:
            vae.enable_slicing()
        return vae

    def make_latents(self, vae: Any) -> torch.Tensor:
        shape = (self.batch, vae.post_quant_conv.in_channels, *self.size)
        return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    alone: torch.Tensor
    together: torch.Tensor
    positions_alone: int  # latent positions that went through this rank's decoder
    positions: int


@contextlib.contextmanager
def counted(vae: Any) -> Iterator[list[int]]:
    """Positions of each call of the decoder."""
    calls: list[int] = []
    with vae.decoder.register_forward_pre_hook(lambda _module, inputs: calls.append(inputs[0][:, 0].numel())):
        yield calls


def decode(_rank: int, _world_size: int, folder: str, cases: list[Decode]) -> list[Decoded]:
    """Each case by this rank alone, then by all; says that the VAE was left as it was found."""
    pipe = load(folder)
    found, results = pipe.vae, []
    for case in cases:
        pipe.vae = vae = case.make_vae(pipe)
        latents = case.make_latents(vae)
        with torch.set_grad_enabled(case.is_recorded):
            with counted(vae) as calls_alone:
                alone = vae.decode(latents).sample.detach()
            before, attributes = state_of(vae), dict(vars(vae))
            with pipedit.parallelize(pipe), counted(vae) as calls:
                together = vae.decode(latents, return_dict=False)[0].detach()
                assert torch.equal(vae.decode(latents).sample, together)
        assert state_of(vae) == before
        assert "_decode" not in vars(vae) and vars(vae).keys() == attributes.keys()
        assert together.dtype == alone.dtype == case.dtype
        positions_alone, positions = sum(calls_alone), sum(calls) // 2
        results.append(Decoded(alone=alone, together=together, positions_alone=positions_alone, positions=positions))
        pipe.vae = found
    return results


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a.float() - b.float()).abs().max())


SPREAD = [
    Decode(kind="wan", size=(2, 19, 5), batch=2),  # on 3 ranks: 7, 6 and 6 rows
    Decode(kind="wan", size=(2, 13, 3), batch=2, is_sliced=True),  # a rank without a row
    Decode(kind="wan", size=(2, 7, 5), batch=2, is_tiled=True),
    Decode(kind="wan_ti2v", size=(2, 19, 3)),
    Decode(kind="wan_ti2v", size=(2, 5, 3), is_tiled=True),  # two tiles
    Decode(kind="hunyuan", size=(7, 2, 3), batch=2),  # two temporal tiles
    Decode(kind="hunyuan", size=(6, 3, 2), batch=2, is_sliced=True, dtype=torch.bfloat16),
    Decode(kind="hunyuan", size=(6, 5, 5), is_tiled=True),
    Decode(kind="hunyuan", size=(4, 3, 7), is_tiled=True),  # one temporal tile, three spatial ones
]


@pytest.mark.parametrize("kind", ["wan", "wan_ti2v", "hunyuan"])
def test_decode_is_shared(kind: str, three: Ranks, tiny_folder: Callable[[str], Path]) -> None:
    cases = [case for case in SPREAD if case.kind == kind]
    by_rank = three.run(decode, str(tiny_folder(kind)), cases)
    for case, *everybody in zip(cases, *by_rank, strict=True):
        for result in everybody:
            assert torch.equal(result.together, everybody[0].together)
            limit = 0.0 if kind == "hunyuan" else GREY_LEVEL
            assert difference(result.together, result.alone) <= limit, case
        # At most, because diffusers also decodes a last temporal tile that adds nothing.
        assert sum(result.positions for result in everybody) <= everybody[0].positions_alone, case
        assert max(result.positions for result in everybody) <= 0.7 * everybody[0].positions_alone, case


def test_rows_alone_give_another_picture(tiny_folder: Callable[[str], Path]) -> None:
    """What the comparison above would see, if ranks decoded their rows without those of their neighbours."""
    case, vae = SPREAD[0], load(str(tiny_folder("wan"))).vae
    latents = case.make_latents(vae)
    with torch.no_grad():
        slabs = torch.cat([vae.decode(slab).sample for slab in latents.split((7, 6, 6), dim=3)], dim=3)
        assert difference(slabs, vae.decode(latents).sample) > 10 * GREY_LEVEL


def test_what_cannot_be_shared_is_decoded_by_each_rank(three: Ranks, tiny_folder: Callable[[str], Path]) -> None:
    too_small = Decode(kind="wan", size=(2, 11, 5))
    recorded = Decode(kind="wan", size=(1, 19, 3), is_recorded=True)
    for case in (Decode(kind="hunyuan", size=(4, 2, 3)), too_small, recorded):
        for (result,) in three.run(decode, str(tiny_folder(case.kind)), [case]):
            assert torch.equal(result.together, result.alone)
            assert result.positions == result.positions_alone


def make_frames(pipe: Any, *, seed: int, **settings: Any) -> torch.Tensor:
    """[B, F, 3, H, W] between 0 and 1."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    generator = torch.Generator("cpu").manual_seed(seed)
    frames: torch.Tensor = pipe(generator=generator, output_type="pt", **settings).frames
    return frames


def make_frames_together(_rank: int, _world_size: int, folder: str, settings: Settings) -> torch.Tensor:
    pipe = load(folder)
    with pipedit.parallelize(pipe):
        frames = make_frames(pipe, **settings)
    assert "_decode" not in vars(pipe.vae)
    return frames


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("wan", {"prompt": PROMPTS}), ("wan_ti2v", {}), ("hunyuan", {"num_frames": 33, "num_inference_steps": 2})],
)
def test_every_rank_gets_the_frames(
    kind: str, changes: Settings, four: Ranks, tiny_folder: Callable[[str], Path]
) -> None:
    settings = settings_of(kind, **changes)
    first, *others = four.run(make_frames_together, str(tiny_folder(kind)), settings)
    assert all(torch.equal(first, other) for other in others)
    pipe = load(str(tiny_folder(kind)))
    assert difference(first, make_frames(pipe, **settings)) <= 1 / 255
    assert difference(first, make_frames(pipe, **{**settings, "seed": 99})) > 10 / 255


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


def check_overflown(_rank: int, _world_size: int) -> None:
    latents = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf] * 9)
    check_same_inputs({"hidden_states": latents, "timestep": torch.ones(1), "encoder_hidden_states": torch.ones(2, 3)})


def test_the_same_overflow_everywhere_is_no_difference(three: Ranks) -> None:
    three.run(check_overflown)


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
        ({"ulysses_degree": 3}, "ulysses_degree=3 cannot run on 4 workers: 3 does not divide 4; nearest that can"),
        ({"cfg_degree": 3, "pipesp_chunks": 0}, "cfg_degree=3 is too many"),
        ({"cfg_degree": 1, "ulysses_degree": 2, "ring_degree": 1}, "together they make 2; nearest that can"),
        ({"ulysses_degree": 2, "ring_degree": 1}, "ring_degree=1 and ulysses_degree=2 on 4 ranks would need"),
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
