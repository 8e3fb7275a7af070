"""What is measured on long videos: faults are found where they are, and none where there are none."""

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import continuity, evaluate, long_video_report, long_videos
from training.long_videos import Configuration, blocks, configurations

LATENTS, JOINTS = 16, [8]


def drifting(latents: int, *, jump_at: int | None = None) -> np.ndarray:
    """A picture of which each frame is 2 levels brighter than the one before; 10 into latent frame `jump_at`."""
    steps = np.full(continuity.num_frames(latents), 2)
    if jump_at is not None:
        steps[continuity.num_frames(jump_at)] = 10
    return np.broadcast_to(np.cumsum(steps)[:, None, None, None], (len(steps), 4, 4, 3)).astype(np.uint8)


# -- latent frames and windows --------------------------------------------------------------------------------------


def test_latent_frames_share_out_the_frames() -> None:
    pieces = [continuity.frames_of(first, first + 1) for first in range(13)]
    numbers = [list(range(49))[piece] for piece in pieces]
    assert [len(piece) for piece in numbers] == [1] + [4] * 12
    assert list(itertools.chain(*numbers)) == list(range(49))
    assert continuity.frames_of(2, 5) == slice(5, 17)


def test_windows_overlap_by_half_and_the_first_and_last_quarter_have_some() -> None:
    windows = continuity.windows(48)
    assert windows[:2] == ((0, 8), (4, 12))
    assert windows[-1] == (40, 48)
    quarters = [continuity.quarter_of(window, 48) for window in windows]
    assert quarters == [0, 0, *[None] * 7, 3, 3]


# -- flicker --------------------------------------------------------------------------------------------------------


def test_a_jump_at_a_joint_shows_and_one_elsewhere_does_not() -> None:
    smooth, jumping = (continuity.changes(drifting(LATENTS, jump_at=at)) for at in (None, 8))
    assert continuity.flicker(smooth, JOINTS, JOINTS, 8) == pytest.approx([1.0])
    assert continuity.flicker(jumping, JOINTS, JOINTS, 8) == pytest.approx([5.0], rel=0.03)
    middles = continuity.between_joints(LATENTS, JOINTS)
    assert middles == [4, 12]
    assert continuity.flicker(jumping, middles, JOINTS, 8) == pytest.approx([1.0, 1.0])
    for elsewhere in (7, 9):  # off by one latent frame is off
        assert continuity.flicker(continuity.changes(drifting(LATENTS, jump_at=elsewhere)), JOINTS, JOINTS, 8) == [1.0]


def test_a_frozen_picture_does_not_flicker() -> None:
    still = np.zeros((continuity.num_frames(LATENTS), 4, 4, 3), np.uint8)
    assert continuity.flicker(continuity.changes(still), JOINTS, JOINTS, 8) == [1.0]


# -- leaps and wandering --------------------------------------------------------------------------------------------


def test_a_leap_is_more_than_the_usual_way_also_round_the_torus() -> None:
    way = np.stack([(5.0 * np.arange(30)) % 64, np.full(30, 20.0)], axis=1)  # wraps twice
    assert continuity.leaps(way) == []
    assert continuity.wander(way, "right") == 0
    way[11:, 1] += 9  # to another row
    assert continuity.leaps(way) == []  # a step of 10.3 instead of 5: not yet
    way[11:, 1] += 6
    assert continuity.leaps(way) == [11]
    assert continuity.wander(way, "right") == pytest.approx(15)
    assert continuity.wander(way, "up") > 100


# -- what a configuration means -------------------------------------------------------------------------------------


def test_joints_follow_the_plan_of_blocks() -> None:
    assert blocks("cache", 8, 4).joints(20) == [8, 16]
    assert blocks("rerun", 8, 8, dualparal_compat=True).joints(40) == [16, 24, 32]  # its first block is longer
    assert Configuration(name="whole", engine={"strategy": "colocated"}).joints(48) == []


def test_each_configuration_has_its_own_folder() -> None:
    paths = {long_videos.clip_path(Path(), c.name, 1, 48) for c in configurations()}
    assert len(paths) == len(configurations())


def test_prompts_show_every_motion_that_can_go_on() -> None:
    asked = long_videos.questions(10)
    assert [question.scene.motion for question in asked][:7] == list(long_videos.MOTIONS)
    assert len({question.seed for question in asked}) == 10
    assert long_videos.questions(3) == asked[:3]


# -- the whole judgement --------------------------------------------------------------------------------------------


def real(question: evaluate.Question) -> np.ndarray:
    (clip,) = long_videos.make(Configuration(name="real"), [question], LATENTS)
    return clip


