"""Files written beside their final place and moved there once they are whole. Knows nothing of what is in them."""

import os
import secrets
import shutil
import weakref
from pathlib import Path

MAX_NAME_BYTES = 255  # what every common file system takes


class Staging:
    """A hidden folder beside the final place. `publish` moves its files out of it, `discard` removes it.

    It also vanishes when the object is dropped or the interpreter exits, so that an interrupted run leaves nothing.
    `folder` is where the files end up; it may be missing while its parent exists, then it is made by `publish`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        beside = folder if folder.is_dir() else folder.parent
        self._hidden = beside / f".pipedit-{secrets.token_hex(6)}.partial"
        # Registered before the folder exists: an interrupt between the two lines leaves nothing behind.
        self._remove = weakref.finalize(self, shutil.rmtree, self._hidden, ignore_errors=True)
        self._hidden.mkdir()
        self._names: list[str] = []

    def path(self, name: str) -> Path:
        """Where to write what shall become `folder / name`."""
        assert name not in self._names, f"{name} is already staged"
        self._names.append(name)
        return self._hidden / name

    def publish(self) -> tuple[Path, ...]:
        """Moves every file to its final place, replacing what was there. If that fails, none of them stays."""
        made_folder = not self._folder.is_dir()
        moved: list[Path] = []
        try:
            self._folder.mkdir(exist_ok=True)
            for name in self._names:
                os.replace(self._hidden / name, self._folder / name)
                moved.append(self._folder / name)
        except BaseException:
            for path in moved:
                path.unlink(missing_ok=True)
            if made_folder and self._folder.is_dir():
                self._folder.rmdir()
            raise
        finally:
            self.discard()
        return tuple(moved)

    def discard(self) -> None:
        """Removes everything that was not published. Legal at any time, and more than once."""
        self._remove()


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
    if os.path.isdir(path):
        return [f"{path} is a folder; name a file in it"]
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        return [f"the file name {path.name[:40]}... is too long; at most {MAX_NAME_BYTES} bytes are allowed"]
    return folder_problems(path.parent)


def folder_problems(folder: Path) -> list[str]:
    """Why no file can be made in `folder`, in the user's words."""
    if not os.path.isdir(folder):
        if os.path.exists(folder):
            return [f"{folder} is a file, so nothing can be written into it; choose another folder"]
        return [f"the folder {folder} does not exist; create it or choose another"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"the folder {folder} is not writable; change its permissions or choose another"]
    return []
