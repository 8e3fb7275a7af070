"""The staircase of blocks on a timeline picture."""

import itertools

import pytest

from pipedit.core.blocks import BlockPlan
from pipedit.core.placement import Role
from pipedit.core.spans import Span
from pipedit.plan.block_orders import order_of
from pipedit.plan.block_simulation import spans, time_order
from pipedit.plan.picture import Rectangle
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_blocks import lay_out_blocks
from pipedit.plan.timeline_layout import Panel, lay_out
from pipedit.plan.timeline_plot import BAND, LEFT, RIGHT, Plot, kind_colours


def timeline_of(blocks: int, steps: int = 6, depth: int = 3) -> Timeline:
    plan = BlockPlan(latents=2 * blocks, block_latents=2, context_latents=1, num_steps=steps)
    found = list(spans(time_order(order_of(plan, depth), plan, depth), "a"))
    end_s = max(span.end_s for span in found)
    decoded = [
        Span(request_id="a", rank=depth - 1, role=Role.DECODER, what="decode", start_s=end_s + b, end_s=end_s + b + 1,
             index=b, block=b)
        for b in range(blocks)
    ]  # fmt: skip
    return Timeline(spans=(*found, *decoded))


def plot_of(timeline: Timeline) -> Plot:
    return Plot(timeline=timeline, duration_s=timeline.makespan_s, kinds=kind_colours([timeline]))


def boxes(timeline: Timeline) -> list[Rectangle]:
    return [shape for shape in lay_out_blocks(plot_of(timeline), 0).marks if isinstance(shape, Rectangle)]


def test_a_row_for_each_block_and_a_box_for_each_step() -> None:
    found = boxes(timeline_of(5))
    hints = [box.hint for box in found]
    assert hints == [
        *(f"block {block} · step {step}" for block in range(5) for step in range(6)),
        *(f"block {block} · decode" for block in range(5)),
    ]
    rows = {hint.split(" · ")[0]: box.y for hint, box in zip(hints, found, strict=True)}
    assert list(rows.values()) == sorted(rows.values())
    starts = [next(box.x for box in found if box.hint == f"block {block} · step 0") for block in range(5)]
    assert starts == sorted(starts), "a staircase"


def test_steps_follow_each_other_and_darken() -> None:
    found = boxes(timeline_of(4))
    for block in range(4):
        own = [box for box in found if box.hint.startswith(f"block {block} · step")]
        for before, after in itertools.pairwise(own):
            assert after.x == pytest.approx(before.x + before.width)
            assert int(after.fill[1:3], 16) < int(before.fill[1:3], 16), "less white"
    assert min(box.x for box in found) == pytest.approx(LEFT)
    assert max(box.x + box.width for box in found) <= RIGHT + 1


def test_very_many_steps_are_drawn_together() -> None:
    found = boxes(timeline_of(4, steps=1000, depth=2))
    assert 4 * 100 < len([box for box in found if "step" in box.hint]) < 4 * (RIGHT - LEFT) / 1.5
    assert all(box.width >= 0.8 for box in found)


def test_nothing_without_blocks_or_with_too_many() -> None:
    plain = Timeline(
        spans=(Span(request_id="a", rank=0, role=Role.DENOISER, what="step", start_s=0, end_s=1, index=0),)
    )
    many = timeline_of(201, steps=1, depth=1)
    for timeline in (plain, many, Timeline(spans=())):
        found = lay_out_blocks(plot_of(timeline), 17)
        assert (found.bands, found.marks, found.bottom) == ((), (), 17)


def test_it_stands_below_the_lanes() -> None:
    picture = lay_out([Panel(timeline=timeline_of(5))])
    bands = [shape for shape in picture.shapes if isinstance(shape, Rectangle) and shape.fill == BAND]
    assert bands[-1].y > max(band.y + band.height for band in bands[:-1])
    assert picture.height > bands[-1].y + bands[-1].height