def test_a_real_clip_has_no_fault_and_two_spliced_ones_have() -> None:
    (question,) = [q for q in long_videos.questions(7) if q.scene.motion == "right"]
    clip = real(question)
    found = long_videos.figures(question, clip, JOINTS, 8)
    assert found["windows"] == {check: [1, 1, 1] for check in long_videos.CHECKS}
    assert (found["leaps"], found["wander"]) == ([], pytest.approx(0, abs=0.5))
    assert found["flicker"] == pytest.approx([1.0], abs=0.1)

    cut = continuity.num_frames(8)
    spliced = np.concatenate([clip[:cut], np.roll(clip[cut:], 25, axis=1)])
    found = long_videos.figures(question, spliced, JOINTS, 8)
    assert found["leaps"] == [8]
    assert found["wander"] == pytest.approx(25, abs=1)
    assert found["flicker"][0] > 3
    assert found["windows"]["motion"] == [1, 0, 1]  # only one goes across the joint


# -- runs and reports -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(configuration: Configuration, asked: list[evaluate.Question], latents: int) -> Iterator[np.ndarray]:
        for question in asked:
            made.append((configuration.name, question.seed))
            yield np.zeros((continuity.num_frames(latents), 64, 64, 3), np.uint8)

    def figures(question: evaluate.Question, frames: np.ndarray, joints: list[int], size: int) -> dict[str, Any]:
        return {"frames": len(frames), "prompt": question.prompt, "joints": joints, "size": size}

    monkeypatch.setattr(long_videos, "make", make)
    monkeypatch.setattr(long_videos, "figures", figures)
    output, seeds = tmp_path / "figures.json", [question.seed for question in long_videos.questions(2)]
    options = {"latents": 16, "count": 2, "only": "cache 8/[48]"}
    long_videos.run(output, tmp_path / "clips", minutes=0, **options)  # type: ignore[arg-type]
    assert made == [("cache 8/4", seeds[0])]
    long_videos.run(output, tmp_path / "clips", minutes=1, **options)  # type: ignore[arg-type]
    long_videos.run(output, tmp_path / "clips", minutes=1, **options)  # type: ignore[arg-type]
    assert made == [(name, seed) for name in ("cache 8/4", "cache 8/8") for seed in seeds]
    rows = json.loads(output.read_text())["videos"]["cache 8/8"][str(seeds[0])]
    assert (rows["joints"], rows["size"]) == ([8], 8)
    with pytest.raises(SystemExit, match="use another"):
        long_videos.run(output, tmp_path / "clips", minutes=1, **{**options, "latents": 20})  # type: ignore[arg-type]


def video(**given: Any) -> dict[str, Any]:
    count = len(continuity.windows(32))
    plain = {
        "motion": "right",
        "latents": 32,
        "joints": [8, 16, 24],
        "windows": {check: [1] * count for check in long_videos.CHECKS},
        "overlap": [0.9] * count,
        "flicker": [1.0, 1.2, 1.1],
        "flicker_between": [1.0] * 4,
        "leaps": [],
        "wander": 1.0,
    }
    return {**plain, **given}


def test_the_summary_counts_leaps_at_joints_and_elsewhere() -> None:
    found = long_video_report.summary([video(leaps=[8, 9, 12]), video()])
    assert found["leaps_at_joints"] == pytest.approx(2 / 6)
    assert found["leaps_elsewhere"] == pytest.approx(1 / (2 * 31 - 2 * 6))
    assert found["flicker"] == pytest.approx(1.1)
    assert found["motion"] == 1.0
    late = video()
    late["windows"]["shape"][-1] = 0
    found = long_video_report.summary([late])
    assert (found["first_quarter"], found["last_quarter"]) == (1.0, 0.0)


def test_the_table_leaves_open_what_has_no_joints() -> None:
    seed, other = (str(question.seed) for question in long_videos.questions(2))
    whole = video(joints=[], flicker=[], flicker_between=[1.0], motion="still")
    videos = {"cache 8/4": {seed: video()}, "one piece, untrained length": {seed: whole}, "cache 8/8": {other: video()}}
    rows = [line.split(" | ") for line in long_video_report.table({"latents": 32, "videos": videos}, 1).splitlines()]
    assert [row[0] for row in rows[2:]] == [
        "| one piece, untrained length",
        "| cache 8/4",
    ]  # 8/8 lacks it
    for title, cells in {
        "**flicker** at joints (9 in 10)": ["", "**1.10** (1.18)"],
        "motion: still, bounces": ["1.00", ""],
        "colour and background": ["1.00, 1.00", "1.00, 1.00"],
    }.items():
        assert [row[rows[0].index(title)] for row in rows[2:]] == cells


def test_the_sheet_marks_joints(tmp_path: Path) -> None:
    path = long_videos.clip_path(tmp_path, "cache 8/4", 1, 16)
    path.parent.mkdir(parents=True)
    np.savez_compressed(path, frames=np.zeros((continuity.num_frames(16), 64, 64, 3), np.uint8))
    result = {"latents": 16, "videos": {"cache 8/4": {"1": {"joints": [8], "prompt": "a ball"}}}}
    frames, marked = long_video_report.strip(result, tmp_path, ("cache 8/4", 1), every=2)
    assert frames.shape == (8, 64, 64, 3)
    assert marked == [4]
    long_video_report.save_sheet(result, tmp_path, [("cache 8/4", 1)], tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 100
