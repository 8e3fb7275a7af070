"""Numbers, files and pictures of timelines."""

import dataclasses
import itertools
import json
import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.errors import InvalidRequestError
from pipedit.core.spans import Span
from pipedit.plan.merging import merge_narrow
from pipedit.plan.picture import Rectangle, Text, shorten, text_width
from pipedit.plan.time_axis import ticks
from pipedit.plan.timeline import Timeline, covered_s, stage_table
from pipedit.plan.timeline_layout import Panel, lay_out
from pipedit.plan.timeline_plot import LEFT, RIGHT
from pipedit.plan.timeline_svg import draw_svg
from pipedit.plan.trace_file import read_trace, trace_events, write_trace

SVG = "{http://www.w3.org/2000/svg}"


def span(start_s: float, end_s: float, what: str = "step", **fields: Any) -> Span:
    values = {"request_id": "r0", "rank": 0, "role": "denoiser", **fields}
    return Span(what=what, start_s=start_s, end_s=end_s, **values)


def small_run() -> Timeline:
    """Two denoise ranks, one decode rank, 10 seconds; rank 1 moves data while it computes."""
    spans = (
        span(2.0, 4.0, index=0),
        span(4.0, 6.0, index=1),
        span(2.0, 4.0, index=0, rank=1),
        span(4.0, 5.0, index=1, rank=1),
        span(2.5, 3.5, "exchange", rank=1, payload_bytes=1000),
        span(4.5, 5.5, "exchange", rank=1, payload_bytes=500),
        span(6.0, 9.0, "decode", index=0, rank=2, role="decoder"),
        span(9.0, 12.0, "write", request_id="", rank=-1, role="controller"),
    )
    return Timeline(spans=spans, metadata={"title": "small", "strategy": {"name": "x", "degrees": [2, 1]}})


spans_drawn = st.builds(
    lambda start, length, **fields: Span(start_s=start, end_s=start + length, **fields),
    st.floats(-1e6, 1e6),
    st.floats(0, 1e4),
    request_id=st.sampled_from(["", "r0", "r1", "7f3a9c2e-11b"]),
    rank=st.integers(-1, 5),
    role=st.sampled_from(["encoder", "denoiser", "decoder", "controller"]),
    what=st.sampled_from(["load", "encode", "step", "decode", "exchange", "polish"]),
    index=st.none() | st.integers(0, 99),
    block=st.none() | st.integers(0, 9),
    payload_bytes=st.integers(0, 2**40),
)
timelines = st.builds(lambda spans: Timeline(spans=tuple(spans)), st.lists(spans_drawn, max_size=30))


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_makespan_and_order() -> None:
    timeline = small_run()
    assert (timeline.start_s, timeline.end_s, timeline.makespan_s) == (2.0, 12.0, 10.0)
    assert timeline.request_ids == ("r0",)
    assert timeline.ranks == (0, 1, 2, -1)


def test_occupancy_counts_overlap_once() -> None:
    by_rank = {occupancy.ranks: occupancy for occupancy in small_run().rank_occupancy()}
    assert by_rank[0,].busy_share == pytest.approx(0.4)
    assert by_rank[1,].busy_share == pytest.approx(0.35)  # 2 to 5.5, though three spans lie over each other
    assert by_rank[1,].idle_share == pytest.approx(0.65)
    denoiser, decoder, controller = small_run().role_occupancy()
    assert (denoiser.role, denoiser.ranks, denoiser.available_s) == ("denoiser", (0, 1), 20.0)
    assert denoiser.busy_s == pytest.approx(7.5)
    assert decoder.idle_s == pytest.approx(7.0)
    assert controller.role == "controller"


def test_stage_table() -> None:
    step, exchange, decode, write = stage_table(small_run())
    assert (step.role, step.what, step.count) == ("denoiser", "step", 4)
    assert (step.total_s, step.mean_s, step.min_s, step.max_s) == pytest.approx((7.0, 1.75, 1.0, 2.0))
    assert step.share == pytest.approx(0.4)  # ranks at work together count once
    assert exchange.payload_bytes == 1500
    assert [decode.what, write.what] == ["decode", "write"]


def test_empty_timeline_has_numbers_too() -> None:
    timeline = Timeline(spans=())
    assert timeline.makespan_s == 0
    assert timeline.lanes == ()
    assert timeline.rank_occupancy() == timeline.role_occupancy() == ()
    assert stage_table(timeline) == []
    assert "no work was recorded" in draw_svg(timeline)


def test_lanes_keep_simultaneous_work_apart() -> None:
    lanes = small_run().lanes
    assert [(lane.rank, lane.role) for lane in lanes] == [
        (0, "denoiser"),
        (1, "denoiser"),
        (2, "decoder"),
        (-1, "controller"),
    ]
    assert [[item.what for item in row] for row in lanes[1].rows] == [["step", "step"], ["exchange", "exchange"]]


