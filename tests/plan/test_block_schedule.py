"""DualParal's schedule: blocks, what their steps need, the orders, and how long stages stand idle."""

import dataclasses
import itertools
import random
import tracemalloc
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedit.core.blocks import BlockPlan, Dependency, Kind, Op, Prefix, Source
from pipedit.plan.block_orders import eager_order, order_of, published_order
from pipedit.plan.block_schedule import Progress, check_order
from pipedit.plan.block_simulation import SimulatedOrder, pending_entries, simulate_order, spans, time_order
from pipedit.plan.block_table import describe, table_lines
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_svg import draw_svg

DEPTHS = range(1, 9)
LAST_K = 40


def blocks(count: int | None, num_steps: int, prefix: Prefix = Prefix.CACHE, context: int = 1) -> BlockPlan:
    """A plan by its number of blocks: what orders and idle slots depend on. Two latent frames a block."""
    latents = None if count is None else 2 * count
    return BlockPlan(latents=latents, block_latents=2, context_latents=context, num_steps=num_steps, prefix=prefix)


def published(plan: BlockPlan, depth: int) -> SimulatedOrder:
    return simulate_order(published_order(plan), plan, depth)


def eager(plan: BlockPlan, depth: int) -> SimulatedOrder:
    return simulate_order(eager_order(plan, depth), plan, depth)


def the_same(values: tuple[float, ...]) -> float:
    """Equal stages are idle equally long."""
    assert len(set(values)) == 1, values
    return values[0]


@st.composite
def plans(draw: st.DrawFn) -> BlockPlan:
    size = draw(st.integers(1, 4))
    prefix = draw(st.sampled_from(Prefix))
    return BlockPlan(
        latents=draw(st.integers(1, 40)),
        block_latents=size,
        context_latents=draw(st.integers(0, size)),
        num_steps=draw(st.integers(1, 9)),
        prefix=prefix,
        compat=prefix == Prefix.RERUN and draw(st.booleans()),
    )


def orders(plan: BlockPlan, depth: int) -> Iterator[Callable[[], Iterator[Op]]]:
    yield lambda: published_order(plan)
    yield lambda: eager_order(plan, depth)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_blocks_have_equal_lengths_and_the_last_one_the_rest() -> None:
    plan = BlockPlan(latents=21, block_latents=8, context_latents=6, num_steps=4)
    assert [plan.latents_of(block) for block in range(3)] == [8, 8, 5]
    assert [plan.first_latent(block) for block in range(3)] == [0, 8, 16]
    assert [plan.prefix_latents(block) for block in range(3)] == [0, 6, 6]
    assert [plan.suffix_latents(block) for block in range(3)] == [6, 5, 0]  # the last block has no more than 5
    assert [plan.window_latents(block) for block in range(3)] == [8, 8, 5]
    rerun = dataclasses.replace(plan, prefix=Prefix.RERUN)
    assert [rerun.window_latents(block) for block in range(3)] == [8, 14, 11]
    assert (plan.num_blocks, plan.output_latents) == (3, 21)


def test_compat_makes_the_lengths_of_the_released_code() -> None:
    """Forty latents in blocks of 8 with 8: 48 come out, which are 189 frames (paper notes, section 3)."""
    plan = BlockPlan(latents=40, block_latents=8, context_latents=8, num_steps=50, prefix=Prefix.RERUN, compat=True)
    assert [plan.latents_of(block) for block in range(5)] == [16, 8, 8, 8, 8]
    assert {plan.window_latents(block) for block in range(5)} == {16}  # every message has the same size
    assert plan.output_latents == 48
    uneven = dataclasses.replace(plan, latents=30, block_latents=8, context_latents=3)
    assert (uneven.num_blocks, uneven.output_latents, uneven.latents_of(3)) == (4, 35, 8)


@given(plan=plans())
def test_blocks_lie_end_to_end(plan: BlockPlan) -> None:
    assert plan.problems() == []
    assert plan.num_blocks is not None
    ends = [plan.first_latent(block) + plan.latents_of(block) for block in range(plan.num_blocks)]
    assert [0, *ends[:-1]] == [plan.first_latent(block) for block in range(plan.num_blocks)]
    assert ends[-1] == plan.output_latents


