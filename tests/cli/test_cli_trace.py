"""`pipedit trace`: numbers on stdout, a picture beside the file."""

from pathlib import Path

import pytest

from pipedit.core.spans import Span
from pipedit.plan.timeline import Timeline
from pipedit.plan.trace_file import write_trace
from tests.cli.running import Cli, names_in


@pytest.fixture
def trace_file(tmp_path: Path) -> str:
    steps = [
        Span(request_id="r", rank=0, role="denoiser", what="step", start_s=n, end_s=n + 1, index=n) for n in range(3)
    ]
    decode = Span(request_id="r", rank=0, role="decoder", what="decode", start_s=3.0, end_s=5.0, index=0)
    path = tmp_path / "t.json"
    write_trace(path, Timeline(spans=(*steps, decode), metadata={"title": "a red ball"}))
    return str(path)


def test_the_table_is_data_and_the_picture_lies_beside(cli: Cli, trace_file: str, tmp_path: Path) -> None:
    ran = cli("trace", trace_file)
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines() if line.strip()]
    assert ["denoiser", "step", "3", "3.0", "s", "1.0", "s", "1.0", "s", "1.0", "s", "60", "%"] in rows
    assert ran.err == f"drawn in {tmp_path}/t.svg\n"
    assert (tmp_path / "t.svg").read_text().startswith("<svg")
    assert cli("trace", trace_file, "-q").err == ""  # drawn again, over the first


def test_a_png_and_json(cli: Cli, trace_file: str, tmp_path: Path) -> None:
    ran = cli("trace", trace_file, "-o", "picture.png", "--json")
    document = ran.document
    assert (document["makespan_s"], document["picture"]) == (5.0, "picture.png")
    assert document["ranks"] == [{"rank": 0, "busy_s": 5.0, "idle_s": 0.0}]
    assert [(stage["what"], stage["count"]) for stage in document["stages"]] == [("step", 3), ("decode", 1)]
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_wrong_with_either_file_is_said_at_once(cli: Cli, tmp_path: Path) -> None:
    ran = cli("trace", "gone.json", "-o", "picture.bmp")
    assert ran.code == 2
    assert len(ran.errors) == 2
    assert "gone.json does not exist" in ran.errors[0]
    assert ".svg or .png" in ran.errors[1]
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("name", ["", "/", "."])
def test_no_name_is_a_sentence(cli: Cli, name: str) -> None:
    ran = cli("trace", name)
    assert (ran.code, len(ran.errors)) == (2, 1)
    assert "names no file" in ran.errors[0]
