"""`pipedit models`: what is supported, what of it is on this machine. Asks no network."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from pipedit.cli.console import session_of
from pipedit.cli.options import JsonFlag
from pipedit.core.errors import CheckpointError
from pipedit.core.request import VideoRequest
from pipedit.core.units import format_bytes
from pipedit.models.adapter import ModelAdapter, Precision
from pipedit.models.registry import (
    KNOWN_MODELS,
    KnownModel,
    cached_folder,
    embedded_folder,
    missing_weights,
    open_model,
    open_published,
)

READY, INCOMPLETE, ABSENT = "ready", "incomplete", "absent"
_SINGLE = Precision(text_encoder="float32", transformer="float32", vae="float32")
_SINGLE_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelState:
    """A known model on this machine. `parameters` by part, as far as generation loads it; None without its config."""

    model: KnownModel
    state: str
    folder: Path | None = None
    size_bytes: int = 0
    parameters: dict[str, int] | None = None

    def as_json(self) -> dict[str, Any]:
        return {
            **dataclasses.asdict(self.model),
            "state": self.state,
            "folder": None if self.folder is None else str(self.folder),
            "size_bytes": self.size_bytes,
            "parameters": self.parameters,
        }


def models(
    context: typer.Context,
    as_json: JsonFlag = False,
) -> None:
    """List the models that are supported, and which of them are on this machine."""
    session = session_of(context)
    states = [inspect_model(model) for model in KNOWN_MODELS]
    session.report["models"] = [state.as_json() for state in states]
    if as_json:
        return
    session.terminal.table(_table(states))
    session.terminal.say("--model takes these names, any hub id of the same kinds, or a folder in diffusers format.")
    if any(state.state == ABSENT and state.model.hub_id is not None for state in states):
        session.terminal.say("What is not here yet is downloaded when it is first used.")


def inspect_model(model: KnownModel) -> ModelState:
    folder = embedded_folder() if model.hub_id is None else cached_folder(model.hub_id)
    if folder is None or not folder.is_dir():
        parameters = None if model.hub_id is None else count_parameters(open_published(model.alias))
        return ModelState(model=model, state=ABSENT, parameters=parameters)
    size_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    try:
        adapter = open_model(model.alias)
        state, parameters = INCOMPLETE if missing_weights(adapter) else READY, count_parameters(adapter)
    except CheckpointError:  # not even its configs are whole
        state, parameters = INCOMPLETE, None
    return ModelState(model=model, state=state, folder=folder, size_bytes=size_bytes, parameters=parameters)


def count_parameters(adapter: ModelAdapter) -> dict[str, int]:
    """From the cost profile, so from configs alone."""
    request = adapter.complete(VideoRequest(prompt=""))
    return {name: part.weights // _SINGLE_BYTES for name, part in adapter.cost(request, _SINGLE).parts.items()}


def _table(states: Sequence[ModelState]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("--model", no_wrap=True, style="bold")
    table.add_column("what", overflow="fold")
    table.add_column("here", no_wrap=True)
    table.add_column("on disk", justify="right", no_wrap=True)
    table.add_column("parameters", overflow="fold")
    table.add_column("licence", overflow="fold")
    colours = {READY: "green", INCOMPLETE: "yellow", ABSENT: "dim"}
    for state in states:
        table.add_row(
            state.model.alias,
            state.model.title,
            Text("no" if state.state == ABSENT else state.state, style=colours[state.state]),
            format_bytes(state.size_bytes) if state.size_bytes else "",
            _parameters_text(state.parameters),
            state.model.licence,
        )
    return table


def _parameters_text(parameters: dict[str, int] | None) -> str:
    """ "14.3 B + 5.7 B text" """
    if parameters is None:
        return ""
    transformers = [count for part, count in parameters.items() if part.startswith("transformer")]
    text = sum(count for part, count in parameters.items() if part.startswith("text_encoder"))
    experts = f"{len(transformers)} x " if len(transformers) > 1 else ""
    return f"{experts}{_count_text(transformers[0])} + {_count_text(text)} text"


def _count_text(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return str(count)
