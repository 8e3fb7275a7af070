"""What one `generate` command line asks for, checked as a whole: all of its problems come in one report.

Loads no weights and, unless a CUDA device is asked for, no torch: wrong input is answered in a moment.
"""

import dataclasses
from typing import Any

from pipedit.cli.outputs import file_problems, name_outputs, output_problems
from pipedit.cli.prompts import dtype_of, gather_wishes, labels_of, read_like
from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.engine.intake import check_input, with_seed
from pipedit.engine.settings import EngineSettings
from pipedit.media import VideoMetadata


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """The command line as it was said. None: not said, so the file given with --like or the default decides."""

    prompts: tuple[str, ...] = ()
    prompt_file: str | None = None
    like: str | None = None
    request_flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine_flags: dict[str, Any] = dataclasses.field(default_factory=dict)
    output: str | None = None
    trace: str | None = None
    overwrite: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make. `number` counts from 1 up to `of`."""

    number: int
    of: int
    request: VideoRequest
    output: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is needed to begin. `like` is the metadata of the file to be like, if there is one."""

    settings: EngineSettings
    jobs: tuple[Job, ...]
    like: VideoMetadata | None


def make_plan(order: Order) -> Plan:
    """Raises InvalidRequestError with every problem of the prompts, the settings, the model and the files."""
    like, problems = _read_like(order)
    wishes, found = gather_wishes(order.prompts, order.prompt_file, like)
    problems += found
    if not wishes and not problems:
        problems.append("there is no prompt; give one in quotes, or use --prompt-file")
    settings = EngineSettings(**{**_engine_settings_of(like), **order.engine_flags})
    like_settings = like.settings if like is not None else {}
    requests = [with_seed(wish.request(like_settings, order.request_flags)) for wish in wishes]
    checked = check_input(settings, requests, labels_of(wishes))
    problems += checked.problems
    own = [wish.output for wish in wishes]
    outputs = name_outputs(order.output, checked.requests, own, overwrite=order.overwrite)
    problems += output_problems(outputs, checked.requests, pattern=order.output, overwrite=order.overwrite)
    if order.trace is not None:
        problems += file_problems(order.trace, overwrite=order.overwrite, outputs=outputs)
    if problems:
        raise InvalidRequestError(list(dict.fromkeys(problems)))
    jobs = tuple(
        Job(number=number, of=len(outputs), request=request, output=output)
        for number, (request, output) in enumerate(zip(checked.requests, outputs, strict=True), start=1)
    )
    return Plan(settings=settings, jobs=jobs, like=like)


def _read_like(order: Order) -> tuple[VideoMetadata | None, list[str]]:
    if order.like is None:
        return None, []
    try:
        return read_like(order.like), []
    except InvalidRequestError as error:
        return None, list(error.problems)


def _engine_settings_of(like: VideoMetadata | None) -> dict[str, Any]:
    """What of the engine's settings changes the video. The device does too, but belongs to the machine."""
    if like is None:
        return {}
    tiling = like.extra.get("vae_tiling") is True
    return {"model": like.model, "dtype": dtype_of(like), "vae_tiling": tiling}