def test_a_video_shorter_than_a_block_is_one_block_that_needs_only_itself() -> None:
    plan = BlockPlan(latents=3, block_latents=8, context_latents=4, num_steps=2)
    assert (plan.num_blocks, plan.latents_of(0), plan.window_latents(0)) == (1, 3, 3)
    assert list(eager_order(plan, 2)) == list(published_order(plan)) == [Op(0, 0), Op(0, 1)]
    assert plan.dependencies(Op(0, 1)) == (Dependency(Op(0, 1), Op(0, 0), Source.OWN, Kind.RESULT, 3),)


def test_an_endless_plan_has_no_last_block() -> None:
    plan = BlockPlan(latents=None, block_latents=4, context_latents=2, num_steps=3)
    assert plan.problems() == []
    assert (plan.num_blocks, plan.output_latents) == (None, None)
    assert (plan.latents_of(10**6), plan.suffix_latents(10**6), plan.first_latent(10**6)) == (4, 2, 4 * 10**6)
    assert not plan.has(Op(5, 3))
    assert not plan.has(Op(-1, 0))


def test_every_problem_is_told_at_once() -> None:
    zero = BlockPlan(latents=0, block_latents=0, context_latents=-1, num_steps=0, compat=True)
    assert zero.problems() == [
        "block_size=0 must be at least 1",
        "context=-1 must be at least 0",
        "num_inference_steps=0 must be at least 1",
        "num_latent_frames=0 must be at least 1",
        "dualparal_compat needs prefix='rerun': the released code has no prefix cache",
    ]
    wide = BlockPlan(latents=None, block_latents=8, context_latents=9, num_steps=True, prefix="again")  # type: ignore[arg-type]
    assert wide.problems() == [
        "num_inference_steps=True should be a whole number",
        "prefix='again' is unknown; use 'cache' or 'rerun'",
    ]
    assert dataclasses.replace(wide, num_steps=1, prefix=Prefix.CACHE).problems() == [
        "context=9 is more than block_size=8: a block sees only its neighbours; use 0 to 8"
    ]


# -- dependencies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix", "kind"), [(Prefix.CACHE, Kind.FEATURES), (Prefix.RERUN, Kind.RESULT)])
def test_an_op_needs_itself_and_both_neighbours(prefix: Prefix, kind: Kind) -> None:
    plan = BlockPlan(latents=11, block_latents=4, context_latents=4, num_steps=3, prefix=prefix)
    assert plan.dependencies(Op(1, 2)) == (
        Dependency(Op(1, 2), Op(1, 1), Source.OWN, Kind.RESULT, 4),
        Dependency(Op(1, 2), Op(0, 2), Source.PREDECESSOR, kind, 4),
        Dependency(Op(1, 2), Op(2, 1), Source.SUCCESSOR, Kind.FEATURES, 3),
    )
    assert [d.source for d in plan.dependencies(Op(1, 0))] == [Source.PREDECESSOR]  # nothing of later blocks yet
    assert [d.source for d in plan.dependencies(Op(0, 1))] == [Source.OWN, Source.SUCCESSOR]
    assert [d.source for d in plan.dependencies(Op(2, 1))] == [Source.OWN, Source.PREDECESSOR]
    assert [(d.user, d.source) for d in plan.hand_overs(Op(1, 1))] == [
        (Op(0, 2), Source.SUCCESSOR),
        (Op(1, 2), Source.OWN),
        (Op(2, 1), Source.PREDECESSOR),
    ]


def test_without_context_blocks_are_strangers() -> None:
    plan = BlockPlan(latents=12, block_latents=4, context_latents=0, num_steps=3)
    assert {d.source for block in range(3) for d in plan.dependencies(Op(block, 1))} == {Source.OWN}
    assert plan.dependencies(Op(1, 0)) == ()


@given(plan=plans())
def test_hand_overs_are_dependencies_seen_from_the_other_side(plan: BlockPlan) -> None:
    assert plan.num_blocks is not None
    ops = [Op(block, step) for block in range(plan.num_blocks) for step in range(plan.num_steps)]
    needed = [d for op in ops for d in plan.dependencies(op)]
    assert sorted(needed) == sorted(d for op in ops for d in plan.hand_overs(op))
    assert all(plan.has(d.maker) and d.latents >= 1 for d in needed)


# -- orders -----------------------------------------------------------------------------------------------------------


@given(plan=plans(), depth=st.integers(1, 9))
def test_every_order_is_legal(plan: BlockPlan, depth: int) -> None:
    for order in orders(plan, depth):
        assert check_order(order(), plan) == []
        ops, seen = list(order()), set[Op]()
        assert len(ops) == len(set(ops)) == (plan.num_blocks or 0) * plan.num_steps
        for op in ops:  # once more without the checker
            assert seen.issuperset(d.maker for d in plan.dependencies(op))
            seen.add(op)