@given(timelines)
def test_lanes_hold_every_span_once_without_overlap(timeline: Timeline) -> None:
    rows = [row for lane in timeline.lanes for row in lane.rows]
    assert sorted(map(repr, timeline.spans)) == sorted(repr(item) for row in rows for item in row)
    for row in rows:
        assert all(before.end_s <= after.start_s for before, after in itertools.pairwise(row))


@given(timelines)
def test_busy_is_never_more_than_all(timeline: Timeline) -> None:
    for occupancy in (*timeline.rank_occupancy(), *timeline.role_occupancy()):
        assert -1e-9 <= occupancy.busy_share <= 1 + 1e-9
    assert covered_s(timeline.spans) <= timeline.makespan_s * (1 + 1e-9)


# -- files ------------------------------------------------------------------------------------------------------------


def test_trace_comes_back_exactly(tmp_path: Path) -> None:
    write_trace(tmp_path / "t.json", small_run())
    assert read_trace(tmp_path / "t.json") == small_run()
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


@given(timelines)
def test_any_trace_comes_back_exactly(tmp_path_factory: pytest.TempPathFactory, timeline: Timeline) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    write_trace(path, timeline)
    if timeline.spans:
        assert read_trace(path) == timeline
    else:
        with pytest.raises(InvalidRequestError, match="holds no work of pipedit"):
            read_trace(path)


def test_trace_is_what_perfetto_reads() -> None:
    content = trace_events(small_run())
    events = content["traceEvents"]
    named = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert list(named.values()) == [
        "rank 0 denoiser",
        "rank 1 denoiser",
        "rank 1 denoiser (2)",
        "rank 2 decoder",
        "rank -1 controller",
    ]
    slices = [event for event in events if event["ph"] == "X"]
    first = slices[0]
    assert (first["name"], first["ts"], first["dur"], first["args"]["rank"]) == ("step 0", 2e6, 2e6, 0)
    assert {event["ph"] for event in events} == {"X", "M"}
    for thread in named:  # slices of a thread must not overlap
        times = sorted((event["ts"], event["ts"] + event["dur"]) for event in slices if event["tid"] == thread)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))


def test_events_of_others_are_passed_over(tmp_path: Path) -> None:
    content = trace_events(small_run())
    content["traceEvents"].append({"ph": "X", "cat": "kernel", "name": "gemm", "ts": 1, "dur": 2, "pid": 7, "tid": 7})
    (tmp_path / "t.json").write_text(json.dumps(content))
    assert read_trace(tmp_path / "t.json") == small_run()
    (tmp_path / "bare.json").write_text(json.dumps(content["traceEvents"]))
    assert read_trace(tmp_path / "bare.json").spans == small_run().spans


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "not whole JSON"),
        (b'{"traceEvents": [', "not whole JSON"),
        (b"\xff\xfe\x00", "not text"),
        (b"{}", "no list `traceEvents`"),
        (b'{"traceEvents": 3}', "no list `traceEvents`"),
        (b"3", "no list `traceEvents`"),
        (b'{"traceEvents": [{"ph": "X", "name": "gemm"}, 7]}', "holds no work of pipedit"),
        (b'{"traceEvents": [{"ph": "X", "cat": "pipedit"}]}', "an event has no `args`"),
    ],
)
def test_bad_files_get_a_sentence(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(InvalidRequestError, match=sentence):
        read_trace(tmp_path / "t.json")


def test_no_file_gets_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist"):
        read_trace(tmp_path / "t.json")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_trace(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("rank", "zero", "no valid `rank`"),
        ("rank", True, "no valid `rank`"),
        ("start_s", None, "no valid `start_s`"),
        ("end_s", math.nan, "no valid `end_s`"),
        ("end_s", -1.0, "ends at -1.0 s, before it starts at 2.0 s"),
        ("colour", "red", "unknown field `colour`"),
    ],
)
def test_bad_events_get_a_sentence(tmp_path: Path, field: str, value: object, sentence: str) -> None:
    content = trace_events(Timeline(spans=small_run().spans[:1]))
    content["traceEvents"][-1]["args"][field] = value
    (tmp_path / "t.json").write_text(json.dumps(content))
    with pytest.raises(InvalidRequestError, match=sentence):
        read_trace(tmp_path / "t.json")


# -- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("duration_s", "labels"),
    [
        (0.0, ["0 s"]),
        (0.0005, ["0 µs", "50 µs", "100 µs"]),
        (0.034, ["0 ms", "5 ms", "10 ms"]),
        (0.8, ["0 ms", "100 ms", "200 ms"]),
        (1.7, ["0.0 s", "0.2 s", "0.4 s"]),
        (15.7, ["0 s", "2 s", "4 s"]),
        (100.0, ["0 s", "10 s", "20 s"]),
        (400.0, ["0:00 min", "1:00 min", "2:00 min"]),
        (10_000.0, ["0:00 h", "0:30 h", "1:00 h"]),
        (40 * 86_400.0, ["0:00 h", "96:00 h", "192:00 h"]),
    ],
)
def test_ticks_are_round(duration_s: float, labels: list[str]) -> None:
    assert [tick.label for tick in ticks(duration_s)][:3] == labels


