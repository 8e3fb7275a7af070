"""Figures of long videos as a table and a picture: python -m training.long_video_report [--videos FILE] [--clips DIR].

Fills the tables of docs/long_video_quality.md between their markers and draws docs/images/long_video_contact_sheet.png.
"""

import argparse
import itertools
import json
import string
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipedit.media import contact_sheet
from training import continuity
from training.card import fill
from training.long_videos import CHECKS, clip_path, configurations, questions

COUNTS = (7, 14)  # videos: of most configurations, and of those that matter for the defaults
RESTING = ("still", "bounce_x", "bounce_y")  # motions that stay where they are
_MARK = (255, 60, 160)


def summary(videos: list[dict[str, Any]]) -> dict[str, float | None]:
    """One configuration's figures; None where it has nothing of the kind."""
    resting = [video for video in videos if video["motion"] in RESTING]
    moving = [video for video in videos if video["motion"] not in RESTING]
    joints = [(video, joint) for video in videos for joint in video["joints"]]
    at_joints = sum(_leaps_at(video, joint) for video, joint in joints)
    others = sum(video["latents"] - 1 for video in videos) - 2 * len(joints)
    flicker, between = (list(_joined(v[key] for v in videos)) for key in ("flicker", "flicker_between"))
    return {
        **{check: _mean(_joined(v["windows"][check] for v in videos)) for check in CHECKS},
        "motion_resting": _mean(_joined(v["windows"]["motion"] for v in resting)),
        "motion_moving": _mean(_joined(v["windows"]["motion"] for v in moving)),
        "overlap": _mean(_joined(v["overlap"] for v in videos)),
        "first_quarter": _mean(_all_right(videos, 0)),
        "last_quarter": _mean(_all_right(videos, 3)),
        "flicker": _quantile(flicker, 0.5),
        "flicker_90": _quantile(flicker, 0.9),
        "between": _quantile(between, 0.5),
        "between_90": _quantile(between, 0.9),
        "leaps_at_joints": at_joints / len(joints) if joints else None,
        "leaps_elsewhere": (sum(len(video["leaps"]) for video in videos) - at_joints) / others,
        "wander": _quantile([video["wander"] for video in videos], 0.5),
    }


def _all_right(videos: list[dict[str, Any]], quarter: int) -> Iterator[bool]:
    """For each window of that quarter, whether every check was passed."""
    for video in videos:
        for number, span in enumerate(continuity.windows(video["latents"])):
            if continuity.quarter_of(span, video["latents"]) == quarter:
                yield all(video["windows"][check][number] for check in CHECKS)


def _leaps_at(video: dict[str, Any], joint: int) -> int:
    """Leaps into the first two latent frames of a block: the decoder smears a step over both."""
    return sum(leap in (joint, joint + 1) for leap in video["leaps"])


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return float(np.mean(found)) if found else None


def _quantile(values: list[float], share: float) -> float | None:
    return float(np.quantile(values, share)) if values else None


def _joined(lists: Iterable[list[float]]) -> Iterator[float]:
    return itertools.chain.from_iterable(lists)


COLUMNS = {
    "colour and background": "{colour:.2f}, {background:.2f}",
    "shape": "{shape:.2f}",
    "motion: still, bounces": "{motion_resting:.2f}",
    "motion: left, right, up, down": "{motion_moving:.2f}",
    "overlap": "{overlap:.2f}",
    "all right, first and last quarter": "{first_quarter:.2f}, {last_quarter:.2f}",
    "**flicker** at joints (9 in 10)": "**{flicker:.2f}** ({flicker_90:.2f})",
    "the same between joints": "{between:.2f} ({between_90:.2f})",
    "leaps per joint": "{leaps_at_joints:.2f}",
    "per other latent frame": "{leaps_elsewhere:.3f}",
    "wander, pixels": "{wander:.1f}",
}


def table(result: dict[str, Any], count: int) -> str:
    """The configurations that have the first `count` videos, a row each, as Markdown."""
    seeds = [str(question.seed) for question in questions(count)]
    lines = [_row(["", *COLUMNS]), _row(["---"] * (1 + len(COLUMNS)))]
    for configuration in configurations():
        videos = result["videos"].get(configuration.name, {})
        if all(seed in videos for seed in seeds):
            figures = summary([videos[seed] for seed in seeds])
            lines.append(_row([configuration.name, *(_cell(form, figures) for form in COLUMNS.values())]))
    return "\n".join(lines)


def _cell(form: str, figures: dict[str, float | None]) -> str:
    """Empty where a figure is missing."""
    names = [name for _, name, _, _ in string.Formatter().parse(form) if name]
    return form.format(**figures) if all(figures[name] is not None for name in names) else ""


def _row(cells: list[Any]) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


Row = tuple[str, int]  # a configuration and a seed


def strip(result: dict[str, Any], clips: Path, row: Row, *, every: int) -> tuple[continuity.Frames, list[int]]:
    """The last frame of every `every`th latent frame, white where there is none; and those of them that are the first
    ones since a joint."""
    name, seed = row
    frames, joints = np.load(clip_path(clips, name, seed, result["latents"]))["frames"], _video(result, row)["joints"]
    latents = range(0, result["latents"], every)
    shown = np.full((len(latents), *frames.shape[1:]), 255, np.uint8)
    for column, latent in enumerate(latents):
        if latent * continuity.FRAMES_OF_LATENT < len(frames):
            shown[column] = frames[latent * continuity.FRAMES_OF_LATENT]
    marked = [n for n, latent in enumerate(latents) if any(latent - every < joint <= latent for joint in joints)]
    return shown, marked


def _video(result: dict[str, Any], row: Row) -> dict[str, Any]:
    found: dict[str, Any] = result["videos"][row[0]][str(row[1])]
    return found


def save_sheet(result: dict[str, Any], clips: Path, rows: list[Row], path: Path, *, every: int = 2) -> None:
    """A strip for each row; a bar on the left of a frame marks a joint."""
    strips = []
    for row in rows:
        shown, marked = strip(result, clips, row, every=every)
        shown[marked, :, :3] = _MARK
        strips.append(shown)
    titles = [f"{row[0]}: {_video(result, row)['prompt']}" for row in rows]
    sheet = contact_sheet(np.concatenate(strips), columns=len(strips[0]), row_titles=titles, gap=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.quantize(128).save(path, optimize=True)


SHEET = (
    "one piece, as trained",
    "one piece, untrained length",
    "cache 8/0",
    "cache 8/2",
    "cache 8/4",
    "cache 8/8",
    "rerun 8/4",
    "rerun 8/8",
)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, default=Path("benchmarks/long_video_quality.json"))
    parser.add_argument("--clips", type=Path, default=Path("out/long_videos"))
    parser.add_argument("--doc", type=Path, default=Path("docs/long_video_quality.md"))
    parser.add_argument("--sheet", type=Path, default=Path("docs/images/long_video_contact_sheet.png"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 3], help="those on the sheet, by number")
    arguments = parser.parse_args()
    found = json.loads(arguments.videos.read_text())
    for count in COUNTS:
        fill(arguments.doc, f"{count} videos", table(found, count))
    asked = questions(1 + max(arguments.prompts))
    shown = [(name, asked[number].seed) for number in arguments.prompts for name in SHEET]
    save_sheet(found, arguments.clips, shown, arguments.sheet)
