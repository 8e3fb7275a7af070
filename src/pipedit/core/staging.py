"""Files written beside their final place and moved there once they are whole. Knows nothing of what is in them."""

import contextlib
import os
import secrets
import shutil
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

MAX_NAME_BYTES = 255  # what every common file system takes


class Staging:
    """A hidden folder beside the final place. `publish` moves its files out of it, `discard` removes it.

    It also vanishes when the object is dropped or the interpreter exits, so that an interrupted run leaves nothing.
    `folder` is where the files end up; it may be missing while its parent exists, then it is made when publishing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        beside = folder if folder.is_dir() else folder.parent
        self._hidden = beside / f".pipedit-{secrets.token_hex(6)}.partial"
        # Registered before the folder exists: an interrupt between the two lines leaves nothing behind.
        self._remove = weakref.finalize(self, shutil.rmtree, self._hidden, ignore_errors=True)
        self._hidden.mkdir()
        self._names: dict[str, None] = {}  # a set in the order of staging

    def path(self, name: str) -> Path:
        """Where to write what shall become `folder / name`."""
        assert name not in self._names, f"{name} is already staged"
        self._names[name] = None
        return self._hidden / name

    def publish(self) -> tuple[Path, ...]:
        """Moves every file to its final place, replacing what was there. If that fails, what was there is back and
        none of ours stays."""
        targets = [self._folder / name for name in self._names]
        old = self._hidden / ".replaced"
        moved: list[Path] = []
        try:
            with _folder_made(self._folder):
                old.mkdir()
                try:
                    for target in targets:
                        if len(targets) > 1:  # one alone is replaced in one step, or not at all
                            _keep(target, old)
                        os.replace(self._hidden / target.name, target)
                        moved.append(target)
                except BaseException:
                    self._restore(targets, moved, old)
                    raise
        finally:
            self.discard()
        return tuple(targets)

    def publish_new(self, places: Mapping[str, Path] | None = None) -> tuple[Path, ...]:
        """Moves every file to its final place, or to the one that `places` gives for its name, and replaces nothing.

        `places` must lie in one folder, on the same file system. Raises FileExistsError where one of them is taken:
        then none of the files is published, and all are still staged, for another try under other names.
        """
        places = places if places is not None else {name: self._folder / name for name in self._names}
        moves = [(self._hidden / name, places[name]) for name in self._names]
        made: list[tuple[Path, Path]] = []
        with _folder_made(moves[0][1].parent):
            try:
                for source, target in moves:
                    _move_new(source, target)
                    made.append((source, target))
            except BaseException:
                for source, target in made:
                    _take_back(source, target)
                raise
        self.discard()
        return tuple(target for _, target in moves)

    def discard(self) -> None:
        """Removes everything that was not published. Legal at any time, and more than once."""
        self._remove()

    def _restore(self, targets: list[Path], moved: list[Path], old: Path) -> None:
        for target in targets:
            try:
                if os.path.lexists(old / target.name):
                    os.replace(old / target.name, target)
                elif target in moved:
                    target.unlink(missing_ok=True)
            except OSError:
                self._remove.detach()  # the hidden folder holds the only copy of somebody's file: it stays


@contextlib.contextmanager
def _folder_made(folder: Path) -> Iterator[None]:
    """Makes the folder where it is missing, and removes it again if the block fails."""
    is_new = not folder.is_dir()
    folder.mkdir(exist_ok=True)
    try:
        yield
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        raise


def _keep(target: Path, folder: Path) -> None:
    """A second name in `folder` for the file at `target`, if there is one; without hard links it is moved there."""
    if os.path.isdir(target) or not os.path.lexists(target):
        return
    try:
        os.link(target, folder / target.name, follow_symlinks=False)
    except OSError:  # a file system without hard links
        os.rename(target, folder / target.name)


def _move_new(source: Path, target: Path) -> None:
    """Puts a file where none is, or raises FileExistsError. A hard link does it in one step and leaves `source`."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: an empty file of ours holds the place
        with target.open("x"):
            pass
        try:
            os.replace(source, target)
        except BaseException:
            target.unlink(missing_ok=True)
            raise


def _take_back(source: Path, target: Path) -> None:
    if source.exists():
        target.unlink(missing_ok=True)
    else:
        os.replace(target, source)


def write_text_whole(path: Path, text: str) -> None:
    """Writes a UTF-8 file that is either whole or not there."""
    staging = Staging(path.parent)
    try:
        staging.path(path.name).write_text(text, encoding="utf-8")
        staging.publish()
    finally:
        staging.discard()


def target_problems(path: Path) -> list[str]:
    """Why no file can be written at `path`, in the user's words. Raises nothing and writes nothing."""
    if found := text_problems(str(path)):
        return found
    if os.path.isdir(path):
        return [f"{path} is a folder; name a file in it"]
    return name_problems(path) or folder_problems(path.parent)


def text_problems(path: str) -> list[str]:
    """Why text cannot be the name of a file."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        shown = path.encode("utf-8", "backslashreplace").decode()
        return [f"the file name {shown} is not valid UTF-8 text; choose another one"]
    if "\0" in path:
        shown = path.replace("\0", "\\0")
        return [f"the file name {shown} holds a NUL character, which no file name can; choose another one"]
    return []


def name_problems(path: Path) -> list[str]:
    """Why a file system would not take the last part of `path`."""
    size = len(os.fsencode(path.name))
    if size <= MAX_NAME_BYTES:
        return []
    shown = f"{path.name[:30]}...{path.name[-14:]}"
    return [f"the file name {shown} is too long with {size} bytes; at most {MAX_NAME_BYTES} are allowed"]


def folder_problems(folder: Path) -> list[str]:
    """Why no file can be made in `folder`, in the user's words."""
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            return [f"{folder} is a file, so nothing can be written into it; choose another folder"]
        return [f"the folder {folder} does not exist; create it or choose another"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"the folder {folder} is not writable; change its permissions or choose another"]
    return []
