"""Figures of long videos as a table and a picture: python -m training.long_video_report [--videos FILE] [--clips DIR].

Fills the table of docs/long_video_quality.md between its markers and draws docs/images/long_video_contact_sheet.png.
"""

import argparse
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipedit.media import contact_sheet
from training import continuity
from training.card import fill
from training.long_videos import clip_path, configurations, questions

CHECKS = ("colour", "background", "shape", "motion")
_MARK = (255, 60, 160)


def summary(videos: list[dict[str, Any]]) -> dict[str, float | None]:
    """One configuration's figures; None where it has nothing of the kind."""
    windows = [window for video in videos for window in video["windows"]]
    early, late = (_of_quarter(videos, quarter) for quarter in (0, 3))
    joints = [(video, joint) for video in videos for joint in video["joints"]]
    at_joints = sum(_leaps_at(video, joint) for video, joint in joints)
    others = sum(video["latents"] - 1 for video in videos) - 2 * len(joints)
    flicker, between = (list(_joined(v[key] for v in videos)) for key in ("flicker", "flicker_between"))
    return {
        **{check: _mean(window[check] for window in windows) for check in CHECKS},
        "overlap": _mean(window["overlap"] for window in windows),
        "first_quarter": _mean(all(window[check] for check in CHECKS) for window in early),
        "last_quarter": _mean(all(window[check] for check in CHECKS) for window in late),
        "flicker": _quantile(flicker, 0.5),
        "flicker_90": _quantile(flicker, 0.9),
        "between": _quantile(between, 0.5),
        "between_90": _quantile(between, 0.9),
        "leaps_at_joints": at_joints / len(joints) if joints else None,
        "leaps_elsewhere": (sum(len(video["leaps"]) for video in videos) - at_joints) / others,
        "wander": _quantile([video["wander"] for video in videos], 0.5),
    }


def _of_quarter(videos: list[dict[str, Any]], quarter: int) -> list[dict[str, Any]]:
    spans = [(video, continuity.windows(video["latents"])) for video in videos]
    return [
        window
        for video, windows in spans
        for window, span in zip(video["windows"], windows, strict=True)
        if continuity.quarter_of(span, video["latents"]) == quarter
    ]


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
    "colour": ("colour", "{:.2f}"),
    "background": ("background", "{:.2f}"),
    "shape": ("shape", "{:.2f}"),
    "motion": ("motion", "{:.2f}"),
    "overlap": ("overlap", "{:.2f}"),
    "first_quarter": ("all right, first quarter", "{:.2f}"),
    "last_quarter": ("last quarter", "{:.2f}"),
    "flicker": ("flicker at joints, median", "{:.2f}"),
    "flicker_90": ("9 in 10 below", "{:.2f}"),
    "between": ("between joints", "{:.2f}"),
    "between_90": ("9 in 10 below", "{:.2f}"),
    "leaps_at_joints": ("leaps per joint", "{:.2f}"),
    "leaps_elsewhere": ("leaps per other latent frame", "{:.3f}"),
    "wander": ("wander, px", "{:.0f}"),
}


def table(result: dict[str, Any]) -> str:
    """The configurations, a row each, as Markdown."""
    lines = [_row(["", "videos", *(title for title, _ in COLUMNS.values())]), _row(["---"] * (2 + len(COLUMNS)))]
    names = [c.name for c in configurations() if result["videos"].get(c.name)]
    for name in names:
        videos = list(result["videos"][name].values())
        figures = summary(videos)
        cells = ["" if figures[key] is None else form.format(figures[key]) for key, (_, form) in COLUMNS.items()]
        lines.append(_row([name, len(videos), *cells]))
    return "\n".join(lines)


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
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 0], help="those on the sheet, by number")
    arguments = parser.parse_args()
    found = json.loads(arguments.videos.read_text())
    fill(arguments.doc, "table", table(found))
    asked = questions(1 + max(arguments.prompts))
    shown = [(name, asked[number].seed) for number in arguments.prompts for name in SHEET]
    save_sheet(found, arguments.clips, shown, arguments.sheet)
