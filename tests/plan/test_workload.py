"""Workload files, cluster files and tables: what they mean, and every problem of a bad one at once."""

import itertools
import json
import statistics
from pathlib import Path

import pytest

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.plan.cluster_file import ReplicaSpec, read_cluster_file
from pipedit.plan.table_file import read_table
from pipedit.plan.workload import Pattern, Stream, read_workload

HUNYUAN = VideoRequest(prompt="", width=1024, height=576, num_frames=129, num_inference_steps=50)


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path) -> list[str]:
    with pytest.raises(InvalidRequestError) as caught:
        read_workload(path)
    return list(caught.value.problems)


def test_a_line_is_a_stream(tmp_path: Path) -> None:
    text = """model, width, height, num_frames, num_inference_steps, arrivals, rate, count, arrival_s, priority
hunyuanvideo, 1024, 576, 129, 50, , , 10, , 1

wan2.1-t2v-1.3b, , , , , constant, 0.5, 3, 7,
"""
    burst, steady = read_workload(written(tmp_path, "mix.csv", text))
    assert burst == Stream(model="hunyuanvideo", request=HUNYUAN, count=10, priority=1, source="mix.csv:2")
    assert list(burst.times_s()) == [0.0] * 10
    assert list(steady.times_s()) == [7.0, 9.0, 11.0]
    assert steady.request == VideoRequest(prompt="")


def test_json_lines_say_the_same(tmp_path: Path) -> None:
    values = {"model": "hunyuanvideo", "width": 1024, "height": 576, "num_frames": 129, "num_inference_steps": 50}
    (stream,) = read_workload(written(tmp_path, "mix.jsonl", "\n" + json.dumps({**values, "count": 10}) + "\n"))
    assert stream == Stream(model="hunyuanvideo", request=HUNYUAN, count=10, source="mix.jsonl:2")


def test_poisson_arrivals_are_random_and_the_same_each_time(tmp_path: Path) -> None:
    text = "model,rate,count\na,0.1,2000\nb,0.1,2000\n"
    first, second = read_workload(written(tmp_path, "mix.csv", text))
    assert first.arrivals is second.arrivals is Pattern.POISSON
    times_s = list(first.times_s())
    assert times_s == sorted(times_s) == list(first.times_s())
    assert times_s != list(second.times_s()), "streams come independently of each other"
    gaps_s = [b - a for a, b in itertools.pairwise(times_s)]
    assert statistics.fmean(gaps_s) == pytest.approx(10, rel=0.1)
    assert statistics.stdev(gaps_s) == pytest.approx(10, rel=0.1)


def test_every_problem_comes_with_its_line(tmp_path: Path) -> None:
    text = """model,with,height,rate,arrivals,count
,1024,576.5,0,poisson,1
a,,,,often,-3
b,,,1,burst,1
c,,,,constant,
d,,,abc,,
"""
    assert problems_of(written(tmp_path, "bad.csv", text)) == [
        "bad.csv:2: unknown column 'with'; did you mean width?",
        "bad.csv:2: there is no model",
        "bad.csv:2: height must be a whole number, not '576.5'",
        "bad.csv:2: rate must be above 0, not 0",
        "bad.csv:3: count must be at least 1, not -3",
        "bad.csv:3: unknown arrivals 'often'; there are burst, constant, poisson",
        "bad.csv:4: a burst has no rate; leave it out, or take constant or poisson arrivals",
        "bad.csv:5: constant arrivals need a rate, in requests per second",
        "bad.csv:6: rate must be a number, not 'abc'",
    ]


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("a.csv", "", "is empty"),
        ("a.csv", "model,count\n", "no line besides its heading"),
        ("a.csv", "model,model\na,b\n", "a.csv:1: column 'model' is there twice"),
        ("a.csv", "model\na,b\n", "a.csv:2: there are 2 values for 1 columns"),
        ("a.jsonl", '{"model": "a"}\n{"model"\n', "a.jsonl:2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl:1: each line must be a JSON object"),
        ("a.jsonl", '{"model": 3}\n', "a.jsonl:1: model must be text, not 3"),
        ("a.csv", "model,count\na,99999999\n", "10000000 are the most"),
    ],
)
def test_what_is_no_workload(tmp_path: Path, name: str, text: str, problem: str) -> None:
    (found,) = problems_of(written(tmp_path, name, text))
    assert problem in found


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="does not exist"):
        read_table(tmp_path / "gone.csv")
    with pytest.raises(InvalidRequestError, match="cannot be read"):
        read_table(tmp_path)
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidRequestError, match="not UTF-8"):
        read_table(path)


def test_a_file_with_many_problems_names_the_first_ones(tmp_path: Path) -> None:
    found = problems_of(written(tmp_path, "a.csv", "model,count\n" + "a,0\n" * 100))
    assert (len(found), found[-1]) == (31, "... and 70 more problems")


# -- clusters -----------------------------------------------------------------------------------------------------


def test_a_cluster_file(tmp_path: Path) -> None:
    content = {
        "device": "h100",
        "num_devices": 1024,
        "link": "nvlink4",
        "node_link": "infiniband",
        "price_per_hour": 2.5,
        "replicas": [{"model": "hunyuanvideo", "strategy": "disaggregated", "denoise_workers": 7, "decode_workers": 1}],
    }
    cluster = read_cluster_file(written(tmp_path, "c.json", json.dumps(content)))
    assert (cluster.device, cluster.num_devices, cluster.devices_per_node) == ("h100", 1024, 8)
    assert (cluster.link, cluster.node_link, cluster.price_per_hour) == ("nvlink4", "infiniband", 2.5)
    settings = {"strategy": "disaggregated", "denoise_workers": 7, "decode_workers": 1}
    assert cluster.replicas == (ReplicaSpec(model="hunyuanvideo", settings=settings),)


def test_every_problem_of_a_cluster_file(tmp_path: Path) -> None:
    content = {
        "devise": "h100",
        "num_devices": 0,
        "replicas": [{"strategi": "auto", "count": 0}, 7, {"offload": "yes", "num_workers": 2}],
    }
    with pytest.raises(InvalidRequestError) as caught:
        read_cluster_file(written(tmp_path, "c.json", json.dumps(content)))
    assert [problem.partition("c.json: ")[2] for problem in caught.value.problems] == [
        "unknown key 'devise'; did you mean device?",
        "there is no device",
        "num_devices must be at least 1, not 0",
        "replicas[1]: unknown key 'strategi'; did you mean strategy?",
        "replicas[1]: count must be at least 1, not 0",
        'replicas[2]: must be an object, such as {"strategy": "colocated", "num_workers": 8}',
        "replicas[3]: offload must be true or false",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{", '"h100"'])
def test_what_is_no_cluster_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not a cluster file"):
        read_cluster_file(written(tmp_path, "c.json", text))
