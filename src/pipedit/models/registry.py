"""From what a user calls a model to its adapter: the embedded model, a folder, a hub id, or one of our short names.

Reads config files only. Weights are fetched (for hub models) by `fetch_weights`, after the input was checked.
"""

import dataclasses
import difflib
import importlib
import importlib.resources
import os
import re
from pathlib import Path

from pipedit.core.errors import CheckpointError, InvalidRequestError
from pipedit.models.adapter import ModelAdapter
from pipedit.models.checkpoint import MODEL_INDEX, Checkpoint
from pipedit.models.published_configs import PUBLISHED, PublishedCheckpoint

EMBEDDED = "tiny"
# What the hub takes: no "--" and no "..", no other sign than letters, digits and _ at the ends, no ".git".
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.|\.git$))\w(?:[\w.-]*\w)?/\w(?:[\w.-]{0,94}\w)?", re.ASCII)
_CONFIGS = ["*.json", "*.txt", "tokenizer*/*"]
_WEIGHTS = ["*.safetensors"]
# Adapter classes as text, so that naming a model imports nothing.
_ADAPTERS = {
    "WanPipeline": "pipedit.models.wan:WanAdapter",
    "HunyuanVideoPipeline": "pipedit.models.hunyuan_video:HunyuanVideoAdapter",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model that pipedit knows by a short name."""

    alias: str
    hub_id: str | None  # None: inside the package
    family: str
    title: str
    licence: str


KNOWN_MODELS = (
    KnownModel(
        alias=EMBEDDED,
        hub_id=None,
        family="wan",
        title="embedded model: simple shapes that move, 64x64, runs anywhere",
        licence="Apache-2.0",
    ),
    KnownModel(
        alias="wan2.1-t2v-1.3b",
        hub_id="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        family="wan",
        title="Wan 2.1 text to video, 1.3B",
        licence="Apache-2.0",
    ),
    KnownModel(
        alias="wan2.1-t2v-14b",
        hub_id="Wan-AI/Wan2.1-T2V-14B-Diffusers",
        family="wan",
        title="Wan 2.1 text to video, 14B",
        licence="Apache-2.0",
    ),
    KnownModel(
        alias="wan2.2-t2v-a14b",
        hub_id="Wan-AI/Wan2.2-T2V-A14B-Diffusers",
        family="wan",
        title="Wan 2.2 text to video, two 14B experts",
        licence="Apache-2.0",
    ),
    KnownModel(
        alias="wan2.2-ti2v-5b",
        hub_id="Wan-AI/Wan2.2-TI2V-5B-Diffusers",
        family="wan",
        title="Wan 2.2 5B, text-to-video mode",
        licence="Apache-2.0",
    ),
    KnownModel(
        alias="hunyuanvideo",
        hub_id="hunyuanvideo-community/HunyuanVideo",
        family="hunyuan_video",
        title="HunyuanVideo text to video, 13B",
        licence="Tencent Hunyuan Community: excludes EU, UK and South Korea, terms above 100 M monthly users",
    ),
)


def open_model(name: str) -> ModelAdapter:
    """The adapter of a model. Raises InvalidRequestError for a name that means nothing, CheckpointError (one line for
    each problem) for a folder that is not a model or whose configs are not usable. For hub models that are not cached
    yet, downloads the config files (not the weights)."""
    adapter = _adapter(_find(name))
    if problems := adapter.config_problems():
        raise CheckpointError("\n".join(problems))
    return adapter


def open_published(name: str) -> ModelAdapter:
    """The adapter of a published model (short name or hub id) from configs inside the package: enough for sizes and
    costs, without a checkpoint and without network. Its stages cannot be loaded."""
    aliases = {model.hub_id: model.alias for model in KNOWN_MODELS}
    alias = aliases.get(name, name.lower())
    if alias not in PUBLISHED:
        raise InvalidRequestError(
            [
                f"the config of {name!r} is not built in; built in are {', '.join(PUBLISHED)}"
                f"{_nearest(alias, list(PUBLISHED))}"
            ]
        )
    return _adapter(PublishedCheckpoint.of(alias))


def _adapter(checkpoint: Checkpoint) -> ModelAdapter:
    target = _ADAPTERS.get(checkpoint.pipeline_class)
    if target is None:
        raise InvalidRequestError(
            [
                f"model {checkpoint.name} is a {checkpoint.pipeline_class or 'folder without a pipeline class'}; "
                f"supported pipelines are {', '.join(_ADAPTERS)}{_nearest(checkpoint.pipeline_class, list(_ADAPTERS))}"
            ]
        )
    module, _, attribute = target.partition(":")
    adapter: ModelAdapter = getattr(importlib.import_module(module), attribute)(checkpoint)
    return adapter


def fetch_weights(adapter: ModelAdapter) -> None:
    """Makes sure that weights and tokenizers are on disk; downloads what is missing for hub models, into the snapshot
    that the adapter reads."""
    problems = missing_weights(adapter)
    if not problems:
        return
    hub_id = _hub_id(adapter.checkpoint.name)
    if hub_id is None:
        raise CheckpointError("\n".join(problems))
    _download(hub_id, [*_CONFIGS, *_WEIGHTS], revision=adapter.checkpoint.folder.name)
    if problems := missing_weights(adapter):  # without a network, what the cache holds counts as the download
        raise CheckpointError("\n".join([*problems, f"not all of {hub_id} could be downloaded; check the network"]))


def weight_problems(adapter: ModelAdapter) -> list[str]:
    """What a model in a folder lacks, a sentence each; none for a hub model, which can be fetched."""
    return [] if _hub_id(adapter.checkpoint.name) else missing_weights(adapter)


def missing_weights(adapter: ModelAdapter) -> list[str]:
    """What the model's weights and tokenizers on this machine lack, a sentence each: missing, cut short, pickled."""
    checkpoint = adapter.checkpoint
    checks = [
        *((checkpoint.tokenizer_folder, component) for component in adapter.tokenizers),
        *((checkpoint.whole_weights, component) for component in adapter.weighted_components()),
    ]
    problems = []
    for check, component in checks:
        try:
            check(component)
        except CheckpointError as error:
            problems.append(str(error))
    return problems


def cached_folder(hub_id: str) -> Path | None:
    """Where the hub cache holds the model, or None. Asks no network."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def embedded_folder() -> Path:
    """The embedded model's folder inside the installed package."""
    return Path(str(importlib.resources.files("pipedit") / "assets" / "tiny-wan"))


def _find(name: str) -> Checkpoint:
    if name == EMBEDDED:
        return Checkpoint(folder=embedded_folder(), name=name)
    if (folder := _folder(name)) is not None:
        if not (folder / MODEL_INDEX).is_file():
            raise InvalidRequestError([_not_a_pipeline(folder)])
        return Checkpoint(folder=folder, name=name)
    hub_id = _hub_id(name)
    if hub_id is None or (os.sep in name and name.startswith((".", "/", "~"))):
        aliases = [model.alias for model in KNOWN_MODELS]
        raise InvalidRequestError(
            [
                f"model {name!r} is neither a folder, nor a hub id (owner/name), nor a known name "
                f"({', '.join(aliases)}){_nearest(name.lower(), aliases)}"
            ]
        )
    return Checkpoint(folder=_snapshot(hub_id), name=name)


def _folder(name: str) -> Path | None:
    """The folder that a name stands for, or None. Unlike pathlib, os.path raises nothing for names that cannot be."""
    path = os.path.expanduser(name)
    return Path(path) if os.path.isdir(path) else None


def _snapshot(hub_id: str) -> Path:
    """The folder in the hub cache with the model's configs, which are downloaded where there are none."""
    cached = cached_folder(hub_id)
    if cached is not None and (cached / MODEL_INDEX).is_file():
        return cached
    folder = _download(hub_id, _CONFIGS)
    if not (folder / MODEL_INDEX).is_file():  # without a network, what the cache holds counts as the download
        raise CheckpointError(
            f"model {hub_id} has no {MODEL_INDEX} in the local cache, and none could be downloaded; "
            "check the network, or give a model in diffusers format (the hub ids that end in -Diffusers)"
        )
    return folder


def _hub_id(name: str) -> str | None:
    """The hub id that a name stands for; None for the embedded model, a folder, and what can be no id."""
    if _folder(name) is not None:
        return None
    for model in KNOWN_MODELS:
        if name.lower() == model.alias:
            return model.hub_id
    return name if _HUB_ID.fullmatch(name) else None


def _download(hub_id: str, patterns: list[str], revision: str | None = None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, revision=revision))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        known = [model.hub_id for model in KNOWN_MODELS if model.hub_id]
        raise InvalidRequestError(
            [
                f"model {hub_id} is not in the local cache and could not be downloaded "
                f"({type(error).__name__}){_nearest(hub_id, known)}; check the name and the network, or give a folder"
            ]
        ) from error


def _nearest(name: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close and close[0] != name else ""


def _not_a_pipeline(folder: Path) -> str:
    pickles = sorted(file.name for pattern in ("*.ckpt", "*.pt", "*.pth", "*.bin") for file in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds pickled weights ({pickles[0]}) and no {MODEL_INDEX}; pickles can run code and are "
            "refused: give the model in diffusers format with safetensors"
        )
    return f"{folder} holds no {MODEL_INDEX}; give a folder in diffusers format (the hub ids that end in -Diffusers)"
