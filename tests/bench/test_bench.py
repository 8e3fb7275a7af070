"""The benchmarks' arithmetic and plumbing; no figure is judged here."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipedit.bench import generate
from pipedit.bench.device import measure
from pipedit.bench.processes import Peer, peak_memory_bytes, time_command
from pipedit.bench.sampling import Spread, interleave, ratio
from pipedit.cli.app import run
from pipedit.core.errors import PipeditError
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine
from tests.tiny_pipelines import QUICK_SETTINGS


def test_rounds_are_interleaved_and_warm_up_is_left_out() -> None:
    order: list[str] = []

    def runner(name: str) -> Callable[[], float]:
        def run() -> float:
            order.append(name)
            return float(len(order))

        return run

    seconds = interleave({"a": runner("a"), "b": runner("b")}, rounds=2, warm_up=1)
    assert "".join(order) == "ababab"
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}


def test_ratios_are_taken_pair_by_pair() -> None:
    assert ratio([1.0, 4.0, 3.0], [2.0, 2.0, 3.0]) == Spread(min=0.5, median=1.0, max=2.0)


def test_memory_of_a_whole_process_is_seen() -> None:
    small = peak_memory_bytes([sys.executable, "-c", "pass"], timeout_s=30)
    large = peak_memory_bytes([sys.executable, "-c", "b = b'x' * 200_000_000"], timeout_s=30)
    assert 190_000_000 < large - small < 230_000_000


@pytest.mark.parametrize("measure_one", [time_command, peak_memory_bytes])
def test_a_process_that_fails_says_why(measure_one: Callable[..., float]) -> None:
    with pytest.raises(PipeditError, match="exit code 3.*" if measure_one is time_command else "exit code 1") as caught:
        measure_one([sys.executable, "-c", "import sys; print('no luck', file=sys.stderr); sys.exit(3)"], timeout_s=30)
    assert str(caught.value).endswith("no luck")


@pytest.mark.parametrize("kind", ["generate", "memory", "device"])
def test_the_target_is_checked_before_the_measurement(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", kind, "--model", "no-such-model", "-o", "gone/x.json"]) == 2
    assert "the folder gone does not exist" in capsys.readouterr().err


def test_a_peer_that_dies_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(RuntimeError, match="exit code"):
        Peer("pipedit_engine.py", ["no-such-folder", "{}"], timeout_s=60)


@pytest.mark.slow
def test_both_sides_run_and_the_result_says_where(tiny_folder: Callable[[str], Path]) -> None:
    settings = dict(QUICK_SETTINGS["wan"])
    plan = generate.GenerateBench(model=str(tiny_folder("wan")), settings=settings, rounds=1, cold_rounds=0)
    result = json.loads(json.dumps(generate.run(plan)))
    assert result["warm"]["rounds"] == 1
    assert result["warm"]["seconds"]["diffusers"]["median"] > 0
    assert set(result["warm"]["stages_s"]) == {"encode", "step", "decode"}
    assert {"processor", "commit", "command", "packages"} <= set(result["environment"])


def test_device_profile_covers_every_kind_of_work(tiny_folder: Callable[[str], Path]) -> None:
    engine = Engine(tiny_folder("wan"), device="cpu")
    (request,) = engine.prepare([VideoRequest(prompt="x", seed=0, **QUICK_SETTINGS["wan"])])
    profile = measure(engine, request, repeats=1)
    assert {rate.kind for rate in profile.rates} == {"attention", "linear", "convolution"}
    assert all(rate.operations_per_s > 0 for rate in profile.rates)
    assert profile.seconds(engine.adapter.cost(request, engine.precision).denoise) > 0