@given(st.floats(1e-5, 1e8))
def test_ticks_are_few_and_different(duration_s: float) -> None:
    marks = ticks(duration_s)
    assert 2 <= len(marks) <= 11
    assert len({tick.label for tick in marks}) == len(marks)
    assert marks[0].at_s == 0
    assert marks[-1].at_s <= duration_s * (1 + 1e-9)


def test_boxes_lie_where_the_time_is() -> None:
    boxes = [shape for shape in lay_out([Panel(timeline=small_run())]).shapes if getattr(shape, "hint", "")]
    decode = next(box for box in boxes if isinstance(box, Rectangle) and "decode" in box.hint)
    second = (RIGHT - LEFT) / 10
    assert decode.x == pytest.approx(LEFT + 4 * second)
    assert decode.width == pytest.approx(3 * second, abs=1.5)
    assert "from 4.0 s to 7.0 s" in decode.hint


def test_panels_share_one_time_scale() -> None:
    slow = Timeline(spans=tuple(dataclasses.replace(item, end_s=item.end_s + 10) for item in small_run().spans[-1:]))
    picture = lay_out([Panel(timeline=small_run(), title="predicted"), Panel(timeline=slow, title="measured")])
    boxes = [shape for shape in picture.shapes if isinstance(shape, Rectangle) and "write" in shape.hint]
    # 3 s in the first timeline and 13 s in the second, which is the longer one and fills the width
    assert boxes[0].width / boxes[1].width == pytest.approx(3 / 13, rel=0.02)
    assert boxes[1].x == pytest.approx(LEFT)
    titles = [shape.text for shape in picture.shapes if isinstance(shape, Text) and shape.size == 19]
    assert titles == ["predicted", "measured"]


def test_neighbouring_requests_differ_and_are_named() -> None:
    spans = tuple(span(2.0 * number, 2.0 * number + 1.9, request_id=f"request {number}") for number in range(3))
    shapes = lay_out([Panel(timeline=Timeline(spans=spans))]).shapes
    assert len({shape.fill for shape in shapes if isinstance(shape, Rectangle) and shape.hint}) == 3
    assert {f"request {number}" for number in range(3)} <= {shape.text for shape in shapes if isinstance(shape, Text)}


def test_thousands_of_spans_stay_a_small_picture() -> None:
    spans = tuple(
        span(index * 0.1, index * 0.1 + (0.06, 0.09)[kind], ("step", "exchange")[kind], request_id=f"r{index // 500}")
        for index in range(5000)
        for kind in (0, 1)
    )
    svg = draw_svg(Timeline(spans=spans))
    assert svg.count("<rect") < 2 * (RIGHT - LEFT)
    assert len(svg) < 400_000


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 3), st.sampled_from("abc")), min_size=1, max_size=60))
def test_merging_loses_nothing(drawn: list[tuple[float, float, str]]) -> None:
    spans = [span(start, start + length, what) for start, length, what in drawn]
    boxes = merge_narrow(spans, lambda item: (item.start_s, item.end_s), lambda item: item.what)
    assert sorted(map(repr, spans)) == sorted(repr(item) for box in boxes for item in box.spans)
    for box in boxes:
        assert box.left == min(item.start_s for item in box.spans)
        assert box.right == max(item.end_s for item in box.spans)


def test_merging_leaves_wide_and_distant_spans_alone() -> None:
    spans = [span(0, 5), span(5, 10), span(20, 20.1), span(30, 30.1), span(30.1, 30.3), span(30.3, 30.5, "other")]
    boxes = merge_narrow(spans, lambda item: (item.start_s, item.end_s), lambda item: item.what)
    assert [len(box.spans) for box in boxes] == [1, 1, 1, 3]
    assert boxes[-1].key == "step"


def test_svg_is_whole_and_safe() -> None:
    spans = (span(0, 1, "a<b>&", request_id='"q"\0', role="rôle"), span(1, 2, request_id="]]>"))
    title = "<script>alert(1)</script> & \x1b ünï 🎈"
    root = ET.fromstring(draw_svg([Panel(timeline=Timeline(spans=spans), title=title)]))
    assert root.tag == f"{SVG}svg"
    assert float(root.attrib["width"]) == 1200
    texts = ["".join(element.itertext()) for element in root.iter(f"{SVG}text")]
    assert title.replace("\x1b", "\N{REPLACEMENT CHARACTER}") in texts
    assert not list(root.iter(f"{SVG}script"))


@given(timelines)
def test_any_timeline_can_be_drawn_inside_its_frame(timeline: Timeline) -> None:
    picture = lay_out([Panel(timeline=timeline)])
    ET.fromstring(draw_svg(timeline))
    for shape in picture.shapes:
        if isinstance(shape, Rectangle):
            assert -1e-6 <= shape.x <= picture.width - shape.width + 1
            assert 0 <= shape.y <= picture.height - shape.height + 1e-6


def test_long_titles_are_shortened() -> None:
    assert shorten("short", 12, 100) == "short"
    cut = shorten("a very long prompt " * 20, 12, 200)
    assert cut.endswith("…")
    assert text_width(cut, 12) <= 200
