"""`pipedit bench faults`: workers killed and requests cancelled at every stage, in every placement, on real processes.

The bound: a death is named within 5 s with the rank and what it was at, costs the request of that worker alone, and
leaves nothing behind; a cancel touches no other request. Whatever differs is a problem, told in a sentence.
"""

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from pipedit.bench.cancels import run_cancels
from pipedit.bench.environment import environment, load
from pipedit.bench.fault_subject import LAYOUTS, LEVELS, REQUESTS, Resources, Subject, Video, difference
from pipedit.bench.kills import Case, Kill, cases_of, run_kills, summary

GROWTH_BYTES = 64 * 2**20  # of this process from the first layout's end to the last one's


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultBench:
    """`kills`: None for each role at each stage of each layout once; else so many, in turn over the layouts."""

    model: str
    kills: int | None = None
    cancels: int = 1000
    seed: int = 0


def run(bench: FaultBench, say: Callable[[str], None] = lambda _text: None) -> dict[str, Any]:
    """JSON-ready figures; "problems" is empty if all is well. Takes about 10 s a kill and 0.5 s a cancel."""
    before, rng = load(), random.Random(bench.seed)
    layouts: dict[str, Any] = {}
    kills: list[Kill] = []
    videos: tuple[Video, ...] = ()
    used = [Resources.now()]
    for number, name in enumerate(LAYOUTS):
        say(f"{name}:")
        shares = _share(bench.kills, number), _share(bench.cancels, number)
        layouts[name], some, own = _run_layout(bench.model, name, shares, rng, say)
        videos = videos or own
        layouts[name]["problems"] += _differences(own, videos)
        used.append(Resources.now())
        layouts[name]["problems"] += used[-1].problems(used[0])
        kills += some
    problems = [f"{name}: {text}" for name, figures in layouts.items() for text in figures["problems"]]
    growth = used[-1].memory_bytes - used[1].memory_bytes
    if growth > GROWTH_BYTES:
        problems.append(f"memory of this process grew by {growth} bytes from the first layout to the last")
    return {
        "benchmark": "faults",
        "model": bench.model,
        "requests": [dataclasses.asdict(request) for request in REQUESTS],
        "seed": bench.seed,
        "load_before": before,
        "kills": summary(kills) if kills else {"count": 0},
        "cancels": _sums(layouts),
        "controller": {"before": dataclasses.asdict(used[0]), "after": [dataclasses.asdict(one) for one in used[1:]]},
        "layouts": layouts,
        "problems": problems,
        "environment": environment(),
    }


def _share(total: int | None, number: int) -> int | None:
    """Of a number of things, the part of one layout."""
    if total is None:
        return None
    each, rest = divmod(total, len(LAYOUTS))
    return each + (number < rest)


def _run_layout(
    model: str, name: str, shares: tuple[int | None, int | None], rng: random.Random, say: Callable[[str], None]
) -> tuple[dict[str, Any], list[Kill], tuple[Video, ...]]:
    with Subject(model, LAYOUTS[name]) as subject:
        undisturbed = subject.warm_up()
        kills, used = run_kills(subject, choose_cases(cases_of(subject), shares[0], rng), rng, say)
        cancels = run_cancels(subject, shares[1] or 0, rng, say)
        figures = {
            "workers": len(subject.placement.world),
            "start_s": subject.start_s,
            "undisturbed_s": undisturbed.seconds,
            "kills": len(kills),
            "memory_bytes_after_kills": [one.memory_bytes for one in used],
            "cancels": {name: value for name, value in cancels.items() if name != "problems"},
            "problems": [*(summary(kills)["problems"] if kills else ()), *cancels["problems"]],
        }
        return figures, kills, subject.videos


def choose_cases(cases: list[Case], count: int | None, rng: random.Random) -> list[Case]:
    """So many, all of them before any comes twice; in random order."""
    count = len(cases) if count is None else count
    chosen: list[Case] = []
    while len(chosen) < count:
        chosen += rng.sample(cases, k=min(len(cases), count - len(chosen)))
    return chosen


def _differences(ours: tuple[Video, ...], theirs: tuple[Video, ...]) -> list[str]:
    """From the first layout's undisturbed videos."""
    levels = [difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    return [f"undisturbed videos differ from the first layout's by {levels}"] if max(levels) > LEVELS else []


def _sums(layouts: dict[str, Any]) -> dict[str, Any]:
    each = [figures["cancels"] for figures in layouts.values()]
    names = ("cancels", "batches", "cancelled", "finished_nevertheless", "untouched")
    stages: dict[str, int] = {}
    for one in each:
        for stage, count in one["stages"].items():
            stages[stage] = stages.get(stage, 0) + count
    return {**{name: sum(one[name] for one in each) for name in names}, "cancelled_after": stages}
