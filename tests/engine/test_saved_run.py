"""Runs that are saved, broken off and gone on with: the frames of one that nobody disturbed. What does not fit is
refused. Workers are in this process; processes that are killed are in tests/executor/test_kill_and_resume.py."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipedit import Engine, VideoRequest
from pipedit.core.errors import InvalidRequestError, SnapshotError
from pipedit.core.snapshots import Snapshot
from pipedit.engine.saved_run import RunRecord, SavedRun
from pipedit.engine.updates import Cancelled, Checkpointed, Failed, Finished, Frames, Update
from tests import tiny_pipelines
from tests.executor.thread_workers import threaded

Folder = Callable[[str], Path]
Video = np.ndarray[Any, np.dtype[np.uint8]]
CUT: dict[str, Any] = {"strategy": "dualparal", "block_size": 2, "context": 1}


def request_of(kind: str = "wan", **changes: Any) -> VideoRequest:
    settings = {**tiny_pipelines.QUICK_SETTINGS[kind], "num_frames": 29, "prompt": "a red ball", "seed": 3}
    return VideoRequest(**{**settings, **changes})


def engine_of(folder: Path, **settings: Any) -> Engine:
    return Engine(folder, device="cpu", **{**CUT, **settings})


def new_run(engine: Engine, path: Path, request: VideoRequest | None = None, every: int = 1) -> SavedRun:
    (complete,) = engine.prepare([request or request_of()])
    return SavedRun(path, RunRecord(request=complete, settings=engine.settings, every=every))


@dataclasses.dataclass(kw_only=True)
class Life:
    """What became of a run: the frames that were told of, those that were kept before first."""

    frames: list[Video]
    snapshots: list[Checkpointed]
    end: Update | None

    @property
    def video(self) -> Video:
        return np.concatenate(self.frames)


def live(engine: Engine, run: SavedRun, *, snapshots: int | None = None) -> Life:
    """Until the end, or until so many snapshots are there: then it is broken off without another word."""
    engine.prepare([run.record.request])
    with engine.claim(run):
        life = Life(frames=list(run.frames()), snapshots=[], end=None)
        first = sum(map(len, life.frames))
        assert first == run.num_frames
        engine.submit(run.record.request, run=run)
        for update in engine.updates():
            match update:
                case Frames():
                    assert update.first == first
                    first += len(update.frames)
                    life.frames.append(update.frames)
                case Checkpointed():
                    life.snapshots.append(update)
                    if len(life.snapshots) == snapshots:
                        return life
                case Finished() | Failed() | Cancelled():
                    life.end = update
    return life


@pytest.fixture(scope="module")
def whole(tiny_folder: Folder) -> Callable[[str], Video]:
    made: dict[str, Video] = {}

    def of(kind: str) -> Video:
        if kind not in made:
            with engine_of(tiny_folder(kind)) as engine:
                (video,) = engine.generate(request_of(kind))
            made[kind] = video.frames
        return made[kind]

    return of


@pytest.mark.parametrize("kind", ["wan", "wan22", "hunyuan"])
def test_broken_off_again_and_again_it_makes_the_same_frames(
    kind: str, tiny_folder: Folder, whole: Callable[[str], Video], tmp_path: Path
) -> None:
    with engine_of(tiny_folder(kind)) as engine:
        run = new_run(engine, tmp_path / "run", request_of(kind))
        life = live(engine, run, snapshots=2)
    assert [each.operations for each in life.snapshots] == sorted({each.operations for each in life.snapshots})
    for snapshots in (1, 1, None):
        run = SavedRun.load(str(tmp_path / "run"))
        assert run.goes_on and run.snapshot is not None and run.snapshot.at > 0
        with engine_of(tiny_folder(kind)) as engine:
            life = live(engine, run, snapshots=snapshots)
        if life.end is not None:
            break
    assert isinstance(life.end, Finished)
    assert np.array_equal(life.video, whole(kind))
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert len([name for name in names if name.isdecimal()]) == 1, "older snapshots are removed"
    assert not [name for name in names if "partial" in name]


def test_a_run_that_is_saved_makes_the_same_frames(
    tiny_folder: Folder, whole: Callable[[str], Video], tmp_path: Path
) -> None:
    with engine_of(tiny_folder("wan")) as engine:
        life = live(engine, new_run(engine, tmp_path / "run"))
    assert np.array_equal(life.video, whole("wan")) and life.snapshots
    assert isinstance(life.end, Finished) and life.end.seconds["save"] > 0


def test_several_workers(tiny_folder: Folder, tmp_path: Path) -> None:
    ways = {"denoise_workers": 2, "decode_workers": 1}
    with threaded(tiny_folder("wan"), **CUT, **ways) as (engine, _):
        (video,) = engine.generate(request_of())
        run = new_run(engine, tmp_path / "run")
        life = live(engine, run, snapshots=1)
    assert run.snapshot is None, "it tells with what it began"
    assert life.end is None
    with threaded(tiny_folder("wan"), **CUT, **ways) as (engine, _):
        life = live(engine, SavedRun.load(str(tmp_path / "run")))
    assert np.array_equal(life.video, video.frames)


def test_before_the_first_snapshot_it_begins_anew(
    tiny_folder: Folder, whole: Callable[[str], Video], tmp_path: Path
) -> None:
    with engine_of(tiny_folder("wan")) as engine:
        run = new_run(engine, tmp_path / "run", every=100)
        with engine.claim(run):
            pass
    run = SavedRun.load(str(tmp_path / "run"))
    assert run.snapshot is None and run.num_frames == 0
    with engine_of(tiny_folder("wan")) as engine:
        assert np.array_equal(live(engine, run).video, whole("wan"))


# -- what kill -9 leaves behind -------------------------------------------------------------------------------------


def test_killed_before_any_file_operation(tiny_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each of them a picture is taken of what lies on the disk, which is what would be left."""
    run, pictures, request = tmp_path / "run", list[Path](), request_of(num_frames=17)

    def taking_pictures(operation: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **named: Any) -> Any:
            pictures.append(tmp_path / str(len(pictures)))
            shutil.copytree(run, pictures[-1])
            return operation(*args, **named)

        return replaced

    with engine_of(tiny_folder("wan")) as engine:
        (video,) = engine.generate(request)
        with monkeypatch.context() as patch:
            for module, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (os, "unlink")):
                patch.setattr(module, name, taking_pictures(getattr(module, name)))
            life = live(engine, new_run(engine, run, request))
        assert len(life.snapshots) == 2 and len(pictures) > 10
        begun = [picture for picture in pictures if (picture / "request.json").exists()]
        snapshots = set()
        for picture in begun:
            again = SavedRun.load(str(picture))
            snapshots.add(None if again.snapshot is None else again.snapshot.at)
            assert np.array_equal(live(engine, again).video, video.frames), picture
        assert snapshots == {None, 3, 6}


