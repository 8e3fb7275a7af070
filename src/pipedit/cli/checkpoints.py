"""--checkpoint and --resume: from flags to a run that is saved on the way, and what is wrong with them."""

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.engine.saved_run import DEFAULT_EVERY, RunRecord, SavedRun, new_folder_problems
from pipedit.engine.settings import EngineSettings

if TYPE_CHECKING:
    from pipedit.cli.order import Order

_FLAGS = {"vae_tiling": "--vae-use-tiling", "compile_layers": "--enable-torch-compile"}  # others bear the field's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointFlags:
    """As they were said. `every`: see Saving."""

    folder: str | None = None
    every: int | None = None
    resume: str | None = None

    @property
    def problems(self) -> list[str]:
        if self.every is not None and self.every < 1:
            return [f"--checkpoint-every {self.every} must be at least 1"]
        if self.every is not None and self.folder is None and self.resume is None:
            return ["--checkpoint-every needs --checkpoint, which says where"]
        return []


def resumed(order: "Order") -> tuple["Order", SavedRun | None, list[str]]:
    """The order as it was when the run was begun with which --resume goes on, that run, and what is wrong. Flags may
    say again what was said then, and nothing else."""
    flags, problems = order.checkpoint, list(order.checkpoint.problems)
    if flags.resume is None:
        return order, None, problems
    for name, value in (("--like", order.like), ("--prompt-file", order.prompt_file)):
        if value is not None:
            problems.append(f"{name} cannot be combined with --resume, which says what is made")
    if flags.folder is not None and os.path.realpath(flags.folder) != os.path.realpath(flags.resume):
        problems.append(f"with --resume {flags.resume} the run is saved there again; leave --checkpoint out")
    try:
        run = SavedRun.load(flags.resume)
    except InvalidRequestError as error:
        return order, None, [*problems, *error.problems]
    if flags.every is not None:
        run.record = dataclasses.replace(run.record, every=flags.every)
    return _order_of(run.record, order), run, [*problems, *_contradictions(run.record, order)]


def new_run(order: "Order", requests: Sequence[VideoRequest], settings: EngineSettings) -> tuple[SavedRun, list[str]]:
    """The run that --checkpoint begins, and why that cannot be. `requests` are complete."""
    folder, every = order.checkpoint.folder, order.checkpoint.every or DEFAULT_EVERY
    assert folder is not None
    problems = new_folder_problems(folder)
    if len(requests) != 1:
        problems.append(f"--checkpoint saves one video, and there are {len(requests)}; give one prompt")
    if not settings.is_blockwise:
        problems.append("--checkpoint needs --strategy dualparal: other videos are made as a whole")
    request = requests[0] if requests else VideoRequest(prompt="")
    record = RunRecord(request=request, settings=settings, every=every, output=order.output)
    return SavedRun(Path(folder), record), problems


def _order_of(record: RunRecord, order: "Order") -> "Order":
    settings = {name: value for name, value in dataclasses.asdict(record.settings).items() if value is not None}
    return dataclasses.replace(
        order,
        prompts=(record.request.prompt,),
        prompt_file=None,
        like=None,
        request_flags=record.request.settings(),
        engine_flags=settings,
        output=record.output if order.output is None else order.output,
    )


def _contradictions(record: RunRecord, order: "Order") -> Iterator[str]:
    if order.prompts and order.prompts != (record.request.prompt,):
        yield f"the run to go on with is of the prompt {record.request.prompt!r}; leave the prompt out"
    for flags, before in ((order.request_flags, record.request), (order.engine_flags, record.settings)):
        for name, value in flags.items():
            if getattr(before, name) != value:
                said = f"{_flag(name)} {value}" if value is not True else _flag(name)
                yield f"{said} contradicts the run to go on with, {_made(getattr(before, name))}; leave it out"


def _flag(name: str) -> str:
    return _FLAGS.get(name, "--" + name.replace("_", "-"))


def _made(value: Any) -> str:
    return "which was begun without it" if value is None or value is False else f"which was begun with {value}"
