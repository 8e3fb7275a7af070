"""What one `generate` command line asks for, checked as a whole: all of its problems come in one report.

Loads no weights and, unless a CUDA device is asked for, no torch: wrong input is answered in a moment.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from pipedit.cli.checkpoints import CheckpointFlags, new_run, resumed
from pipedit.cli.outputs import file_problems, name_of_prompt, name_outputs, output_files, output_problems
from pipedit.cli.prompts import dtype_of, gather_wishes, labels_of, read_like
from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.engine.intake import check_input, with_seed
from pipedit.engine.saved_run import SavedRun
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
    checkpoint: CheckpointFlags = dataclasses.field(default_factory=CheckpointFlags)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make. `number` counts from 1 up to `of`.

    `replace`: what lies at `output` may be replaced. `series` is the name to count from where nobody chose `output`.
    """

    number: int
    of: int
    request: VideoRequest
    output: str
    replace: bool = False
    series: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that is needed to begin. `like` is the metadata of the file to be like, if there is one. `run`: the
    only job is saved on the way, and may go on from what was saved before."""

    settings: EngineSettings
    jobs: tuple[Job, ...]
    like: VideoMetadata | None
    run: SavedRun | None = None


def make_plan(order: Order) -> Plan:
    """Raises InvalidRequestError with every problem of the prompts, the settings, the model and the files."""
    order, run, wrong_checkpoint = resumed(order)
    if wrong_checkpoint and run is None and order.checkpoint.resume is not None:
        raise InvalidRequestError(wrong_checkpoint)  # nothing else of the order is known
    like, problems = _read_like(order)
    problems += wrong_checkpoint
    wishes, found = gather_wishes(order.prompts, order.prompt_file, like)
    problems += found
    if not wishes and not problems:
        problems.append("there is no prompt; give one in quotes, or use --prompt-file")
    settings = EngineSettings.of(**{**_engine_settings_of(like), **order.engine_flags})
    like_settings = like.settings if like is not None else {}
    requests = [with_seed(wish.request(like_settings, order.request_flags)) for wish in wishes]
    checked = check_input(settings, requests, labels_of(wishes))
    problems += checked.problems
    own = [wish.output for wish in wishes]
    outputs = name_outputs(order.output, checked.requests, own, overwrite=order.overwrite)
    problems += output_problems(outputs, checked.requests, pattern=order.output, overwrite=order.overwrite)
    if order.trace is not None:
        taken = {file for pair in zip(outputs, checked.requests, strict=True) for file in output_files(*pair)}
        problems += file_problems(order.trace, overwrite=order.overwrite, taken=taken)
    if run is None and order.checkpoint.folder is not None:
        run, found = new_run(order, checked.requests, settings)
        problems += found
    if problems:
        raise InvalidRequestError(list(dict.fromkeys(problems)))
    return Plan(settings=settings, jobs=_jobs(order, checked.requests, outputs, own), like=like, run=run)


def _jobs(
    order: Order, requests: Sequence[VideoRequest], outputs: Sequence[str], own: Sequence[str | None]
) -> tuple[Job, ...]:
    jobs = []
    for number, (request, output, given) in enumerate(zip(requests, outputs, own, strict=True), start=1):
        series = name_of_prompt(request.prompt) if given is None and order.output is None else None
        jobs.append(
            Job(
                number=number,
                of=len(outputs),
                request=request,
                output=output,
                replace=order.overwrite,
                series=series,
            )
        )
    return tuple(jobs)


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
