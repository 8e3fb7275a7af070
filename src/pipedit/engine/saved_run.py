"""A run that can be gone on with: what its folder (--checkpoint DIR) holds, and what of that counts.

request.json                  what was asked for, and with what it is made: written first, and never changed
frames-000000-000032.mkv      finished frames without loss, from the first to the last, a file for each stretch between
                              two snapshots
120/                          the snapshot after 120 operations: a file of each rank (see core.snapshots), and last
                              complete.json, with which it counts; the one before is then removed

One process at a time writes to it. Whatever kills that leaves parts that do not count, and the next one removes them.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pipedit.core.errors import InvalidRequestError, SnapshotError
from pipedit.core.request import FIELD_NAMES, VideoRequest
from pipedit.core.snapshots import Saving, Snapshot, rank_file, sync_folder
from pipedit.core.staging import folder_problems, name_problems, text_problems
from pipedit.engine.settings import EngineSettings
from pipedit.media import ClipFormat, Frames, LosslessWriter, stream_frames

DEFAULT_EVERY = 10  # passes over the blocks in flight
_RECORD, _COMPLETE, _LOCK = "request.json", "complete.json", ".lock"
_FORMAT = 1
_FRAMES = re.compile(r"frames-(\d+)-(\d+)\.mkv")
_OURS = re.compile(r"\d+|frames-.*\.mkv|\.pipedit-.*\.partial")  # what may be removed, unless it counts
_FPS = 16.0  # nobody plays these files


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What was asked for: a complete request with its seed, and settings that leave nothing open. `output`: where the
    video goes, as it was said; None: it was not."""

    request: VideoRequest
    settings: EngineSettings
    every: int
    output: str | None = None

    def to_json(self, made_with: Mapping[str, str]) -> dict[str, Any]:
        return {
            "pipedit_run": _FORMAT,
            "request": dataclasses.asdict(self.request),
            "settings": dataclasses.asdict(self.settings),
            "every": self.every,
            "output": self.output,
            "made_with": dict(made_with),
        }


class SavedRun:
    """`claim` it before anything runs. It is then the recorder of its request (see Driver), whose work gets `saving`
    and `snapshot`; `frames` are those that came before."""

    def __init__(self, folder: Path, record: RunRecord) -> None:
        self.folder, self.record = folder, record
        self.snapshot: Snapshot | None = None  # to go on with
        self.num_frames = 0  # that were kept for it
        self._made_with: dict[str, str] | None = None  # of one that goes on
        self._writer: LosslessWriter | None = None
        self._kept = 0

    @classmethod
    def load(cls, folder: str) -> Self:
        """One that was begun before. Raises InvalidRequestError where the folder holds none that is whole."""
        with _telling(folder):
            content = _read_json(Path(folder) / _RECORD)
            if content.get("pipedit_run") != _FORMAT:
                raise InvalidRequestError([f"{folder} was written by another version of pipedit; use that one"])
            run = cls(Path(folder), _record_of(content))
            run._made_with = {str(name): str(value) for name, value in content["made_with"].items()}
            run._find_snapshot()
        return run

    @property
    def goes_on(self) -> bool:
        """Whether it was begun before."""
        return self._made_with is not None

    @property
    def saving(self) -> Saving:
        return Saving(folder=str(self.folder.resolve()), every=self.record.every)

    def frames(self) -> Iterator[Frames]:
        """Those that were kept, in order. Raises SnapshotError where they are damaged."""
        for file, count in self._spans(self.num_frames):
            came = 0
            try:
                for piece in stream_frames(file):
                    came += len(piece)
                    yield piece
            except InvalidRequestError as error:
                raise SnapshotError(str(error)) from error
            if came != count:
                raise SnapshotError(f"{file} is damaged: it holds {came} frames instead of {count}")

    @contextlib.contextmanager
    def claim(self, made_with: Mapping[str, str]) -> Iterator[None]:
        """Inside, the folder is this process's own. `made_with`: what the result depends on besides the request and
        the settings, in words. Raises InvalidRequestError where the folder cannot be written to, is somebody else's, or
        where something differs from what the run was begun with."""
        with contextlib.ExitStack() as endings:
            with self._writing():
                self.folder.mkdir(exist_ok=True)
                endings.enter_context(_locked(self.folder))
                endings.callback(self.close)
                if self._made_with is None:
                    self._begin(made_with)
                else:
                    self._go_on(self._made_with, made_with)
            yield

    def close(self) -> None:
        """Frames since the last snapshot do not count."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.abort()

    # -- as a recorder (see Driver) -----------------------------------------------------------------------------

    def keep(self, frames: Frames) -> None:
        with self._writing():
            if self._writer is None:
                _, height, width, _ = frames.shape
                clip = ClipFormat(width=width, height=height, fps=_FPS)
                name = str(self.folder / f"frames-{self._kept:06}.mkv")
                self._writer = LosslessWriter(name, clip, None, replace=True, series=None)
            self._writer.write(frames)

    def complete(self, snapshot: Snapshot) -> None:
        with self._writing():
            for rank, size in snapshot.num_bytes.items():  # workers of other machines may have written elsewhere
                _check_size(rank_file(Path(snapshot.folder), rank), size)
            self._end_span()
            content = {**dataclasses.asdict(snapshot), "num_frames": self._kept}
            _write_json(Path(snapshot.folder) / _COMPLETE, content)
            sync_folder(self.folder)
            self._remove_all_but(Path(snapshot.folder).name)

    def _end_span(self) -> None:
        """The frames since the last snapshot get their final name."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
            stop = self._kept + writer.num_written
            os.replace(writer.target, self.folder / f"frames-{self._kept:06}-{stop - 1:06}.mkv")
            self._kept = stop

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SnapshotError(f"the checkpoint in {self.folder} could not be written: {error}") from error

    # -- its beginning ------------------------------------------------------------------------------------------

    def _begin(self, made_with: Mapping[str, str]) -> None:
        if problems := new_folder_problems(str(self.folder)):  # again: others may have been quicker
            raise InvalidRequestError(problems)
        _write_json(self.folder / _RECORD, self.record.to_json(made_with))

    def _go_on(self, before: Mapping[str, str], now: Mapping[str, str]) -> None:
        if differences := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            raise InvalidRequestError(
                [
                    f"the checkpoint in {self.folder} was made with {name} {before.get(name)}, and here it is "
                    f"{now.get(name)}: the rest would not fit"
                    for name in differences
                ]
            )
        self._find_snapshot()  # again: others may have gone on with it in the meantime
        self._kept = self.num_frames
        self._remove_all_but(None if self.snapshot is None else Path(self.snapshot.folder).name)

    def _find_snapshot(self) -> None:
        """The newest one that is complete. Raises SnapshotError where parts of that are missing."""
        numbers = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
        for at in sorted(numbers, reverse=True):
            folder = self.folder / str(at)
            if not (folder / _COMPLETE).is_file():
                continue
            content = _read_json(folder / _COMPLETE)
            num_bytes = {int(rank): int(size) for rank, size in content["num_bytes"].items()}
            for rank, size in num_bytes.items():
                _check_size(rank_file(folder, rank), size)
            self.num_frames = int(content["num_frames"])
            self._spans(self.num_frames)
            self.snapshot = Snapshot(
                folder=str(folder.resolve()), at=at, decoded=int(content["decoded"]), num_bytes=num_bytes
            )
            return
        self.snapshot, self.num_frames = None, 0

    def _spans(self, num_frames: int) -> list[tuple[Path, int]]:
        """The files of the first frames, and how many are in each. Raises SnapshotError where there is a gap."""
        found = {}
        for path in self.folder.iterdir():
            if (match := _FRAMES.fullmatch(path.name)) is not None:
                found[int(match[1])] = (path, int(match[2]) + 1 - int(match[1]))
        spans, came = [], 0
        while came < num_frames:
            if came not in found:
                raise SnapshotError(f"the file of frame {came} is missing in {self.folder}")
            spans.append(found[came])
            came += found[came][1]
        return spans

    def _remove_all_but(self, snapshot: str | None) -> None:
        """What does not count, and has a name of ours."""
        counting = {path.name for path, _ in self._spans(self._kept)} | {snapshot}
        for path in list(self.folder.iterdir()):
            if path.name not in counting and _OURS.fullmatch(path.name):
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)


