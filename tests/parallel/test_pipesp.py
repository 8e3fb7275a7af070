"""Ulysses and PipeSP on gloo ranks against one plain attention: any split, any chunking, text, masks, precisions."""

from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from pipedit.core.parallel import ParallelConfig
from pipedit.parallel.pipesp import _pick
from pipedit.parallel.tuning import ROUNDS
from tests.parallel.cases import (
    Case,
    run_after_failure,
    run_branches,
    run_cases,
    run_exchanges,
    run_measured,
    run_misuse,
    run_recorded,
    run_two_attentions,
    run_wrong_order,
)
from tests.parallel.ranks import Ranks

Group = Callable[[int], Ranks]
TOLERANCE = {"float64": 1e-14, "float32": 2e-6, "bfloat16": 2e-2}


@st.composite
def configs(draw: st.DrawFn, world_size: int) -> ParallelConfig:
    ring = draw(st.sampled_from([d for d in range(1, world_size + 1) if world_size % d == 0]))
    chunks: int | str = draw(st.one_of(st.sampled_from([1, 2, 3, 8]), st.just("auto")))
    return ParallelConfig(ring_degree=ring, ulysses_degree=world_size // ring, pipesp_chunks=chunks)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    text = draw(st.sampled_from([0, 0, 3, 7]))
    return Case(
        tokens=draw(st.integers(4, 40)),
        heads=draw(st.integers(1, 9)),
        head_dim=draw(st.sampled_from([8, 16])),
        batch=draw(st.integers(1, 2)),
        text_tokens=text,
        masked=text > 0 and draw(st.booleans()),
        dtype=draw(st.sampled_from(["float32", "float32", "bfloat16"])),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_random_cases_equal_one_attention(gloo: Group, world_size: int) -> None:
    """Drawn by hypothesis, run in one go: a job for each rank costs more than the attention."""
    jobs: list[tuple[ParallelConfig, Case]] = []

    @hypothesis.settings(max_examples=40, database=None, derandomize=True)
    @hypothesis.given(configs(world_size), cases())
    def collect(config: ParallelConfig, case: Case) -> None:
        jobs.append((config, case))

    collect()
    assert len(jobs) >= 30
    for reports in gloo(world_size).run(run_cases, jobs):
        for (config, case), report in zip(jobs, reports, strict=True):
            limit = TOLERANCE[case.dtype]
            assert report["difference"] <= limit and report["text_difference"] <= limit, (config, case, report)


@pytest.mark.parametrize("overlap", ["full", "output_only", "none"])
def test_every_overlap_and_chunking_gives_the_same(gloo: Group, overlap: str) -> None:
    case = Case(tokens=37, heads=7, head_dim=16, text_tokens=5)
    jobs = [(ParallelConfig(ulysses_degree=3, pipesp_chunks=chunks), case) for chunks in (1, 2, 3, 99)]
    for reports in gloo(3).run(run_cases, jobs, overlap):
        # Not `max`: it overlooks a nan, which stands for what was never written.
        assert all(report["difference"] <= TOLERANCE["float32"] for report in reports)
        assert all(report["text_difference"] <= TOLERANCE["float32"] for report in reports)


def test_double_precision_is_kept(gloo: Group) -> None:
    case = Case(tokens=37, text_tokens=5, dtype="float64")
    jobs = [(ParallelConfig(ulysses_degree=2, pipesp_chunks=2), case), (ParallelConfig(ring_degree=2), case)]
    for reports in gloo(2).run(run_cases, jobs):
        assert all(report["difference"] <= TOLERANCE["float64"] for report in reports)


def test_results_come_in_as_many_runs_as_chunks_and_in_order(gloo: Group) -> None:
    case, counts = Case(tokens=16, heads=8), (1, 2, 4, 99)
    jobs = [(ParallelConfig(ulysses_degree=2, pipesp_chunks=count), case) for count in counts]
    reports = gloo(2).run(run_cases, jobs)[0]
    for count, report in zip(counts, reports, strict=True):
        runs = report["runs"]
        assert len(runs) == min(count, 4)
        assert [run[0] for run in runs] == [0, *(run[1] for run in runs[:-1])] and runs[-1][1] == 8


def test_wrong_heads_are_noticed(gloo: Group) -> None:
    """The comparison can fail: heads put back in the ranks' order instead of the model's differ."""
    assert min(gloo(2).run(run_wrong_order)) > 0.1


def test_buffers_do_not_grow_and_are_smaller_than_those_of_plain_ulysses(gloo: Group) -> None:
    case = Case(tokens=64, heads=16, head_dim=16)
    plain = (ParallelConfig(ulysses_degree=2, pipesp_chunks=1), case)
    piped = (ParallelConfig(ulysses_degree=2, pipesp_chunks=8), case)
    for first, *later in gloo(2).run(run_cases, [piped] * 4):
        assert all(report["bytes"] == first["bytes"] for report in later)
    [whole] = gloo(2).run(run_cases, [plain])[0]
    [some, *_] = gloo(2).run(run_cases, [piped])[0]
    chunk = whole["bytes"] / 8
    assert some["bytes"] <= whole["bytes"] + 2 * chunk
    assert some["bytes"] < 0.6 * whole["bytes"]


def test_what_was_tried_leaves_no_buffers_behind(gloo: Group) -> None:
    """Plain Ulysses, which is among the candidates, takes more memory than what may be chosen."""
    case = Case(tokens=64, heads=8, head_dim=16)
    for report in gloo(2).run(run_measured, ParallelConfig(ulysses_degree=2), [case] * (3 * ROUNDS + 1)):
        assert report["bytes"] == report["given_bytes"], report
        assert all(difference <= TOLERANCE["float32"] for difference in report["differences"])


def test_rings_measure_in_step_whatever_their_own_share_is(gloo: Group) -> None:
    """19 and 20 tokens are the same 5 + 5 for the first ring member, but not for the second; and rings need the same
    chunks everywhere."""
    cases = [Case(tokens=19), *[Case(tokens=20)] * (2 * ROUNDS), Case(tokens=19)]
    reports = gloo(4).run(run_measured, ParallelConfig(ring_degree=2, ulysses_degree=2), cases, timeout_s=30.0)
    assert len({report["chunks"] for report in reports}) == 1
    for report in reports:
        assert all(difference <= TOLERANCE["float32"] for difference in report["differences"]), report


def test_measuring_goes_on_in_step_after_a_failure(gloo: Group) -> None:
    """The rank that failed has not counted the call that the others have."""
    for report in gloo(2).run(run_after_failure, timeout_s=30.0):
        assert report["left_bytes"] == 0
        assert all(difference <= TOLERANCE["float32"] for difference in report["differences"]), report


def test_rows_in_one_piece_are_not_copied() -> None:
    query = torch.empty(1, 2, 9, 4)
    for rows in ([slice(0, 4), slice(9, 9)], [slice(2, 5), slice(5, 9)], [slice(3, 3), slice(4, 9)]):
        assert _pick(query, rows).untyped_storage().data_ptr() == query.untyped_storage().data_ptr()
    assert _pick(query, [slice(0, 4), slice(7, 9)]).shape[2] == 6
    assert _pick(query, [slice(3, 3), slice(9, 9)]).shape[2] == 0


def test_helpers_without_tokens_and_owners_without_heads(gloo: Group) -> None:
    """Uneven splits with zeros, straight on the exchange: what attention co-processing will use."""
    splits = [((5, 0, 9), (2, 3, 0)), ((1, 0, 0), (0, 4, 1)), ((7, 7, 7), (0, 0, 5)), ((0, 3, 1), (1, 1, 1))]
    for differences in gloo(3).run(run_exchanges, splits):
        assert all(difference == 0.0 for difference in differences)


def test_spans_say_what_was_computed_and_what_travelled(gloo: Group) -> None:
    case = Case(tokens=64, heads=8, head_dim=16)
    for rank, spans in enumerate(gloo(2).run(run_recorded, case, 4)):
        assert {(span.rank, span.role, span.what) for span in spans} == {
            (rank, "compute", "attention"),
            (rank, "compute", "wait"),
            (rank, "network", "input exchange"),
            (rank, "network", "output exchange"),
        }
        assert all(span.end_s >= span.start_s for span in spans)
        moved = {span.what: 0 for span in spans if span.role == "network"}
        for span in spans:
            if span.what in moved:
                moved[span.what] += span.payload_bytes
        half = 32 * 4 * 16 * 4  # half of the tokens, half of the heads, in bytes
        assert moved == {"input exchange": 3 * half, "output exchange": half}


def test_guidance_branches_are_shared_and_come_out_the_same(gloo: Group) -> None:
    for rank, report in enumerate(gloo(4).run(run_branches)):
        assert report == {"computed": [rank // 2], "equal": True, "alone": 1}


def test_what_cannot_be_shared_is_refused_in_words(gloo: Group) -> None:
    for sentences in gloo(2).run(run_misuse):
        assert sentences == [
            "cfg 1 x ring 1 x ulysses 3 is for 3 workers, but there are 2",
            "1 latent tokens cannot be shared by 2 workers; take fewer workers or a larger video",
        ]


def test_two_attentions_at_once_are_refused_and_do_no_harm(gloo: Group) -> None:
    for report in gloo(2).run(run_two_attentions):
        assert "another attention over these ranks is still under way" in report["sentence"]
        assert report["left"] == 1
        assert report["difference"] <= TOLERANCE["float32"]
