"""Which file endings can be written, what can be wrong with a path, and which writer a path gets.

clip.mp4               H.264
clip.gif               animated GIF
clip.npy               raw uint8 array [F, H, W, 3], settings in clip.npy.json
frames/f_%04d.png      PNG frames f_0000.png, f_0001.png, ... in a folder that exists
clip.png               PNG frames clip_0000.png, clip_0001.png, ...
frames/                PNG frames frame_0000.png, ... in a folder that is made if its parent exists
"""

import os
from pathlib import Path

from pipedit.core.errors import InvalidRequestError
from pipedit.core.staging import folder_problems, name_problems, target_problems, text_problems
from pipedit.media.encoded import GifWriter, Mp4Writer, gif_problems, mp4_problems
from pipedit.media.frame_writer import ClipFormat, FrameWriter
from pipedit.media.lossless import NpyWriter, PngWriter
from pipedit.media.metadata import VideoMetadata
from pipedit.media.names import FrameNames, counters_in, files_of, is_frames

ENDINGS = (".mp4", ".gif", ".npy", ".png")


def check_output(
    path: str | os.PathLike[str],
    *,
    width: int | None = None,
    height: int | None = None,
    fps: float | None = None,
    num_frames: int | None = None,
) -> list[str]:
    """Why a clip cannot be written to `path`, one sentence each. Raises nothing, writes nothing.

    The more is known of the clip, the more is checked.
    """
    text = os.fspath(path)
    if not text:
        return [f"no output is named; give a file that ends in {', '.join(ENDINGS)}"]
    if found := text_problems(text):
        return found
    if text.endswith("/"):
        return _frame_folder_problems(text, num_frames)
    ending = Path(text).suffix.lower()
    if os.path.isdir(text):
        return [f"{text} is a folder; write {text}/ for PNG frames in it, or name a file such as {text}/video.mp4"]
    problems = []
    if ending not in ENDINGS:
        allowed = ", ".join(ENDINGS)
        said = f"the ending {ending} is not known" if ending else "it has no ending"
        # A path object forgets a slash at the end, so that it cannot name a folder for frames.
        more = "" if ending or isinstance(path, str) else " given as text, for a Path drops the slash"
        problems.append(f"cannot write {text}: {said}; use {allowed}, or a folder/{more}")
    problems += _file_problems(text, num_frames)
    if ending == ".mp4":
        problems += mp4_problems(width, height, fps)
    elif ending == ".gif":
        problems += gif_problems(fps)
    elif ending == ".png":
        problems += _frame_problems(text, num_frames)
    return problems


def open_writer(
    path: str | os.PathLike[str],
    *,
    width: int,
    height: int,
    fps: float,
    metadata: VideoMetadata | None = None,
    num_frames: int | None = None,
    replace: bool = True,
    series: str | None = None,
) -> FrameWriter:
    """The writer for a path. Nothing is written before the first frame; `num_frames`, if given, is enforced at close.

    `replace` and `series` say what becomes of a file that is in the way when the clip is whole (see `FrameWriter`).
    Raises InvalidRequestError with everything that `check_output` finds.
    """
    problems = check_output(path, width=width, height=height, fps=fps, num_frames=num_frames)
    if problems:
        raise InvalidRequestError(problems)
    text = os.fspath(path)
    clip = ClipFormat(width=width, height=height, fps=fps, num_frames=num_frames)
    match Path(text).suffix.lower():
        case ".mp4" if not text.endswith("/"):
            return Mp4Writer(text, clip, metadata, replace=replace, series=series)
        case ".gif" if not text.endswith("/"):
            return GifWriter(text, clip, metadata, replace=replace, series=series)
        case ".npy" if not text.endswith("/"):
            return NpyWriter(text, clip, metadata, replace=replace, series=series)
        case _:
            return PngWriter(text, clip, metadata, replace=replace, series=series)


def _frame_folder_problems(text: str, num_frames: int | None) -> list[str]:
    folder = Path(text)
    if os.path.exists(folder):
        return folder_problems(folder) or _frame_problems(text, num_frames)
    return name_problems(folder) or folder_problems(folder.parent)


def _file_problems(text: str, num_frames: int | None) -> list[str]:
    """What is wrong with the names of the files that are truly written: they are longer than the one that was given."""
    files = files_of(text, 1)
    if is_frames(text):
        names = FrameNames.of(text)
        files = [names.folder / names.name(max(num_frames or 1, 1) - 1)]  # no other one has a longer name
    return list(dict.fromkeys(problem for file in files for problem in target_problems(file)))


def _frame_problems(text: str, num_frames: int | None) -> list[str]:
    if counters_in(Path(text).name) > 1:
        return [f"{text} has more than one frame counter; keep one, such as frame_%04d.png"]
    return FrameNames.of(text).problems(num_frames)