@pytest.fixture(scope="module")
def broken_off(tiny_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with frames and a snapshot. Read only."""
    path = tmp_path_factory.mktemp("saved") / "run"
    with engine_of(tiny_folder("wan")) as engine:
        live(engine, new_run(engine, path), snapshots=4)
    return path


@pytest.fixture
def saved(broken_off: Path, tmp_path: Path) -> Path:
    """The same, to be spoiled."""
    shutil.copytree(broken_off, tmp_path / "run")
    return tmp_path / "run"


def snapshot_in(run: Path) -> Path:
    (folder,) = [path for path in run.iterdir() if path.name.isdecimal()]
    return folder


def test_what_does_not_count_is_removed(saved: Path, tiny_folder: Folder, whole: Callable[[str], Video]) -> None:
    count = SavedRun.load(str(saved)).num_frames
    assert count > 0
    later, partial = saved / "999", saved / ".pipedit-abc.partial"
    for folder in (later, partial):
        folder.mkdir()
        (folder / "rank-0.safetensors").write_bytes(b"half of it")
    last = next(path for path in saved.iterdir() if path.name.endswith(f"{count - 1:06}.mkv"))
    shutil.copy(last, saved / f"frames-{count:06}-{count + 7:06}.mkv")
    shutil.copy(last, saved / f"frames-{count:06}.mkv")
    (saved / "notes.txt").write_text("mine")
    with engine_of(tiny_folder("wan")) as engine:
        run = SavedRun.load(str(saved))
        with engine.claim(run):
            assert run.num_frames == count
            assert not later.exists() and not partial.exists()
            assert [path for path in saved.iterdir() if path.name.startswith(f"frames-{count:06}")] == []
        assert np.array_equal(live(engine, SavedRun.load(str(saved))).video, whole("wan"))
    assert (saved / "notes.txt").read_text() == "mine"


def test_torn_and_missing_parts_are_refused(saved: Path) -> None:
    folder = snapshot_in(saved)
    rank, spans = folder / "rank-0.safetensors", sorted(saved.glob("frames-*"))
    content = rank.read_bytes()
    rank.write_bytes(content[:-1])
    with pytest.raises(InvalidRequestError, match=r"rank-0.safetensors is torn: it has \d+ bytes instead of \d+"):
        SavedRun.load(str(saved))
    rank.unlink()
    with pytest.raises(InvalidRequestError, match=r"rank-0.safetensors is missing"):
        SavedRun.load(str(saved))
    rank.write_bytes(content)
    spans[0].rename(saved / "elsewhere.mkv")
    with pytest.raises(InvalidRequestError, match="the file of frame 0 is missing"):
        SavedRun.load(str(saved))
    (saved / "elsewhere.mkv").rename(spans[0])
    (folder / "complete.json").write_text('{"at": 3')
    with pytest.raises(InvalidRequestError, match="a damaged one"):
        SavedRun.load(str(saved))


def test_frames_that_are_damaged_are_told(saved: Path) -> None:
    run, (span, *_) = SavedRun.load(str(saved)), sorted(saved.glob("frames-*"))
    span.write_bytes(span.read_bytes()[:600])
    with pytest.raises(SnapshotError, match=f"{span.name} "):
        list(run.frames())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "holds no run to go on with: .*request.json is missing"),
        ("{", "a damaged one"),
        ("[]", "a damaged one"),
        ("{}", "another version of pipedit"),
        ('{"pipedit_run": 2}', "another version of pipedit"),
        ('{"pipedit_run": 1}', "a damaged one"),
    ],
)
def test_folders_that_hold_no_run(content: str | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "request.json").write_text(content)
    with pytest.raises(InvalidRequestError, match=problem):
        SavedRun.load(str(tmp_path))


def test_settings_of_other_versions_are_refused(saved: Path) -> None:
    record = json.loads((saved / "request.json").read_text())
    record["settings"]["warp"] = 9
    (saved / "request.json").write_text(json.dumps(record))
    with pytest.raises(InvalidRequestError, match="unknown settings warp"):
        SavedRun.load(str(saved))


# -- what does not fit ----------------------------------------------------------------------------------------------


def refusal(run: SavedRun, engine: Engine) -> str:
    with pytest.raises(InvalidRequestError) as error, engine.claim(run):
        raise AssertionError("it was taken")
    return str(error.value)


@pytest.mark.parametrize("name", ["pipedit", "torch", "diffusers", "transformers", "device", "data types"])
def test_other_circumstances_are_refused(name: str, saved: Path, tiny_folder: Folder) -> None:
    record = json.loads((saved / "request.json").read_text())
    record["made_with"][name] = "0.0.1"
    (saved / "request.json").write_text(json.dumps(record))
    with engine_of(tiny_folder("wan")) as engine:
        said = refusal(SavedRun.load(str(saved)), engine)
    assert f"was made with {name} 0.0.1, and here it is" in said


def test_another_model_is_refused(saved: Path, tiny_folder: Folder, tmp_path: Path) -> None:
    """Of the same name: its weights have changed."""
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("wan"), model)
    weights = next((model / "transformer").glob("*.safetensors"))
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1\2\3\4")
    with engine_of(model) as engine:
        assert "was made with model files" in refusal(SavedRun.load(str(saved)), engine)
    with engine_of(tiny_folder("hunyuan")) as engine:
        assert "was made with model files" in refusal(SavedRun.load(str(saved)), engine)


def test_other_strategies_cannot_be_saved(tmp_path: Path, tiny_folder: Folder) -> None:
    with Engine(tiny_folder("wan"), device="cpu") as engine:
        assert "needs --strategy dualparal" in refusal(new_run(engine, tmp_path / "run"), engine)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_cannot_have_it(saved: Path, tiny_folder: Folder) -> None:
    with engine_of(tiny_folder("wan")) as engine, engine.claim(SavedRun.load(str(saved))):
        assert "another process is writing" in refusal(SavedRun.load(str(saved)), engine)


def test_a_new_run_needs_an_empty_folder(saved: Path, tiny_folder: Folder, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").touch()
    (tmp_path / "file").touch()
    with engine_of(tiny_folder("wan")) as engine:
        assert f"go on with it by --resume {saved}" in refusal(new_run(engine, saved), engine)
        assert "is not empty" in refusal(new_run(engine, tmp_path / "full"), engine)
    assert (tmp_path / "full" / "thesis.txt").exists()


# -- disks that fail ------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(tiny_folder: Folder) -> Iterator[Engine]:
    with engine_of(tiny_folder("wan")) as engine:
        yield engine


def test_what_cannot_be_kept_ends_the_run_and_what_was_saved_stays(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Callable[[str], Video]
) -> None:
    complete, calls = SavedRun.complete, []

    def full(run: SavedRun, snapshot: Snapshot) -> None:
        calls.append(snapshot)
        if len(calls) == 3:
            raise SnapshotError("No space left on device")
        complete(run, snapshot)

    with monkeypatch.context() as patch:
        patch.setattr(SavedRun, "complete", full)
        life = live(engine, new_run(engine, tmp_path / "run"))
    assert isinstance(life.end, Failed) and "No space left" in str(life.end.error)
    assert len(life.snapshots) == 2 and len(calls) == 3
    run = SavedRun.load(str(tmp_path / "run"))
    assert run.snapshot is not None and run.snapshot.at == calls[1].at
    assert np.array_equal(live(engine, run).video, whole("wan"))


def test_files_that_lie_on_another_machine_are_missed(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = SavedRun.complete

    def lost(run: SavedRun, snapshot: Snapshot) -> None:
        (Path(snapshot.folder) / "rank-0.safetensors").unlink()
        complete(run, snapshot)

    monkeypatch.setattr(SavedRun, "complete", lost)
    life = live(engine, new_run(engine, tmp_path / "run"))
    assert isinstance(life.end, Failed) and "must be the same on all machines" in str(life.end.error)
    assert SavedRun.load(str(tmp_path / "run")).snapshot is None


def test_a_worker_that_cannot_write_fails_the_run(engine: Engine, tmp_path: Path) -> None:
    run = new_run(engine, tmp_path / "run")
    with engine.claim(run):
        engine.submit(run.record.request, run=run)
        (tmp_path / "run" / "3").touch()  # where the first snapshot's folder is to be
        *_, last = engine.updates()
    assert isinstance(last, Failed) and "could not be written" in str(last.error)
