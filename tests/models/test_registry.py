"""From a name to an adapter: folders, aliases, the hub cache, and names that mean nothing."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.engine.intake import check_input
from pipedit.engine.settings import EngineSettings
from pipedit.models.checkpoint import read_header
from pipedit.models.registry import KNOWN_MODELS, fetch_weights, missing_weights, open_model, weight_problems

REVISION = "0123abcd" * 5


def test_a_folder_opens_with_its_family(tiny_folder: Callable[[str], Path]) -> None:
    assert open_model(str(tiny_folder("wan"))).family == "wan"
    assert open_model(str(tiny_folder("hunyuan"))).family == "hunyuan_video"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tinny", "did you mean tiny"),
        ("wan2.1-t2v-1.3", "did you mean wan2.1-t2v-1.3b"),
        ("./no/such/folder", "neither a folder"),
        ("nobody/no-such-model", "could not be downloaded"),
        ("", "neither a folder"),
        ("~nosuch/x", "neither a folder"),
        ("a--b/c", "neither a folder"),
        ("foo/bar.", "neither a folder"),
        ("-foo/bar", "neither a folder"),
        ("foo/b..r", "neither a folder"),
        ("foo/bar.git", "neither a folder"),
        ("foo/" + "x" * 97, "neither a folder"),
        ("x" * 5000, "neither a folder"),
        ("x\0y", "neither a folder"),
        ("\udc80", "neither a folder"),
    ],
)
def test_names_that_mean_nothing_are_refused_with_the_nearest(name: str, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        open_model(name)


def test_other_pipelines_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"holds no model_index\.json"):
        open_model(str(tmp_path))
    (tmp_path / "model.ckpt").write_bytes(b"")
    with pytest.raises(InvalidRequestError, match="pickles can run code"):
        open_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipelin"}))
    with pytest.raises(InvalidRequestError, match="did you mean WanPipeline"):
        open_model(str(tmp_path))
    (tmp_path / "model_index.json").write_text("not json")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        open_model(str(tmp_path))


def test_an_alias_opens_the_hub_cache_without_a_network(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_id = next(model.hub_id for model in KNOWN_MODELS if model.alias == "wan2.1-t2v-1.3b")
    assert hub_id is not None
    make_cache(tmp_path, hub_id, monkeypatch).symlink_to(tiny_folder("wan"))
    adapter = open_model("wan2.1-t2v-1.3b")
    fetch_weights(adapter)
    assert adapter.checkpoint.weights("transformer").files


def test_own_defaults_of_a_folder_override_the_familys(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    for item in tiny_folder("wan").iterdir():
        (tmp_path / item.name).symlink_to(item)
    (tmp_path / "pipedit.json").write_text(json.dumps({"defaults": {"num_frames": 17, "fps": 8}}))
    defaults = open_model(str(tmp_path)).defaults
    assert (defaults.num_frames, defaults.fps, defaults.height) == (17, 8, 480)
    (tmp_path / "pipedit.json").write_text(json.dumps({"defaults": {"frames": 17}}))
    with pytest.raises(CheckpointError, match="unknown defaults: frames"):
        _ = open_model(str(tmp_path)).defaults
    for wrong, said in (([1], "should be a JSON object"), ({"fps": None}, "no value for fps")):
        (tmp_path / "pipedit.json").write_text(json.dumps({"defaults": wrong}))
        with pytest.raises(CheckpointError, match=said):
            _ = open_model(str(tmp_path)).defaults
        assert problems_of(tmp_path) != []


# -- the hub cache ------------------------------------------------------------------------------------------------


def make_cache(root: Path, hub_id: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache that knows one revision of the model. Returns where its snapshot belongs."""
    cache = root / f"models--{hub_id.replace('/', '--')}"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root))
    return cache / "snapshots" / REVISION


