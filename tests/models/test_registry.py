"""From a name to an adapter: folders, aliases, the hub cache, and names that mean nothing."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.models.registry import KNOWN_MODELS, fetch_weights, open_model


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
    cache = tmp_path / f"models--{hub_id.replace('/', '--')}"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abcd")
    (cache / "snapshots" / "0123abcd").symlink_to(tiny_folder("wan"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
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