def new_folder_problems(folder: str) -> list[str]:
    """Why no run can be begun in the folder, a sentence each."""
    if found := text_problems(folder):
        return found
    path = Path(folder)
    if not os.path.lexists(path):
        return name_problems(path) or folder_problems(path.parent)
    if found := folder_problems(path):
        return found
    names = {entry.name for entry in path.iterdir()} - {_LOCK}
    if _RECORD in names:
        return [f"{folder} holds a run already: go on with it by --resume {folder}, or take another folder"]
    return [f"{folder} is not empty; take a new folder for the checkpoint"] if names else []


def _record_of(content: dict[str, Any]) -> RunRecord:
    request, settings = content["request"], content["settings"]
    unknown = {*request} - {*FIELD_NAMES} | {*settings} - {field.name for field in dataclasses.fields(EngineSettings)}
    if unknown:
        raise ValueError(f"unknown settings {', '.join(sorted(unknown))}")
    return RunRecord(
        request=VideoRequest(**request),
        settings=EngineSettings(**settings),
        every=int(content["every"]),
        output=content["output"],
    )


@contextlib.contextmanager
def _telling(folder: str) -> Iterator[None]:
    """Whatever is wrong with files of ours becomes an error of who named the folder."""
    try:
        yield
    except FileNotFoundError as error:
        raise InvalidRequestError([f"{folder} holds no run to go on with: {error.filename} is missing"]) from error
    except SnapshotError as error:
        raise InvalidRequestError([str(error)]) from error
    except InvalidRequestError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRequestError([f"{folder} holds no run to go on with, or a damaged one ({error})"]) from error


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Other processes are kept out, until this one ends however it does."""
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidRequestError([f"another process is writing to {folder}; wait until it has ended"]) from error
        yield


def _check_size(file: Path, size: int) -> None:
    if not file.is_file():
        raise SnapshotError(f"{file} is missing; the folder must be the same on all machines, and whole")
    if file.stat().st_size != size:
        raise SnapshotError(f"{file} is torn: it has {file.stat().st_size} bytes instead of {size}")


def _read_json(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{file.name} holds no object")
    return content


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Whole or not there, and on disk when this returns."""
    partial = file.with_name(f".pipedit-{file.name}.partial")
    with partial.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2, allow_nan=False)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)
    sync_folder(file.parent)
