"""Attentions and whole videos in which helpers take heads, as functions that ranks run."""

import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import psutil
import torch

from pipedit.core.errors import InvalidRequestError
from pipedit.core.messages import Aco
from pipedit.core.parallel import ParallelConfig
from pipedit.models.adapter import AttentionForward
from pipedit.models.registry import open_model
from pipedit.parallel.runtime import ParallelRuntime
from tests.models.parity import make_request
from tests.parallel.cases import Case, GivenCall, difference, run_case
from tests.parallel.ranks import make_runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Turn:
    """One step's division of work: `helpers` of each group of Ulysses and their group's shares of heads; nobody helps
    where there are none."""

    helpers: tuple[tuple[int, ...], ...] = ()
    heads: tuple[int, ...] = ()

    def has(self, rank: int, denoisers: int) -> bool:
        return rank < denoisers or any(rank in group for group in self.helpers)

    def aco(self, text_tokens: tuple[int, ...]) -> Aco | None:
        return Aco(helpers=self.helpers, heads=self.heads, text_tokens=text_tokens) if self.helpers else None


ALONE = Turn()


# -- attentions -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Attentions one after the other on one runtime, each with a turn of its own."""

    config: ParallelConfig
    turns: tuple[tuple[Turn, Case], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Of one attention on one rank: differences to the answer (None: it only helped), and what its buffers hold."""

    latents: float | None
    text: float | None
    held_bytes: int

    def is_within(self, limit: float) -> bool:
        return all(value is None or value <= limit for value in (self.latents, self.text))


def run_job(runtime: ParallelRuntime, rank: int, job: Job) -> list[Report]:
    """A report for each turn in which the rank has a part."""
    reports = []
    for turn, case in job.turns:
        if not turn.has(rank, job.config.world_size):
            continue
        runtime.use(job.config, aco=turn.aco((case.text_tokens,)))
        latents = text = None
        if rank < job.config.world_size:
            own, own_text, _ = run_case(runtime, case)
            wanted, wanted_text = case.answer()
            latents, text = difference(own, wanted), difference(own_text, wanted_text)
        else:
            runtime.help([forward_of(case)])
        reports.append(Report(latents=latents, text=text, held_bytes=runtime.workspace_bytes))
    return reports


def forward_of(case: Case, sites: int = 1) -> AttentionForward:
    return AttentionForward(
        sites=sites,
        batch=case.batch,
        heads=case.heads,
        head_dim=case.head_dim,
        latent_tokens=case.tokens,
        text_tokens=case.text_tokens,
        dtype=case.dtype,
    )


def run_jobs(rank: int, _world_size: int, jobs: Sequence[Job]) -> list[list[Report]]:
    reports = []
    for job in jobs:
        runtime = make_runtime(rank, job.config.world_size)
        reports.append(run_job(runtime, rank, job))
        runtime.close()
    return reports


def run_measured(rank: int, _world_size: int, job: Job) -> tuple[list[Report], list[int | None]]:
    """The reports, and what was chosen for each shape that was measured."""
    runtime = make_runtime(rank, job.config.world_size)
    reports = run_job(runtime, rank, job)
    chosen = [trial.best for trial in runtime.tuner._trials.values()]
    runtime.close()
    return reports, chosen


def run_among_some(rank: int, _world_size: int) -> float:
    """Ranks 0 and 1 with helper 2 work while rank 3 is busy elsewhere; seconds that it took."""
    start = time.monotonic()
    if rank == 3:
        time.sleep(2.0)
        return 0.0
    turns = ((ALONE, Case(tokens=9)), (Turn(helpers=((2,),), heads=(1, 1, 2)), Case(tokens=9)))
    (reports,) = run_jobs(rank, 3, [Job(config=ParallelConfig(ulysses_degree=2), turns=turns)])
    assert all(report.is_within(1e-5) for report in reports)
    return time.monotonic() - start


# -- failures -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class AfterFailure:
    """`felt_s`: until this rank, too, had failed; `sentence`: with what; `difference`: of what came afterwards."""

    felt_s: float
    sentence: str
    difference: float


HELPED, TEXT = Turn(helpers=((2,),), heads=(3, 3, 2)), 3
PAIR = ParallelConfig(ulysses_degree=2)


def run_failure(rank: int, _world_size: int, failing: int) -> AfterFailure:
    """Two denoisers with one helper; rank `failing` gives up in the midst of an attention that is measured, the others
    fail with it, and in a new epoch all is well."""
    runtime, case = make_runtime(rank, 2), Case(tokens=16, heads=8, text_tokens=TEXT)
    runtime.use(PAIR, aco=HELPED.aco((TEXT,)))
    take_part(runtime, rank, case)
    start = time.monotonic()
    sentence = fail_together(runtime, rank, case, failing)
    felt_s = time.monotonic() - start
    runtime.use(PAIR, aco=HELPED.aco((TEXT,)), epoch=1)
    differences = [take_part(runtime, rank, case) for _ in range(3)]
    if rank < 2:
        runtime.use(PAIR, epoch=1)
        differences.append(take_part(runtime, rank, case))
    runtime.close()
    return AfterFailure(felt_s=felt_s, sentence=sentence, difference=max(differences))


def fail_together(runtime: ParallelRuntime, rank: int, case: Case, failing: int) -> str:
    """What each rank fails with."""
    try:
        if rank == failing:
            give_up(runtime, rank, case)
        for _ in range(2):  # the first one may be over before the failure is felt
            take_part(runtime, rank, case)
    except RuntimeError as error:
        runtime.reset()
        return str(error)
    return ""


def run_failures(rank: int, _world_size: int, times: int) -> list[tuple[int, int]]:
    """Open files and threads after each of many failures."""
    runtime, case, counts = make_runtime(rank, 2), Case(tokens=16, heads=8, text_tokens=TEXT), []
    for epoch in range(times):
        runtime.use(PAIR, aco=HELPED.aco((TEXT,)), epoch=epoch)
        take_part(runtime, rank, case)
        assert fail_together(runtime, rank, case, failing=epoch % 3)
        gc.collect()
        process = psutil.Process()
        counts.append((process.num_fds(), process.num_threads()))
    return counts


def take_part(runtime: ParallelRuntime, rank: int, case: Case) -> float:
    if rank == 2:
        runtime.help([forward_of(case)])
        return 0.0
    return difference(run_case(runtime, case)[0], case.answer()[0])


def give_up(runtime: ParallelRuntime, rank: int, case: Case) -> None:
    """After the first messages were posted, and some of them left."""
    runtime.begin_forward(case.tokens)
    latents, text, _ = case.parts()

    class Failing(GivenCall):
        def key(self, heads: slice) -> torch.Tensor:
            raise RuntimeError("no luck")

    if rank == 2:
        raise RuntimeError("no luck")
    list(runtime.attend(Failing([runtime.shard(part, 1) for part in latents], text, None)))


def run_refusals(rank: int, _world_size: int) -> list[str]:
    """Sentences of what two denoisers refuse."""
    runtime = make_runtime(rank, 2)
    wrong = [
        (ParallelConfig(ring_degree=2), Turn(helpers=((2,),), heads=(2, 2))),
        (ParallelConfig(), Turn(helpers=((2,),), heads=(2, 2))),
        (ParallelConfig(cfg_degree=2), Turn(helpers=((2,),), heads=(2, 2))),
        (ParallelConfig(ulysses_degree=2), Turn(helpers=((2,),), heads=(2, 2))),
        (ParallelConfig(ulysses_degree=2), Turn(helpers=((1,),), heads=(2, 1, 1))),
    ]
    return [sentence for config, turn in wrong if (sentence := refused(runtime, config, turn))]


def refused(runtime: ParallelRuntime, config: ParallelConfig, turn: Turn) -> str:
    try:
        runtime.use(config, aco=turn.aco((0,)))
    except InvalidRequestError as error:
        return "; ".join(error.problems)
    return ""


def run_masked(rank: int, _world_size: int) -> str:
    """What a denoiser says to a batch of prompts of unequal length."""
    runtime = make_runtime(rank, 1)
    case = Case(tokens=8, batch=2, text_tokens=5, masked=True)
    runtime.use(ParallelConfig(), aco=Turn(helpers=((1,),), heads=(2, 2)).aco((5,)))
    try:
        if rank == 0:
            run_case(runtime, case)
    except InvalidRequestError as error:
        return "; ".join(error.problems)
    finally:
        runtime.reset()
    return ""


# -- videos ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Video:
    """A request, the turns of its steps (over and over), and whether helpers give back zeros instead of results."""

    settings: dict[str, Any]
    config: ParallelConfig
    turns: tuple[Turn, ...]
    is_wrong: bool = False


def make_videos(rank: int, _world_size: int, folder: str, kind: str, videos: Sequence[Video]) -> list[torch.Tensor]:
    """Clean latents of each on the ranks that denoise; empty where a rank does not."""
    adapter = open_model(folder)
    precision = adapter.default_precision("cpu")
    text_stage, results = adapter.load_text_stage("cpu", precision), []
    for video in videos:
        request = make_request(adapter, kind, **video.settings)
        conditioning = text_stage.encode(request)
        text_tokens = text_stage.joint_tokens(conditioning)
        forwards = adapter.attention_forwards(request, precision, text_tokens)
        runtime, denoises = make_runtime(rank, video.config.world_size), rank < video.config.world_size
        stage = state = None
        if denoises:
            stage = adapter.load_denoise_stage("cpu", precision)
            stage.attach(runtime)
            state = stage.begin(request, conditioning)
        for step in range(request.num_inference_steps or 0):
            turn = video.turns[step % len(video.turns)]
            if not turn.has(rank, video.config.world_size):
                continue
            runtime.use(video.config, aco=turn.aco(text_tokens))
            if stage is not None:
                stage.step(state, step)
            else:
                with no_results(video.is_wrong):
                    runtime.help(forwards)
        results.append(stage.latents(state) if stage is not None else torch.empty(0))
        runtime.close()
    return results


@contextmanager
def no_results(is_wrong: bool) -> Iterator[None]:
    if not is_wrong:
        yield
        return
    with mock.patch("pipedit.parallel.runtime.attention", lambda query, *_: torch.zeros_like(query)):
        yield


def make_alone(folder: str, kind: str, settings: dict[str, Any]) -> torch.Tensor:
    """The clean latents by one process."""
    adapter = open_model(folder)
    precision = adapter.default_precision("cpu")
    request = make_request(adapter, kind, **settings)
    stage = adapter.load_denoise_stage("cpu", precision)
    state = stage.begin(request, adapter.load_text_stage("cpu", precision).encode(request))
    for step in range(request.num_inference_steps or 0):
        stage.step(state, step)
    return stage.latents(state)
