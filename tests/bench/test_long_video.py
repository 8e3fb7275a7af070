"""What `bench long-video` measures, on the embedded model, and the arithmetic of its figures."""

import json
from pathlib import Path

import pytest

from pipedit.bench.long_video import OURS, PUBLISHED, LongVideoBench, busy_shares
from pipedit.cli.app import run
from pipedit.core.blocks import BlockPlan
from pipedit.core.spans import Span

BENCH = LongVideoBench(
    model="tiny", settings={}, frames=(17, 65), workers=(1, 2), blocks={"block_size": 4, "context": 2}, whole_frames=17
)


def step(rank: int, block: int, index: int, start_s: float, end_s: float) -> Span:
    return Span(
        request_id="a", rank=rank, role="denoiser", what="step", start_s=start_s, end_s=end_s, index=index, block=block
    )


def test_whole_sequences_are_left_out_where_they_would_take_too_long() -> None:
    assert len(BENCH.runs(17)) == len(BENCH.variants()) == 6
    assert set(BENCH.runs(65)) == {
        f"{name}, {count}" for name in (PUBLISHED, OURS) for count in ("1 worker", "2 workers")
    }


def test_published_means_the_released_conventions() -> None:
    settings = BENCH.variants()[f"{PUBLISHED}, 2 workers"]
    assert settings["dualparal_compat"] and settings["prefix"] == "rerun"
    assert "prefix" not in BENCH.variants()[f"{OURS}, 2 workers"]


def test_the_steady_state_lies_between_the_first_end_and_the_last_beginning() -> None:
    plan = BlockPlan(latents=6, block_latents=2, context_latents=1, num_steps=1)
    spans = [step(0, block, 0, float(block), block + 0.5) for block in range(3)]
    # From 0.5, when the first block is done, to 2.0, when the last one begins: block 1 alone, from 1.0 to 1.5.
    assert busy_shares(spans, plan) == {"0": pytest.approx(0.5 / 1.5)}
    assert (
        busy_shares(spans[:1] + spans[2:], BlockPlan(latents=2, block_latents=2, context_latents=0, num_steps=1)) == {}
    )


def test_a_video_in_one_piece_is_steady_from_the_first_step_to_the_last() -> None:
    spans = [step(0, 0, 0, 0.0, 1.0), step(0, 0, 1, 3.0, 4.0), step(1, 0, 0, 0.0, 4.0)]
    assert busy_shares(spans, None) == {"0": 0.5, "1": 1.0}


def test_the_command_measures_and_writes(tmp_path: Path) -> None:
    target = tmp_path / "long.json"
    words = [
        "bench",
        "long-video",
        "--num-frames",
        "33",
        "--num-inference-steps",
        "2",
        "--workers",
        "1",
        "--rounds",
        "1",
    ]
    blocks = ["--block-size", "4", "--context", "2", "--whole-frames", "17"]
    assert run([*words, *blocks, "-o", str(target)]) == 0
    result = json.loads(target.read_text())
    ours, published = (result["lengths"]["33"][f"{name}, 1 worker"] for name in (OURS, PUBLISHED))
    assert ours["num_frames"] == 33
    assert published["num_frames"] == 4 * (3 * 4 + 2 - 1) + 1
    assert 0 < ours["first_frames_s"]["median"] < ours["seconds"]["median"]
    assert ours["peak_bytes"]["0"] > 2**26
