"""Workers killed and requests cancelled at every stage, on real processes: the short version of `pipedit bench faults`.

Most of it with workers that need no model, which start at once; then a little with real ones.
"""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from pipedit.bench import cancels, kills
from pipedit.bench.fault_subject import LAYOUTS, REQUESTS, Resources, Subject
from pipedit.bench.faults import choose_cases
from pipedit.bench.kills import Case
from pipedit.bench.striking import Death
from pipedit.core.errors import WorkerDiedError
from tests.executor.stand_ins import FAKE_WORKER

LAYOUT = next(iter(LAYOUTS.values()))  # two denoise, one does all the rest and helps
REAL = {"denoise_workers": 1, "decode_workers": 1, "encode_on": "decode"}  # which may help


def silent(_text: str) -> None: ...


@pytest.fixture
def fake() -> Iterator[Subject]:
    with Subject("tiny", LAYOUT, FAKE_WORKER) as subject:
        subject.warm_up()
        yield subject


def test_a_kill_at_each_stage_is_named_and_costs_one_request_at_most(fake: Subject) -> None:
    rng = random.Random(1)
    cases = [Case(stage=stage, rank=2 if stage == kills.HELPING else rng.randrange(3)) for stage in kills.STAGES]
    told, used = kills.run_kills(fake, cases, rng, silent)
    assert [problem for one in told for problem in one.problems] == []
    assert len(told) == len(used) - 1 == len(kills.STAGES)
    assert told[kills.STAGES.index(kills.IDLE)].doing == "waiting for work"


def test_cancels_touch_no_other_request(fake: Subject) -> None:
    figures = cancels.run_cancels(fake, 40, random.Random(2), silent)
    assert figures["problems"] == []
    assert figures["cancels"] == 40
    assert figures["cancelled"] > 10
    assert figures["untouched"] > 10


def test_a_wrong_video_is_found(fake: Subject) -> None:
    fake.videos = tuple(np.bitwise_xor(video, 16) for video in fake.videos)
    one = kills.kill(fake, Case(stage="mid step", rank=1), random.Random(3))
    assert sum("differs by 16" in problem for problem in one.problems) == len(REQUESTS) - one.failed
    assert any("differs" in problem for problem in cancels.run_cancels(fake, 1, random.Random(3), silent)["problems"])


def test_a_wrong_culprit_and_a_late_error_are_found(fake: Subject) -> None:
    outcome = fake.run([0])
    death = Death(error=WorkerDiedError("exit code 1", rank=1, doing="denoising"), command=None, after_s=6.0)
    problems = list(kills.death_problems(Case(stage="mid step", rank=0), [death], outcome))
    assert len(problems) == 3
    assert list(kills.outcome_problems(fake, outcome, set())) == []
    assert len(list(kills.outcome_problems(fake, outcome, set(outcome.requests)))) == 1, "it should have failed"


def test_what_hangs_is_found(fake: Subject) -> None:
    fake.executor.deadline_s = 0.0
    with pytest.raises(TimeoutError, match="there is no end to it"):
        fake.executor.receive(1.0)


def test_every_case_comes_before_any_comes_twice() -> None:
    cases = [Case(stage=stage, rank=0) for stage in kills.STAGES]
    rng = random.Random(4)
    assert set(choose_cases(cases, None, rng)) == set(cases)
    assert set(choose_cases(cases, len(cases) + 2, rng)[: len(cases)]) == set(cases)
    assert len(choose_cases(cases, 3, rng)) == 3


@pytest.mark.slow
def test_real_workers() -> None:
    before, rng = Resources.now(), random.Random(5)
    with Subject("tiny", REAL) as subject:
        subject.warm_up()
        cases = [Case(stage="mid step", rank=1), Case(stage=kills.HAND_OVER, rank=0)]
        told, _ = kills.run_kills(subject, cases, rng, silent)
        assert [problem for one in told for problem in one.problems] == []
        figures = cancels.run_cancels(subject, 12, rng, silent)
        assert figures["problems"] == []
        assert figures["cancelled"] > 2
    assert list(Resources.now().problems(before)) == []
