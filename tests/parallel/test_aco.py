"""Attention co-processing: ranks without tokens take heads, and nothing changes but who computes. Attentions by
hypothesis on threads whose transfers are late, and on gloo ranks; whole videos of every model kind on gloo ranks."""

from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from pipedit.core.parallel import ParallelConfig
from pipedit.parallel.exchange import ExchangeShape, Inward
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.parallel.tuning import ROUNDS
from tests.parallel.cases import Case
from tests.parallel.helping import (
    ALONE,
    Job,
    Report,
    Turn,
    Video,
    make_alone,
    make_videos,
    run_among_some,
    run_failure,
    run_failures,
    run_job,
    run_jobs,
    run_masked,
    run_measured,
    run_refusals,
)
from tests.parallel.ranks import Ranks
from tests.parallel.stream_channel import Board, StreamChannel, run_members
from tests.parallel.videos import NEGATIVE, Settings

Gloo = Callable[[int], Ranks]
Folder = Callable[[str], Path]
TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}
CPU = torch.device("cpu")

# -- attentions -----------------------------------------------------------------------------------------------------


@st.composite
def turns(draw: st.DrawFn, denoisers: int, helpers: int, heads: int) -> Turn:
    """Any helpers, any shares: some may have nothing to do."""
    ours = tuple(rank for rank in range(denoisers, denoisers + helpers) if draw(st.booleans()))
    if not ours:
        return ALONE
    members = denoisers + len(ours)
    cuts = sorted(draw(st.lists(st.integers(0, heads), min_size=members - 1, max_size=members - 1)))
    shares = tuple(b - a for a, b in zip([0, *cuts], [*cuts, heads], strict=True))
    return Turn(helpers=(ours,), heads=shares)


@st.composite
def jobs(draw: st.DrawFn, *, most_ranks: int = 4) -> tuple[Job, int]:
    """A job, and the number of ranks."""
    denoisers = draw(st.integers(1, most_ranks - 1))
    helpers = draw(st.integers(1, min(2, most_ranks - denoisers)))
    chunks = draw(st.sampled_from([1, 2, 3, 9]))
    work = []
    for _ in range(draw(st.integers(1, 4))):
        heads = draw(st.integers(1, 7))
        case = Case(
            tokens=draw(st.integers(denoisers, 24)),
            heads=heads,
            batch=draw(st.integers(1, 2)),
            text_tokens=draw(st.sampled_from([0, 1, 5])),
            dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
            seed=draw(st.integers(0, 99)),
        )
        work.append((draw(turns(denoisers, helpers, heads)), case))
    config = ParallelConfig(ulysses_degree=denoisers, pipesp_chunks=chunks)
    return Job(config=config, turns=tuple(work)), denoisers + helpers


def on_threads(job: Job, size: int) -> list[list[Report]]:
    def member(board: Board, rank: int) -> list[Report]:
        opener = StreamChannel.opener(board, rank)
        runtime = ParallelRuntime(ranks=range(job.config.world_size), rank=rank, device="cpu", open_channel=opener)
        return run_job(runtime, rank, job)

    return run_members(size, CPU, member)


@hypothesis.settings(max_examples=150, deadline=None, database=None)
@hypothesis.given(jobs())
def test_any_split_with_helpers_equals_one_attention(drawn: tuple[Job, int]) -> None:
    job, size = drawn
    for rank, reports in enumerate(on_threads(job, size)):
        cases = [case for turn, case in job.turns if turn.has(rank, job.config.world_size)]
        for case, report in zip(cases, reports, strict=True):
            assert report.is_within(TOLERANCE[case.dtype]), (job, rank, report)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_split_on_gloo_ranks_equals_one_attention(gloo: Gloo, world_size: int) -> None:
    """Drawn by hypothesis, run in one go: process groups for each job cost more than the attention."""
    drawn: list[Job] = []

    @hypothesis.settings(max_examples=10, database=None, derandomize=True)
    @hypothesis.given(jobs(most_ranks=world_size))
    def collect(pair: tuple[Job, int]) -> None:
        drawn.append(pair[0])

    collect()
    for rank, by_job in enumerate(gloo(world_size).run(run_jobs, drawn)):
        for job, reports in zip(drawn, by_job, strict=True):
            cases = [case for turn, case in job.turns if turn.has(rank, job.config.world_size)]
            for case, report in zip(cases, reports, strict=True):
                assert report.is_within(TOLERANCE[case.dtype]), (job, rank, report)