@given(plan=plans(), depth=st.integers(1, 9))
def test_neighbours_stay_within_a_step_and_keep_one_entry_between_them(plan: BlockPlan, depth: int) -> None:
    plan = dataclasses.replace(plan, context_latents=max(1, plan.context_latents))
    assert plan.num_blocks is not None
    for order in orders(plan, depth):
        progress, entries = Progress(plan), set[Dependency]()
        for op in order():
            entries -= set(plan.dependencies(op))
            entries |= {d for d in plan.hand_overs(op) if d.kind == Kind.FEATURES}
            progress.advance(op)
            done = [progress.steps_done(block) for block in range(plan.num_blocks)]
            assert all(a - 1 <= b <= a for a, b in itertools.pairwise(done))
            for older in range(plan.num_blocks - 1):
                between = [d for d in entries if {d.user.block, d.maker.block} == {older, older + 1}]
                is_begun, is_over = done[older] > 0, done[older + 1] == plan.num_steps
                if plan.prefix == Prefix.CACHE:
                    assert len(between) == (is_begun and not is_over)
                else:
                    assert len(between) <= 1  # nothing is kept while the predecessor's latents are on their way
        assert entries == set()


def test_published_order_goes_from_tail_to_head() -> None:
    order = [str(op) for op in published_order(blocks(3, 2))]
    assert order == ["b0 s0", "b1 s0", "b0 s1", "b2 s0", "b1 s1", "b2 s1"]


