"""Tables as files, for people to write: CSV with a heading, or a JSON object a line. Every problem comes with its line.

Knows names and bounds of columns, not what they mean.
"""

import csv
import dataclasses
import difflib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipedit.core.errors import InvalidRequestError

_JSON_LINES = (".jsonl", ".ndjson")
_MOST_PROBLEMS = 30  # told at once; more would hide each other


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """What a column may hold: a number of `kind`, at least `least` and strictly above `above`, or text out of
    `choices` (None: any)."""

    kind: type[int] | type[float] | type[str]
    least: float = -math.inf
    above: float | None = None
    choices: tuple[str, ...] | None = None
    is_required: bool = False


Columns = Mapping[str, Column]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line. `source` says where, such as "mix.csv:3". `values` are as they were written, without empty cells."""

    source: str
    values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """All lines that hold something. `names` are those of the columns, in order."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]


def read_table(path: str | os.PathLike[str]) -> Table:
    """Raises InvalidRequestError if the file cannot be read as a table, or holds no line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InvalidRequestError([f"{path} does not exist"]) from None
    except UnicodeDecodeError:
        raise InvalidRequestError([f"{path} is not UTF-8 text"]) from None
    except OSError as error:
        raise InvalidRequestError([f"{path} cannot be read: {error.strerror}"]) from error
    table = _json_table(path.name, text) if path.suffix.lower() in _JSON_LINES else _csv_table(path.name, text)
    if not table.rows:
        raise InvalidRequestError([f"{path} holds no line besides its heading" if text.strip() else f"{path} is empty"])
    return table


def parse_row(
    row: Row, columns: Columns, *, noun: str = "column", others: Sequence[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """The values that are there and right, and what is wrong with the others. `others` are legal names too, but not
    looked at. `noun`: what a name is called in problems."""
    known = [*columns, *others]
    problems = [unknown_name(noun, name, known) for name in row.values if name not in known]
    values: dict[str, Any] = {}
    for name, column in columns.items():
        if name in row.values:
            value, problem = _value(name, row.values[name], column)
            if problem:
                problems.append(problem)
            else:
                values[name] = value
        elif column.is_required:
            problems.append(f"there is no {name}")
    return values, problems


def raise_problems(problems: list[str]) -> None:
    """Raises InvalidRequestError if there are any; of very many, the first ones."""
    if problems:
        more = len(problems) - _MOST_PROBLEMS
        raise InvalidRequestError(problems[:_MOST_PROBLEMS] + ([f"... and {more} more problems"] if more > 0 else []))


def unknown_name(what: str, name: object, known: Iterable[str]) -> str:
    """A sentence with the nearest name, or with all of them."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1)
    return f"unknown {what} {name!r}; " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}")


def _value(name: str, given: Any, column: Column) -> tuple[Any, str]:
    """The value and "", or None and what is wrong with it."""
    if column.kind is str:
        if not isinstance(given, str):
            return None, f"{name} must be text, not {given!r}"
        if column.choices is not None and given not in column.choices:
            return None, unknown_name(name, given, column.choices)
        return given, ""
    noun = "a whole number" if column.kind is int else "a number"
    number = _number(given)
    if not math.isfinite(number) or (column.kind is int and not number.is_integer()):
        return None, f"{name} must be {noun}, not {given!r}"
    if number < column.least:
        return None, f"{name} must be at least {column.least:g}, not {given}"
    if column.above is not None and number <= column.above:
        return None, f"{name} must be above {column.above:g}, not {given}"
    return column.kind(number), ""


def _number(given: Any) -> float:
    """Not a number, where it is none."""
    if isinstance(given, bool) or not isinstance(given, str | int | float):
        return math.nan
    try:
        return float(given)
    except (ValueError, OverflowError):
        return math.nan


def _csv_table(name: str, text: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    heading: list[str] | None = None
    rows, problems = [], []
    try:
        for cells in reader:
            source, cells = f"{name}:{reader.line_num}", [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if heading is None:
                heading = cells
                twice = sorted({cell for cell in cells if cells.count(cell) > 1})
                problems += [f"{source}: column {cell!r} is there twice" for cell in twice]
            elif len(cells) > len(heading):
                problems.append(f"{source}: there are {len(cells)} values for {len(heading)} columns")
            else:
                values = {column: cell for column, cell in zip(heading, cells, strict=False) if cell}
                rows.append(Row(source=source, values=values))
    except csv.Error as error:
        problems.append(f"{name}:{reader.line_num}: not CSV: {error}")
    raise_problems(problems)
    return Table(names=tuple(heading or ()), rows=tuple(rows))


def _json_table(name: str, text: str) -> Table:
    rows, problems = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        source = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            problems.append(f"{source}: not JSON: {error}")
            continue
        if not isinstance(values, dict):
            problems.append(f"{source}: each line must be a JSON object")
            continue
        rows.append(Row(source=source, values={key: v for key, v in values.items() if v is not None and v != ""}))
    raise_problems(problems)
    names = dict.fromkeys(column for row in rows for column in row.values)
    return Table(names=tuple(names), rows=tuple(rows))
