"""The first half of `bench faults`: workers that are killed, each at every stage of the requests under way."""

import dataclasses
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil

from pipedit.bench.fault_subject import LEVELS, REQUESTS, Outcome, Resources, Subject
from pipedit.bench.sampling import Spread
from pipedit.bench.striking import Death, Strike
from pipedit.core.errors import WorkerDiedError
from pipedit.core.messages import Command, Decode, Denoise, Encode, Release
from pipedit.core.placement import Placement
from pipedit.engine.updates import Failed, Finished
from pipedit.worker.failures import doing
from pipedit.worker.service import STARTING

NAMED_WITHIN_S = 5.0
_HAND_OVER_S = 0.005  # how long one takes, about
_WAITING = "waiting for work"
LOADING, IDLE, HELPING, HAND_OVER = "loading", "idle", "helping", "hand-over"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Rank `rank` is killed while requests are at `stage`: those of its own role, or others meanwhile."""

    stage: str
    rank: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kill:
    """What came of a case. `named_after_s`: until the error was raised; `seconds`: until every request was over."""

    case: Case
    role: str
    doing: str
    named_after_s: float
    seconds: float
    failed: int
    restarted: int
    problems: tuple[str, ...]


def _is_step(first: bool) -> Callable[[Command], bool]:
    return lambda command: isinstance(command, Denoise) and (command.step == 0) == first


def _is_chunk(first: bool) -> Callable[[Command], bool]:
    return lambda command: isinstance(command, Decode) and (command.chunk == 0) == first


def _is_helped(command: Command) -> bool:
    return isinstance(command, Denoise) and command.aco is not None


def _hands_over(command: Command) -> bool:
    match command:
        case Denoise(step=0):
            return command.conditioning_at is not None
        case Decode(chunk=0):
            return command.latents_at is not None
    return False


# By their names: the commands that begin them, and the spans that tell how long they take.
_MOMENTS: dict[str, tuple[Callable[[Command], bool], str]] = {
    "encoding": (lambda command: isinstance(command, Encode), "encode"),
    "first step": (_is_step(first=True), "step"),
    "mid step": (_is_step(first=False), "step"),
    HELPING: (_is_helped, "help"),
    HAND_OVER: (_hands_over, ""),
    "first chunk": (_is_chunk(first=True), "decode"),
    "mid chunk": (_is_chunk(first=False), "decode"),
}
STAGES = (LOADING, *_MOMENTS, IDLE)


def cases_of(subject: Subject) -> list[Case]:
    """Each rank at each stage that there is with this placement."""
    placement = subject.placement
    return [
        Case(stage=stage, rank=rank)
        for stage in STAGES
        for rank in placement.world
        if (stage != HAND_OVER or placement.hands_over) and (stage != HELPING or subject.helps)
    ]


def role_of(placement: Placement, rank: int, *, helps: bool) -> str:
    """In words."""
    names = []
    if rank in placement.encoders:
        names.append("encoder")
    if rank in placement.denoisers:
        leads = "denoiser" if rank == placement.denoisers[0] else "denoiser that follows"
        names.append(leads)
    if rank in placement.decoders:
        names.append("decoder")
        if helps:
            names.append("helper")
    return ", ".join(names)


def kill(subject: Subject, case: Case, rng: random.Random) -> Kill:
    """Runs all requests, and kills the rank on the way."""
    executor = subject.executor
    pids, first_death = executor.pids, len(executor.deaths)
    if case.stage in (LOADING, IDLE):
        executor.strike_now(case.rank)
    outcome = _run(subject, case, rng)
    deaths = executor.deaths[first_death:]
    problems = [*death_problems(case, deaths, outcome), *outcome_problems(subject, outcome, _guilty(deaths))]
    problems += [f"process {pid} still lives" for pid in pids if psutil.pid_exists(pid)]
    subject.engine.start()  # unless they were up again for the sake of other requests
    return Kill(
        case=case,
        role=role_of(subject.placement, case.rank, helps=subject.helps),
        doing=deaths[-1].error.doing if deaths else "",
        named_after_s=max((death.after_s for death in deaths), default=0.0),
        seconds=outcome.seconds,
        failed=len(outcome.ended(Failed)),
        restarted=len(outcome.restarts),
        problems=tuple(problems),
    )


def _run(subject: Subject, case: Case, rng: random.Random) -> Outcome:
    executor = subject.executor
    num_deaths = len(executor.deaths) + (2 if case.stage == LOADING else 1)
    has_struck, skip = case.stage == IDLE, rng.randrange(len(REQUESTS))
    for _ in range(3):
        if not has_struck:
            executor.arm(_strike(subject, case, rng, skip))
        outcome = subject.run(range(len(REQUESTS)))
        has_struck, skip = executor.disarm() or has_struck, 0  # helpers are not asked for every request
        if has_struck and len(executor.deaths) >= num_deaths:
            break
        # The requests were over when the strike fell: the next ones meet it.
    return outcome


def _strike(subject: Subject, case: Case, rng: random.Random, skip: int) -> Strike:
    """At a random time within the stage."""
    if case.stage == LOADING:
        # They may load faster than the first time, and shall not be done by then.
        return Strike(rank=case.rank, delay_s=rng.uniform(0.0, 0.7 * subject.start_s), is_moment=None)
    begins, what = _MOMENTS[case.stage]
    typical_s = subject.typical_s(what) if what else _HAND_OVER_S
    return Strike(
        rank=case.rank,
        delay_s=rng.uniform(0.0, typical_s),
        is_moment=begins,
        skip=skip,
    )


def _guilty(deaths: Sequence[Death]) -> set[str]:
    """The requests that may fail: those that the dead ranks worked on."""
    commands = [death.command for death in deaths]
    return {command.request_id for command in commands if command is not None and not isinstance(command, Release)}


def death_problems(case: Case, deaths: Sequence[Death], outcome: Outcome) -> Iterator[str]:
    """Of the errors: whom they blame, for what, and when they came."""
    if not deaths:
        yield "the death was never told of"
    for death in deaths:
        error = death.error
        is_start = error in outcome.raised
        at = doing(death.command) if death.command is not None else STARTING if is_start else _WAITING
        if (error.rank, error.doing) != (case.rank, at):
            yield f"worker {error.rank} is said to have died while {error.doing}: it was {case.rank}, while {at}"
        if not error.ending.startswith("SIGKILL"):
            yield f"it is said to have ended by {error.ending}"
        if death.after_s > NAMED_WITHIN_S:
            yield f"the error came after {death.after_s:.1f} s"
    if (case.stage == IDLE) and len(deaths) > 1:
        yield f"one was killed, and {len(deaths)} deaths were told of"


def outcome_problems(subject: Subject, outcome: Outcome, guilty: set[str]) -> Iterator[str]:
    """Of the requests: which failed, how often they began, and their videos."""
    for request_id, number in outcome.requests.items():
        ending = outcome.endings.get(request_id)
        name = f"request {number}"
        if request_id in guilty:
            if not (isinstance(ending, Failed) and isinstance(ending.error, WorkerDiedError)):
                yield f"{name} was that of the dead worker, and ended with {ending}"
        elif not isinstance(ending, Finished):
            yield f"{name} had nothing to do with it, and ended with {ending}"
        elif (levels := subject.difference(outcome, request_id)) > LEVELS:
            yield f"the video of {name} differs by {levels:g}"
        if outcome.restarts[request_id] > 1:
            yield f"{name} began again {outcome.restarts[request_id]} times"


def run_kills(
    subject: Subject, cases: Sequence[Case], rng: random.Random, say: Callable[[str], None]
) -> tuple[list[Kill], list[Resources]]:
    """What came of each case, and what this process used after each."""
    kills, used = [], [Resources.now()]
    for case in cases:
        one = kill(subject, case, rng)
        used.append(Resources.now())
        one = dataclasses.replace(one, problems=(*one.problems, *used[-1].problems(used[0])))
        kills.append(one)
        say(f"{case.stage}, rank {case.rank} ({one.role}) while {one.doing}: {_told(one)}")
    return kills, used


def _told(one: Kill) -> str:
    if one.problems:
        return "; ".join(one.problems)
    return f"named after {one.named_after_s:.2f} s, {one.failed} failed, {one.restarted} began again"


def summary(kills: Sequence[Kill]) -> dict[str, Any]:
    """JSON-ready."""
    roles = {stage: Counter(one.role for one in kills if one.case.stage == stage) for stage in STAGES}
    return {
        "count": len(kills),
        "named_after_s": dataclasses.asdict(Spread.of([one.named_after_s for one in kills])),
        "all_over_after_s": dataclasses.asdict(Spread.of([one.seconds for one in kills])),
        "requests_failed": sum(one.failed for one in kills),
        "requests_begun_again": sum(one.restarted for one in kills),
        "by_stage_and_role": {stage: dict(counts) for stage, counts in roles.items() if counts},
        "by_what_the_rank_was_at": dict(Counter(one.doing for one in kills)),
        "problems": [
            f"{one.case.stage}, rank {one.case.rank} ({one.role}) while {one.doing}: {problem}"
            for one in kills
            for problem in one.problems
        ],
    }
