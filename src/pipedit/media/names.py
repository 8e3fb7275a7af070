"""Which files a name stands for when a clip is written to it. Knows names and the disk, not what files hold."""

import dataclasses
import os
import re
from pathlib import Path

from pipedit.core.staging import name_problems

_COUNTER = re.compile(r"%(?:0(\d))?d")  # %d or %04d


def files_of(path: str, num_frames: int) -> list[Path]:
    """Every file that a clip of so many frames becomes when it is written to `path`."""
    if is_frames(path):
        names = FrameNames.of(path)
        return [names.folder / names.name(index) for index in range(num_frames)]
    target = Path(path)
    return [target, sidecar(target)] if target.suffix.lower() == ".npy" else [target]


def existing_files(path: str) -> list[Path]:
    """Files on the disk that a clip written to `path` would replace, or that would look like part of it."""
    if is_frames(path):
        names = FrameNames.of(path)
        return [names.folder / names.name(index) for index in names.present()]
    return [file for file in files_of(path, 1) if os.path.lexists(file)]


def numbered(path: str, number: int) -> str:
    """`out.mp4` -> `out-2.mp4`, `frames/` -> `frames-2/`. A stem that leaves no room for the number is cut."""
    stem, ending = (path.rstrip("/"), "/") if path.endswith("/") else os.path.splitext(path)
    while True:
        name = f"{stem}-{number}{ending}"
        fits = not any(name_problems(file) for file in (Path(name), *files_of(name, 1)))
        if fits or not os.path.basename(stem):
            return name
        stem = stem[:-1]


def is_frames(path: str) -> bool:
    """Whether `path` stands for PNG frames."""
    return path.endswith("/") or path.lower().endswith(".png")


def sidecar(path: Path) -> Path:
    """Where the metadata of an .npy file lies."""
    return path.with_name(path.name + ".json")


def counters_in(name: str) -> int:
    """How many frame counters such as %04d a file name has."""
    return len(_COUNTER.findall(name))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FrameNames:
    """Names of PNG frames: `folder / f"{before}{index}{after}"` with at least `digits` digits."""

    folder: Path
    before: str
    digits: int
    after: str

    @classmethod
    def of(cls, path: str) -> "FrameNames":
        """`out/` -> out/frame_0000.png; `out/f%03d.png` -> out/f000.png; `x.png` -> x_0000.png.

        A path with two counters takes the last one; `check_output` refuses it.
        """
        if path.endswith("/"):
            return cls(folder=Path(path), before="frame_", digits=4, after=".png")
        target = Path(path)
        counters = list(_COUNTER.finditer(target.name))
        if not counters:
            return cls(folder=target.parent, before=target.stem + "_", digits=4, after=target.suffix)
        start, end = counters[-1].span()
        digits = int(counters[-1][1] or 1)
        return cls(folder=target.parent, before=target.name[:start], digits=digits, after=target.name[end:])

    def name(self, index: int) -> str:
        return f"{self.before}{index:0{self.digits}d}{self.after}"

    def present(self) -> list[int]:
        """Indices of the frames that lie in the folder, in order."""
        if not self.folder.is_dir():
            return []
        pattern = re.compile(re.escape(self.before) + r"(\d+)" + re.escape(self.after))
        matches = (pattern.fullmatch(path.name) for path in self.folder.iterdir())
        indices = sorted(int(match[1]) for match in matches if match)
        return [index for index in indices if (self.folder / self.name(index)).is_file()]

    def problems(self, num_frames: int | None) -> list[str]:
        """Frames of a longer clip would stay and look like the end of this one: refused, not deleted."""
        beyond = [index for index in self.present() if num_frames is not None and index >= num_frames]
        if not beyond:
            return []
        return [
            f"{self.folder} already holds frames of a longer clip, {self.name(beyond[0])} to {self.name(beyond[-1])};"
            " remove them or choose another name"
        ]
