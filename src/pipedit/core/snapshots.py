"""What a saved run consists of (--checkpoint DIR): snapshots, each a consistent cut through a run on several ranks.

A snapshot is a folder named by the number of operations before it, in which each rank has a file. It counts once its
last file, written by the controller, is there. Knows no tensors and no models.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saving:
    """Snapshots of a run go into `folder`, one each time that as many operations are done as make `every` passes over
    the blocks in flight."""

    folder: str
    every: int

    def path(self, at: int) -> str:
        """The folder of the snapshot after so many operations."""
        return str(Path(self.folder) / str(at))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A cut that lies in `folder`: all stages had run `at` operations and none of them more, and `decoded` blocks had
    been decoded. `num_bytes`: of each rank's file."""

    folder: str
    at: int
    decoded: int
    num_bytes: Mapping[int, int] = dataclasses.field(default_factory=dict)


def rank_file(folder: Path, rank: int) -> Path:
    """The rank's file of the snapshot in `folder`."""
    return folder / f"rank-{rank}.safetensors"


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a loss of power; files have to be synced themselves."""
    if os.name != "posix":
        return  # folders cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