def test_a_partly_cached_model_is_downloaded_again(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_cache(tmp_path, "someone/some-model", monkeypatch)
    snapshot.mkdir()
    with pytest.raises(CheckpointError, match="none could be downloaded"):
        open_model("someone/some-model")
    asked = []

    def download(hub_id: str, **options: Any) -> str:
        asked.append((hub_id, options.get("revision")))
        if not options.get("local_files_only"):
            copy = [file for file in tiny_folder("wan").rglob("*") if file.is_file()]
            for file in copy:
                if options["revision"] or file.suffix != ".safetensors":
                    target = snapshot / file.relative_to(tiny_folder("wan"))
                    target.parent.mkdir(exist_ok=True)
                    target.write_bytes(file.read_bytes())
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    adapter = open_model("someone/some-model")
    assert len(missing_weights(adapter)) == 3
    assert weight_problems(adapter) == []  # they can be fetched
    fetch_weights(adapter)
    assert missing_weights(adapter) == []
    assert asked[-1] == ("someone/some-model", REVISION)


def test_weights_that_cannot_be_fetched_are_named(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = make_cache(tmp_path, "someone/some-model", monkeypatch)
    shutil.copytree(tiny_folder("wan"), snapshot)
    (snapshot / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae holds no \*\.safetensors file(.|\n)*check the network"):
        fetch_weights(open_model("someone/some-model"))


# -- incomplete and broken folders --------------------------------------------------------------------------------


@pytest.fixture
def folder_of(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a tiny pipeline that a test may break."""
    return lambda kind: shutil.copytree(tiny_folder(kind), tmp_path / kind)


def problems_of(folder: Path) -> list[str]:
    """As `generate` tells them before it loads anything."""
    checked = check_input(EngineSettings(model=str(folder), device="cpu"), [VideoRequest(prompt="a red ball")])
    return list(checked.problems)


def change_json(file: Path, **changes: Any) -> None:
    """Sets values, or removes them where they are None."""
    content = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


@pytest.mark.parametrize("kind", ["wan", "wan22", "wan_ti2v", "hunyuan"])
def test_a_whole_folder_has_no_problems(kind: str, tiny_folder: Callable[[str], Path]) -> None:
    assert problems_of(tiny_folder(kind)) == []


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("wan", "tokenizer"),
        ("wan", "scheduler"),
        ("wan", "vae"),
        ("wan22", "transformer_2"),
        ("hunyuan", "tokenizer"),
        ("hunyuan", "tokenizer_2"),
        ("hunyuan", "scheduler"),
        ("hunyuan", "text_encoder_2"),
    ],
)
def test_a_missing_part_is_found_before_loading(kind: str, part: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    shutil.rmtree(folder / part)
    found = problems_of(folder)
    assert len(found) == 1
    assert str(folder / part) in found[0]
    assert "the model is incomplete" in found[0]


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_missing_tokenizer_is_not_looked_for_elsewhere(kind: str, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of(kind)
    shutil.rmtree(folder / "tokenizer")
    adapter = open_model(str(folder))
    with pytest.raises(CheckpointError, match="holds no tokenizer"):
        adapter.load_text_stage("cpu", adapter.default_precision("cpu"))


@pytest.mark.parametrize(
    ("kind", "file", "changes", "said"),
    [
        ("wan", "transformer/config.json", {"in_channels": None}, "in_channels is missing"),
        ("wan", "transformer/config.json", {"num_layers": "2"}, "num_layers='2' should be a whole number"),
        ("wan", "transformer/config.json", {"patch_size": 2}, "patch_size=2 should be a list"),
        ("wan", "vae/config.json", {"z_dim": 0}, "z_dim=0 should be"),
        ("wan22", "transformer_2/config.json", {"ffn_dim": True}, "ffn_dim=True should be"),
        ("hunyuan", "transformer/config.json", {"num_single_layers": None}, "num_single_layers is missing"),
        ("hunyuan", "text_encoder/config.json", {"hidden_size": 1.5}, "hidden_size=1.5 should be"),
        ("wan", "model_index.json", {"boundary_ratio": 0.875}, "names no transformer_2"),
        ("wan22", "model_index.json", {"boundary_ratio": "x"}, "boundary_ratio='x'"),
        ("wan", "model_index.json", {"scheduler": ["diffusers", "DDIMScheduler"]}, "DDIMScheduler is not supported"),
        ("hunyuan", "scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, "use_dynamic_shifting"),
    ],
)
def test_configs_that_are_not_usable_are_named(
    kind: str, file: str, changes: dict[str, Any], said: str, folder_of: Callable[[str], Path]
) -> None:
    folder = folder_of(kind)
    change_json(folder / file, **changes)
    found = problems_of(folder)
    assert len(found) == 1
    assert said in found[0]
    assert str(folder) in found[0]


def test_all_problems_of_a_folder_come_together(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("wan")
    shutil.rmtree(folder / "scheduler")
    change_json(folder / "transformer" / "config.json", in_channels=None)
    assert len(problems_of(folder)) == 2


@pytest.mark.parametrize("kind", ["wan", "hunyuan"])
def test_a_text_encoder_that_is_cut_short_is_named(kind: str, folder_of: Callable[[str], Path]) -> None:
    file = folder_of(kind) / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    adapter = open_model(str(file.parents[1]))
    (problem,) = weight_problems(adapter)
    assert problem.startswith(f"{file} is cut short")
    with pytest.raises(CheckpointError, match="is cut short"):
        adapter.load_text_stage("cpu", adapter.default_precision("cpu"))


@pytest.mark.parametrize(
    "header", [[1], {"a": 1}, {"a": {"shape": [1]}}, {"a": {"dtype": "F32", "shape": [1]}}, {"a": {"dtype": "F32"}}]
)
def test_a_header_that_is_malformed_is_named(header: Any, tmp_path: Path) -> None:
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="header is malformed"):
        read_header(file)


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"a": 1}}])
def test_an_index_without_a_map_is_named(index: Any, folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("wan")
    (folder / "vae" / "x.safetensors.index.json").write_text(json.dumps(index))
    (problem,) = problems_of(folder)
    assert "holds no weight_map" in problem
