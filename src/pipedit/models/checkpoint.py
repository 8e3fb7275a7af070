"""A model folder in diffusers format: its configs, and which file holds which weight. Torch-free; reads no weights."""

import dataclasses
import functools
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipedit.core.errors import CheckpointError
from pipedit.core.request import RequestDefaults

MODEL_INDEX = "model_index.json"
OWN_SETTINGS = "pipedit.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightFiles:
    """Where each tensor of one component is: tensor name -> file."""

    component: str
    tensors: Mapping[str, Path]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self.tensors.values()))

    def by_file(self, names: set[str]) -> dict[Path, list[str]]:
        """The files that hold any of `names`, and which of them; other files need not be opened."""
        wanted: dict[Path, list[str]] = {}
        for name, file in self.tensors.items():
            if name in names:
                wanted.setdefault(file, []).append(name)
        return wanted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A diffusers folder. `name` is what the user called it (a path, a hub id, an alias)."""

    folder: Path
    name: str

    @functools.cached_property
    def index(self) -> dict[str, Any]:
        return _read_json(self.folder / MODEL_INDEX)

    @property
    def pipeline_class(self) -> str:
        return str(self.index.get("_class_name", ""))

    def component_class(self, component: str) -> str | None:
        """Class name of a component as model_index.json gives it, or None where it has none."""
        entry = self.index.get(component)
        return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 and entry[1] else None

    def has(self, component: str) -> bool:
        return self.component_class(component) is not None

    def path(self, component: str) -> Path:
        return self.folder / component

    @functools.cached_property
    def _configs(self) -> dict[str, dict[str, Any]]:
        return {}  # what `config` has read so far

    def config(self, component: str) -> dict[str, Any]:
        """The component's own config file, whatever its kind calls it. Read once; do not change it."""
        if component not in self._configs:
            self._configs[component] = self._read_config(component)
        return self._configs[component]

    def _read_config(self, component: str) -> dict[str, Any]:
        names = ("config.json", "scheduler_config.json", "tokenizer_config.json")
        for name in names:
            if (self.path(component) / name).is_file():
                return _read_json(self.path(component) / name)
        raise CheckpointError(f"{self.path(component)} holds no config ({', '.join(names)}): the model is incomplete")

    def own_defaults(self) -> dict[str, Any]:
        """Request defaults that the folder itself recommends: `{"defaults": {...}}` in its `pipedit.json`, if any."""
        file = self.folder / OWN_SETTINGS
        if not file.is_file():
            return {}
        defaults = dict(_read_json(file).get("defaults", {}))
        unknown = sorted(set(defaults) - {field.name for field in dataclasses.fields(RequestDefaults)})
        if unknown:
            raise CheckpointError(f"{file} sets unknown defaults: {', '.join(unknown)}")
        return defaults

    def weights(self, component: str) -> WeightFiles:
        """Tensor names and files of a component; raises CheckpointError where they are missing or pickled."""
        folder = self.path(component)
        for index in sorted(folder.glob("*.safetensors.index.json")):
            tensors = {name: folder / file for name, file in _read_json(index)["weight_map"].items()}
            missing = sorted({str(file) for file in tensors.values() if not file.is_file()})
            if missing:
                raise CheckpointError(f"weight files are missing, the download is incomplete: {', '.join(missing)}")
            return WeightFiles(component=component, tensors=tensors)
        files = sorted(folder.glob("*.safetensors"), key=lambda file: (file.name.count("."), file.name))
        if files:
            return WeightFiles(component=component, tensors=dict.fromkeys(read_header(files[0]), files[0]))
        raise CheckpointError(_no_weights(folder))

    def weight_bytes(self, component: str) -> int:
        """Bytes of the component's tensors on disk."""
        return sum(file.stat().st_size for file in self.weights(component).files)


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, data types and shapes of a safetensors file, from its header alone."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100_000_000:
                raise ValueError("header too long")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    return {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: not a model folder in diffusers format, or incomplete") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} should hold a JSON object")
    return content


def _no_weights(folder: Path) -> str:
    pickles = sorted(file.name for file in folder.glob("*") if file.suffix in _PICKLES)
    if pickles:
        return (
            f"{folder} holds only pickled weights ({', '.join(pickles[:3])}), which can run code when they are loaded; "
            "convert them: load the pipeline in diffusers and save_pretrained(..., safe_serialization=True)"
        )
    return f"{folder} holds no *.safetensors file: the model is incomplete"