@given(plan=plans(), depth=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_swap_of_dependent_ops_is_found(plan: BlockPlan, depth: int, seed: int) -> None:
    for make in orders(plan, depth):
        order = list(make())
        place = {op: number for number, op in enumerate(order)}
        pairs = [(place[d.maker], place[op]) for op in order for d in plan.dependencies(op)]
        if pairs:
            first, second = random.Random(seed).choice(pairs)
            order[first], order[second] = order[second], order[first]
            assert check_order(order, plan)


def test_what_is_wrong_with_an_order_is_said() -> None:
    plan = blocks(2, 2)
    good = [Op(0, 0), Op(1, 0), Op(0, 1), Op(1, 1)]
    assert check_order(good, plan) == []
    assert check_order([good[0], good[2], good[1], good[3]], plan) == [
        "b0 s1 comes before b1 s0, whose features it needs",
        "b1 s1 comes before b0 s1, whose features it needs",
        "block 0 ends after 1 of 2 steps",
        "block 1 ends after 1 of 2 steps",
    ]
    assert check_order(good[:3], plan) == ["block 1 ends after 1 of 2 steps"]
    assert check_order([*good, Op(1, 1), Op(2, 0)], plan) == ["b1 s1 comes twice", "b2 s0 does not exist"]
    with pytest.raises(AssertionError, match="out of turn"):
        simulate_order([good[0], good[1], good[3], good[2]], dataclasses.replace(plan, prefix=Prefix.RERUN), 2)


def test_what_is_left_of_a_legal_order_is_legal_on_any_depth() -> None:
    """So a run can go on with another number of stages: by its order, without the ops that are done."""
    plan = blocks(9, 4)
    done = list(itertools.islice(eager_order(plan, 3), 17))
    rest = [op for op in eager_order(plan, 5) if op not in done]
    assert check_order([*done, *rest], plan) == []


@pytest.mark.parametrize("prefix", Prefix)
@pytest.mark.parametrize("context", [0, 1])
def test_endless_orders_take_constant_memory(prefix: Prefix, context: int) -> None:
    plan = blocks(None, 5, prefix, context)

    def peak(order: Iterator[Op], count: int) -> int:
        tracemalloc.start()
        assert sum(1 for _ in itertools.islice(time_order(order, plan, 3), count)) == count
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    for order in orders(plan, 3):
        assert check_order(itertools.islice(order(), 500), plan) == []
        peak(order(), 10)  # whatever is made once
        assert peak(order(), 1200) < peak(order(), 300) + 2000


# -- idle slots -------------------------------------------------------------------------------------------------------


def counts(depth: int, *, from_count: int) -> Iterator[tuple[int, int]]:
    """Pairs of blocks and steps, both at least as many as stages where asked for."""
    for count in range(from_count, LAST_K + 1):
        yield count, depth
        if count in (depth, depth + 1, 17, LAST_K):
            yield count, depth + 3
    yield max(from_count, 5), 50


@pytest.mark.parametrize("depth", DEPTHS)
def test_published_order_with_features_idles_as_analysed(depth: int) -> None:
    """Blocks wait for their own result only. Over the whole run each stage is idle (N - 1)^2 slots, of which N - 1 are
    the pipeline's own filling and emptying, so (N - 1)(N - 2) lie between its first and its last op. K >= N, T >= N."""
    for count, num_steps in counts(depth, from_count=depth):
        run = published(blocks(count, num_steps), depth)
        assert the_same(run.idle_s) == (depth - 1) ** 2, (count, num_steps)
        assert the_same(run.idle_within_s) == (depth - 1) * (depth - 2), (count, num_steps)


@pytest.mark.parametrize("depth", DEPTHS)
def test_published_order_with_rerun_idles_as_analysed(depth: int) -> None:
    """Blocks wait for their predecessor's result too. Between its first and its last op a stage is idle N^2 - N slots:
    the paper's N^2 - N - 1 and one. It takes K > N: with K = N no block joins any more to fill the slot in which the
    tail waits for its predecessor, one in each of the T - N iterations without a change. T >= N."""
    for count, num_steps in counts(depth, from_count=depth):
        run = published(blocks(count, num_steps, Prefix.RERUN), depth)
        waits = num_steps - depth if count == depth > 1 else 0
        assert the_same(run.idle_within_s) == depth * (depth - 1) + waits, (count, num_steps)
        assert waits or abs(the_same(run.idle_within_s) - (depth * depth - depth - 1)) <= 1
        assert the_same(run.idle_s) == the_same(run.idle_within_s) + depth - 1


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("num_steps", [1, 4, 11])
def test_fewer_blocks_than_stages_leave_the_published_order_idle_in_every_iteration(depth: int, num_steps: int) -> None:
    """With features a step of all blocks takes N slots, with rerun N + 1, however few blocks there are."""
    for count in range(2, depth + 1):
        if num_steps >= count:
            run = published(blocks(count, num_steps), depth)
            assert the_same(run.idle_within_s) == (num_steps + count - 3) * depth + 2 - num_steps * count
        run = published(blocks(count, num_steps, Prefix.RERUN), depth)
        chain = (count - 1) * depth + (num_steps - 1) * (depth + 1) + 1
        assert the_same(run.idle_within_s) == chain - num_steps * count


def test_five_blocks_on_eight_stages() -> None:
    """N = 8, K = 5, T = 50: 175 and 231 idle slots (paper notes, section 7), far from the formula's 55. The rule for
    K >= N would be broken too: this is the control for the tests above."""
    assert the_same(published(blocks(5, 50), 8).idle_s) == 175
    assert the_same(published(blocks(5, 50, Prefix.RERUN), 8).idle_s) == 231
    assert the_same(eager(blocks(5, 50), 8).idle_s) == 3 * 49 + 7  # five blocks cannot fill eight stages


@pytest.mark.parametrize("depth", DEPTHS)
def test_eager_order_idles_only_where_there_are_fewer_blocks_than_stages(depth: int) -> None:
    """Between its first and its last op a stage is idle (N - K)(T - 1) slots, and none if K >= N. Less cannot be: each
    block's steps are N slots apart, and the last block begins K - 1 slots after the first."""
    for count in (*range(1, 13), 16, 17, 25, LAST_K):
        for num_steps in (1, 2, 3, depth, 10):
            run = eager(blocks(count, num_steps), depth)
            assert the_same(run.idle_within_s) == max(0, (depth - count) * (num_steps - 1)), (count, num_steps)
            assert the_same(run.idle_s) == the_same(run.idle_within_s) + depth - 1


@settings(max_examples=60)
@given(plan=plans(), depth=st.integers(1, 9))
def test_eager_order_is_never_behind_the_published_one(plan: BlockPlan, depth: int) -> None:
    old, new = published(plan, depth), eager(plan, depth)
    assert new.makespan_s <= old.makespan_s
    assert new.finished_s[0] <= old.finished_s[0]
    assert list(new.finished_s) == sorted(new.finished_s)  # streaming decode takes them in order
    if plan.context_latents and plan.prefix == Prefix.RERUN:
        assert new.ops == old.ops  # results leave no choice
    elif plan.num_blocks is not None:
        assert the_same(new.idle_within_s) == max(0, (depth - plan.num_blocks) * (plan.num_steps - 1))


@pytest.mark.parametrize(("depth", "num_steps"), [(4, 8), (8, 4), (8, 20), (2, 12)])
def test_eager_order_finishes_the_first_block_as_soon_as_can_be(depth: int, num_steps: int) -> None:
    """Before its last step come all ops (b, s) with b + s < T, and its own ones are N slots apart."""
    first = num_steps * (num_steps + 1) // 2 - 1
    for plan in (blocks(3 * max(depth, num_steps), num_steps), blocks(None, num_steps)):
        last = next(t for t in time_order(eager_order(plan, depth), plan, depth) if t.op == Op(0, num_steps - 1))
        assert last.starts_s[0] == max(first, (num_steps - 1) * depth)


@pytest.mark.parametrize(("depth", "hand_over_s"), [(2, 0.5), (4, 0.25), (8, 0.125)])
def test_order_for_workers_hides_hand_overs_that_take_a_slot_in_all(depth: int, hand_over_s: float) -> None:
    plan = blocks(20, 6)
    run = simulate_order(order_of(plan, depth), plan, depth, hand_over_s=hand_over_s)
    assert the_same(run.idle_within_s) == 0
    tight = simulate_order(eager_order(plan, depth), plan, depth, hand_over_s=hand_over_s)
    assert the_same(tight.idle_within_s) > 0  # the control: results are late for an order that wants them at once
    assert simulate_order(order_of(plan, 1), plan, 1, hand_over_s=hand_over_s).idle_s == (0,)
    compat = dataclasses.replace(plan, prefix=Prefix.RERUN, compat=True)
    assert list(order_of(compat, depth)) == list(published_order(compat))


def test_oldest_first_alone_would_leave_holes_at_the_end() -> None:
    """The control for the claim that the tail is worth its lines: an endless order without its later blocks."""
    plan, depth = blocks(20, 10), 5
    endless = itertools.islice(eager_order(blocks(None, 10), depth), 2 * 20 * 10)
    oldest_first = [op for op in endless if op.block < 20]
    assert check_order(oldest_first, plan) == []
    run = simulate_order(oldest_first, plan, depth)
    assert the_same(run.idle_within_s) > 0
    assert the_same(eager(plan, depth).idle_within_s) == 0


# -- simulation -------------------------------------------------------------------------------------------------------


def test_stages_of_different_speed_and_hand_overs_by_hand() -> None:
    """One block, two steps, stages of 2 s and 3 s, 1 s on the way: 2 + 1 + 3 + 1 a step."""
    run = simulate_order(published_order(plan := blocks(1, 2)), plan, 2, lambda stage, _: 2 + stage, 1)
    assert [timed.starts_s for timed in run.ops] == [(0, 3), (7, 10)]
    assert [timed.ends_s for timed in run.ops] == [(2, 6), (9, 13)]
    assert (run.makespan_s, run.finished_s, run.busy_s) == (14, (14,), (4, 6))
    assert (run.idle_s, run.idle_within_s) == ((10, 8), (5, 4))
    assert run.utilisation == pytest.approx(10 / 28)


def test_one_stage_needs_no_hand_over() -> None:
    plan = blocks(6, 5)
    for order in orders(plan, 1):
        run = simulate_order(order(), plan, 1, hand_over_s=100)
        assert (run.makespan_s, run.idle_s, run.idle_within_s) == (30, (0,), (0,))


@settings(max_examples=40)
@given(plan=plans(), depth=st.integers(1, 5), hand_over_s=st.sampled_from([0.0, 0.25, 3.0]))
def test_nothing_begins_before_what_it_needs(plan: BlockPlan, depth: int, hand_over_s: float) -> None:
    def seconds_of(stage: int, op: Op) -> float:
        return 1 + (stage * 3 + op.block * 5 + op.step) % 4

    for order in orders(plan, depth):
        run = simulate_order(order(), plan, depth, seconds_of, hand_over_s)
        timed = {t.op: t for t in run.ops}
        for t in run.ops:
            for d in plan.dependencies(t.op):
                maker = timed[d.maker]
                if d.kind == Kind.RESULT:
                    assert t.starts_s[0] >= maker.result_s
                assert all(start >= end for start, end in zip(t.starts_s, maker.ends_s, strict=True))
            for stage in range(1, depth):
                assert t.starts_s[stage] >= t.ends_s[stage - 1] + hand_over_s
        for before, after in itertools.pairwise(run.ops):
            assert all(start >= end for start, end in zip(after.starts_s, before.ends_s, strict=True))


def test_blocks_in_flight_and_entries_follow_the_number_of_steps_not_the_length() -> None:
    """In the steady state there are T blocks in flight, and one entry for each pair of neighbours and the next block;
    where T < N, more blocks are needed to fill the stages."""
    for count in (20, 40):
        old, new = published(blocks(count, 8), 5), eager(blocks(count, 8), 5)
        assert (old.most_in_flight, new.most_in_flight) == (9, 9)  # the last result is on its way
        assert (old.most_pending, new.most_pending) == (9, 9)
        assert published(blocks(count, 8, Prefix.RERUN), 5).most_pending == 1
    assert published(blocks(5, 1), 1).most_in_flight == 1  # each is over as the next one begins
    assert eager(blocks(LAST_K, 4), 8).most_in_flight == 10
    assert eager(blocks(LAST_K, 4, context=0), 8).most_in_flight <= 2 * 8
    assert max(pending_entries(itertools.islice(eager_order(blocks(None, 8), 5), 900), blocks(None, 8))) == 9


def test_few_steps_profit_most() -> None:
    """1,025 frames in 33 blocks of 8 latents, 4 steps, 8 stages: 57 % as published (paper notes, section 7)."""
    plan = BlockPlan(latents=257, block_latents=8, context_latents=4, num_steps=4)
    old, new = published(plan, 8), eager(plan, 8)
    assert old.utilisation == pytest.approx(0.57, abs=0.005)
    assert new.utilisation == pytest.approx(4 * 33 / (4 * 33 + 7))


def test_spans_make_a_timeline_that_can_be_drawn() -> None:
    plan = blocks(4, 3)
    run = eager(plan, 2)
    made = tuple(spans(run.ops, "r0", first_rank=3))
    timeline = Timeline(spans=made)
    assert timeline.ranks == (3, 4)
    assert timeline.makespan_s == run.makespan_s
    assert {(span.block, span.index) for span in made} == {tuple(t.op) for t in run.ops}
    busy = {occupancy.ranks[0]: occupancy.busy_s for occupancy in timeline.rank_occupancy()}
    assert busy == {3: 12, 4: 12}
    picture = draw_svg(timeline)
    assert "block 2" in picture
    assert "step 1" in picture


# -- the table --------------------------------------------------------------------------------------------------------


def test_table_shows_who_is_where_and_what_is_handed_over() -> None:
    plan = BlockPlan(latents=5, block_latents=4, context_latents=2, num_steps=2)
    lines = [line.split("  ") for line in describe(plan, 2, published_order(plan)).splitlines()]
    told = [" | ".join(cell.strip() for cell in line if cell.strip()) for line in lines]
    assert told == [
        "5 latent frames in 2 blocks (4, 1), context 2 (cache prefix), 2 steps, 2 stages",
        "5 slots, of which a stage is idle in 1 (0 between its first and its last op), 80.0% used; "
        "first block after 4; blocks in flight: at most 2; entries kept: at most 1",
        "slot | stage 0 | stage 1 | receives | keeps",
        "0 | b0 s0 | - | last 2 for b1 s0",
        "1 | b1 s0 | b0 s0 | features of b0 s0 (last 2) | first 1 for b0 s1",
        "2 | b0 s1 | b1 s0 | own result; features of b1 s0 (first 1) | last 2 for b1 s1",
        "3 | b1 s1 | b0 s1 | own result; features of b0 s1 (last 2)",
        "4 | - | b1 s1",
    ]


@given(plan=plans(), depth=st.integers(1, 4))
def test_table_has_every_op_once_on_every_stage(plan: BlockPlan, depth: int) -> None:
    rows = list(table_lines(plan, depth, published_order(plan)))
    width = max(8, len(str(Op(plan.num_blocks or 0, plan.num_steps))))
    for stage in range(depth):
        begin = 7 + stage * (width + 2)
        cells = [row[begin : begin + width].strip() for row in rows[1:]]
        assert [cell for cell in cells if cell != "-" and cell] == [str(op) for op in published_order(plan)]


def test_table_of_an_endless_plan_goes_on() -> None:
    plan = blocks(None, 3)
    lines = list(itertools.islice(table_lines(plan, 2, eager_order(plan, 2)), 200))
    assert len(lines) == 200
    assert lines[-1].startswith(" 198   ")