TWO_HELP = Turn(helpers=((2, 3),), heads=(2, 2, 3, 1))
JOINT = Job(
    config=ParallelConfig(ulysses_degree=2, pipesp_chunks=2),
    turns=((TWO_HELP, Case(tokens=9, heads=8, text_tokens=5)),),
)


def test_text_that_helpers_do_not_get_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the comparison above depends on what helpers are sent."""
    assert all(report.is_within(2e-6) for reports in on_threads(JOINT, 4) for report in reports)
    monkeypatch.setattr(Inward, "sent_text", None)
    assert not any(report.is_within(1e-2) for reports in on_threads(JOINT, 4)[:2] for report in reports)


def test_chunks_are_measured_in_step_with_helpers(gloo: Gloo) -> None:
    """Two sets of helpers in turn, each measured for itself; and all ranks settle on the same."""
    case = Case(tokens=16, heads=8, text_tokens=3)
    pair = [(TWO_HELP, case), (Turn(helpers=((3,),), heads=(3, 3, 2)), case)]
    job = Job(config=ParallelConfig(ulysses_degree=2), turns=tuple(pair * (3 * ROUNDS + 2)))
    (first, chosen), *others = gloo(4).run(run_measured, job)
    assert all(report.is_within(2e-6) for report in first)
    assert len(chosen) == 2 and None not in chosen
    assert others[0][1] == chosen and others[1][1] == chosen[:1] and others[2][1] == chosen


def test_buffers_stay_bounded_whoever_helps(gloo: Gloo) -> None:
    case = Case(tokens=48, heads=8, head_dim=16, text_tokens=4)
    some = [ALONE, Turn(helpers=((2,),), heads=(3, 3, 2)), TWO_HELP, Turn(helpers=((3,),), heads=(4, 4, 0))]
    job = Job(
        config=ParallelConfig(ulysses_degree=2, pipesp_chunks=2),
        turns=tuple((turn, case) for turn in some * 4),
    )
    for rank, (reports,) in enumerate(gloo(4).run(run_jobs, [job])):
        held = [report.held_bytes for report in reports]
        rounds = len(held) // 4
        assert held[-rounds:] == [held[rounds - 1]] * rounds, (rank, held)
    helper = gloo(4).run(run_jobs, [JOINT])[3][0][0]
    # One head of 9 + 5 rows comes in and its results go out, to two ranks with text; see the docstrings.
    rows_in, rows_out, row = 3 * (9 + 5), 9 + 2 * 5, 8 * 4
    assert helper.held_bytes == (rows_in + rows_out) * row


def test_what_travels_to_helpers_and_back_is_told() -> None:
    """Two owners with 5 and 4 tokens and the text, two helpers; three heads for the first helper."""
    shape = ExchangeShape(
        tokens=(5, 4, 0, 0), chunks=((2, 2, 3, 1),), batch=2, head_dim=8, text_tokens=6, dtype=torch.bfloat16, helpers=2
    )
    row = 3 * 2 * 8 * 2
    assert shape.incoming_bytes(0, 2) == 3 * (5 + 4 + 6) * row
    assert shape.outgoing_bytes(0, 2) == (5 + 4 + 2 * 6) * row
    assert (shape.incoming_bytes(0, 0), shape.outgoing_bytes(0, 0)) == (3 * 4 * row * 2 // 3, (4 + 6) * row * 2 // 3)


# -- who meets, and what is refused ---------------------------------------------------------------------------------


def test_nobody_waits_for_ranks_that_take_no_part(gloo: Gloo) -> None:
    assert max(gloo(4).run(run_among_some)) < 1.5


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_all_go_on_in_a_new_epoch_after_a_failure_in_mid_exchange(gloo: Gloo, failing: int) -> None:
    for rank, report in enumerate(gloo(3).run(run_failure, failing, timeout_s=30.0)):
        assert report.felt_s < 5.0, report
        assert (report.sentence == "no luck") == (rank == failing) and report.sentence
        assert report.difference <= 2e-6


def test_failures_leave_no_files_and_no_threads_behind(gloo: Gloo) -> None:
    for counts in gloo(3).run(run_failures, 8, timeout_s=60.0):
        assert counts[2:] == [counts[2]] * 6


def test_what_nobody_can_help_with_is_refused_in_words(gloo: Gloo) -> None:
    for sentences in gloo(2).run(run_refusals):
        assert sentences == [
            "attention co-processing needs ring_degree=1, not 2",
            "cfg 1 x ring 1 x ulysses 1 is not for 2 denoise workers, so nobody can help them",
            "there are 1 groups of helpers for 2 groups of workers",
            "2 shares of heads are not one for each worker and helper of a group",
            "helpers [1] are not all different, or not all different from workers [0, 1]",
        ]


def test_masked_text_is_refused(gloo: Gloo) -> None:
    assert "cannot mask text" in gloo(2).run(run_masked)[0]


# -- whole videos ---------------------------------------------------------------------------------------------------

GUIDED: Settings = {"negative_prompt": NEGATIVE}
SETTINGS: dict[str, Settings] = {
    "wan": GUIDED,
    "wan22": GUIDED,
    "wan_ti2v": GUIDED,
    "hunyuan": {"true_cfg_scale": 2.0, **GUIDED},  # two forward passes, with texts of different lengths
}
ULYSSES, HALVES = ParallelConfig(ulysses_degree=2), ParallelConfig(cfg_degree=2, pipesp_chunks=2)
SOME = (
    Turn(helpers=((2,),), heads=(2, 1, 1)),
    ALONE,
    Turn(helpers=((2, 3),), heads=(1, 1, 1, 1)),
    Turn(helpers=((3,),), heads=(1, 1, 2)),
)
OF_HALVES = Turn(helpers=((2,), (3,)), heads=(3, 1))


def videos_of(kind: str) -> list[Video]:
    settings = SETTINGS[kind]
    three = ParallelConfig(ulysses_degree=3)
    return [
        Video(settings=settings, config=ULYSSES, turns=SOME),
        Video(settings=settings, config=HALVES, turns=(OF_HALVES, ALONE)),
        Video(settings=settings, config=ParallelConfig(), turns=(Turn(helpers=((1, 3),), heads=(1, 2, 1)), ALONE)),
        Video(settings=settings, config=three, turns=(Turn(helpers=((3,),), heads=(1, 1, 1, 1)),)),
        Video(settings=settings, config=ULYSSES, turns=(ALONE,)),
        Video(settings=settings, config=ULYSSES, turns=SOME, is_wrong=True),
    ]


@pytest.mark.parametrize("kind", SETTINGS)
def test_videos_are_the_same_whoever_helps_in_whichever_step(kind: str, gloo: Gloo, tiny_folder: Folder) -> None:
    videos, folder = videos_of(kind), str(tiny_folder(kind))
    expected = make_alone(folder, kind, SETTINGS[kind])
    by_rank = gloo(4).run(make_videos, folder, kind, videos)
    for number, video in enumerate(videos):
        first, *others = (by_rank[rank][number] for rank in range(video.config.world_size))
        assert all(torch.equal(first, other) for other in others)
        difference = float((first - expected).abs().max())
        if video.is_wrong:
            assert difference > 1e-3, "a helper's wrong results must be noticed"
        else:
            assert difference <= 1e-5, (video, difference)
