"""Timelines as Chrome trace-event JSON, which Perfetto (ui.perfetto.dev) opens, and exactly back.

One process is the run, one thread is a lane (a role of a rank). Perfetto wants slices of a thread nested or disjoint,
so every further row of a lane gets a thread of its own. Our own fields travel unchanged in `args`.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from pipedit.core.errors import InvalidRequestError
from pipedit.core.spans import Span
from pipedit.core.staging import write_text_whole
from pipedit.plan.timeline import Lane, Timeline

_CATEGORY, _PROCESS, _MAX_PROBLEMS = "pipedit", 1, 5
_FIELDS = {field.name: field for field in dataclasses.fields(Span)}
_KINDS: dict[str, tuple[type, ...]] = {
    "request_id": (str,),
    "rank": (int,),
    "role": (str,),
    "what": (str,),
    "start_s": (int, float),
    "end_s": (int, float),
    "index": (int, type(None)),
    "block": (int, type(None)),
    "payload_bytes": (int,),
}
assert _KINDS.keys() == _FIELDS.keys(), "a field of Span has no place in the trace file"


def write_trace(path: str | os.PathLike[str], timeline: Timeline) -> None:
    """Writes the file whole or not at all. The folder must exist."""
    write_text_whole(Path(path), json.dumps(trace_events(timeline), allow_nan=False) + "\n")


def read_trace(path: str | os.PathLike[str]) -> Timeline:
    """The timeline of a file that `write_trace` made. Events of other programs in it are passed over.

    Raises InvalidRequestError if the file is missing, is no trace, or holds nothing of ours.
    """
    content = _load(Path(path))
    events = content.get("traceEvents") if isinstance(content, dict) else content
    if not isinstance(events, list):
        raise InvalidRequestError([f"{path} is not a trace: it has no list `traceEvents`"])
    ours = [event for event in events if _is_ours(event)]
    if not ours:
        raise InvalidRequestError([f"{path} holds no work of pipedit; make a trace with: pipedit generate --trace"])
    problems = [f"{path}: {problem}" for event in ours for problem in _span_problems(event.get("args"))]
    if problems:
        raise InvalidRequestError(problems[:_MAX_PROBLEMS])
    other = content.get("otherData") if isinstance(content, dict) else None
    spans = tuple(Span(**event["args"]) for event in ours)
    return Timeline(spans=spans, metadata=other if isinstance(other, dict) else {})


def trace_events(timeline: Timeline) -> dict[str, Any]:
    """The file's content: events in the order of the timeline's spans, after the names of process and threads."""
    threads = [(lane, row) for lane in timeline.lanes for row in range(len(lane.rows))]
    thread_of = {id(span): number for number, (lane, row) in enumerate(threads) for span in lane.rows[row]}
    events: list[dict[str, Any]] = [_name("process_name", 0, name=str(timeline.metadata.get("title", "pipedit")))]
    for number, (lane, row) in enumerate(threads):
        events += [_name("thread_name", number, name=_thread_name(lane, row))]
        events += [_name("thread_sort_index", number, sort_index=number)]
    events += [_event(span, thread_of[id(span)]) for span in timeline.spans]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(timeline.metadata)}


def _name(kind: str, thread: int, **args: object) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": _PROCESS, "tid": thread, "args": args}


def _thread_name(lane: Lane, row: int) -> str:
    return f"rank {lane.rank} {lane.role}" + (f" ({row + 1})" if row else "")


def _event(span: Span, thread: int) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.what if span.index is None else f"{span.what} {span.index}",
        "cat": _CATEGORY,
        "pid": _PROCESS,
        "tid": thread,
        "ts": span.start_s * 1e6,
        "dur": span.duration_s * 1e6,
        "args": dataclasses.asdict(span),
    }


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidRequestError([f"{path} does not exist"]) from None
    except OSError as error:
        raise InvalidRequestError([f"{path} cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError:
        raise InvalidRequestError([f"{path} is not a trace: it is not text"]) from None
    except json.JSONDecodeError as error:
        reason = f"{error.msg} in line {error.lineno}"
        raise InvalidRequestError([f"{path} is not a trace: it is not whole JSON ({reason})"]) from None


def _is_ours(event: object) -> bool:
    return isinstance(event, dict) and event.get("ph") == "X" and event.get("cat") == _CATEGORY


def _span_problems(args: object) -> list[str]:
    if not isinstance(args, dict):
        return ["an event has no `args`"]
    unknown = [f"an event has an unknown field `{name}`" for name in args if name not in _FIELDS]
    wrong = [f"an event has no valid `{name}`" for name in _KINDS if not _is_valid(args, name)]
    if not wrong and args["end_s"] < args["start_s"]:
        wrong = [f"an event ends at {args['end_s']} s, before it starts at {args['start_s']} s"]
    return unknown + wrong


def _is_valid(args: dict[str, Any], name: str) -> bool:
    if name not in args:
        return _FIELDS[name].default is not dataclasses.MISSING
    value = args[name]
    if isinstance(value, bool) or not isinstance(value, _KINDS[name]):
        return False
    return not isinstance(value, float) or math.isfinite(value)
