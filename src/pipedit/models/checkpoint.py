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
_VOCABULARIES = ("tokenizer.json", "spiece.model", "tokenizer.model", "vocab.json")  # a tokenizer has one of them
_MAX_HEADER_BYTES = 100_000_000


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
        defaults = _read_json(file).get("defaults", {})
        if not isinstance(defaults, dict):
            raise CheckpointError(f'{file}: "defaults" should be a JSON object, such as {{"num_frames": 33}}')
        unknown = sorted(set(defaults) - {field.name for field in dataclasses.fields(RequestDefaults)})
        if unknown:
            raise CheckpointError(f"{file} sets unknown defaults: {', '.join(unknown)}")
        if empty := sorted(name for name, value in defaults.items() if value is None):
            raise CheckpointError(f"{file} gives no value for {', '.join(empty)}; leave them out instead of null")
        return defaults

    def tokenizer_folder(self, component: str) -> Path:
        """Where a tokenizer's files are; raises CheckpointError where they are missing."""
        folder = self.path(component)
        if not any((folder / name).is_file() for name in _VOCABULARIES):
            raise CheckpointError(f"{folder} holds no tokenizer ({', '.join(_VOCABULARIES)}): the model is incomplete")
        return folder

    def weights(self, component: str) -> WeightFiles:
        """Tensor names and files of a component; raises CheckpointError where they are missing or pickled."""
        folder = self.path(component)
        for index in sorted(folder.glob("*.safetensors.index.json")):
            tensors = {name: folder / file for name, file in _weight_map(index).items()}
            missing = sorted({str(file) for file in tensors.values() if not file.is_file()})
            if missing:
                raise CheckpointError(f"weight files are missing, the download is incomplete: {', '.join(missing)}")
            return WeightFiles(component=component, tensors=tensors)
        files = sorted(folder.glob("*.safetensors"), key=lambda file: (file.name.count("."), file.name))
        if files:
            return WeightFiles(component=component, tensors=dict.fromkeys(read_header(files[0]), files[0]))
        raise CheckpointError(_no_weights(folder))

    def whole_weights(self, component: str) -> WeightFiles:
        """As `weights`, but looks into every file and raises CheckpointError for those that are cut short too."""
        weights = self.weights(component)
        for file in weights.files:
            read_header(file)
        return weights

    def weight_bytes(self, component: str) -> int:
        """Bytes of the component's tensors on disk."""
        return sum(file.stat().st_size for file in self.weights(component).files)


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Names, data types and shapes of a safetensors file, from its header alone. Raises CheckpointError for a file that
    is no such file, or that is not as long as its header says."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError("header too long")
            header = json.loads(stream.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: (str(entry["dtype"]), tuple(entry["shape"])) for name, entry in entries.items()}
        data_bytes = max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
        size_bytes = file.stat().st_size
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file ({error}); download it again") from error
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file (its header is malformed); download it again"
        ) from error
    if size_bytes != 8 + length + data_bytes:
        what = "is cut short" if size_bytes < 8 + length + data_bytes else "is too long"
        raise CheckpointError(
            f"{file} {what}: {size_bytes} bytes instead of {8 + length + data_bytes}; download it again"
        )
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index of weights in several files."""
    found = _read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
        raise CheckpointError(f"{index} holds no weight_map from tensors to files; download it again")
    return found


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
