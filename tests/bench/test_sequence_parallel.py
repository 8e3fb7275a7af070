"""`bench sequence-parallel`: arithmetic and refusals everywhere, namespaces and ranks only as root. No figure is judged
here."""

import json
import os
import re
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipedit.bench import sequence_parallel
from pipedit.bench.bounds import Floor, hidden_seconds, ideal_seconds, judge
from pipedit.bench.network import network, requirement_problem
from pipedit.bench.rank_program import Variant, measure
from pipedit.bench.sequence_parallel import ATTENTION, LAYERS, AttentionShape, LayersShape, SequenceParallelBench
from pipedit.bench.strategies import egress_bytes
from pipedit.cli.app import run
from pipedit.core.errors import PipeditError

Said = pytest.CaptureFixture[str]
_BUILD_AND_DIE = """
import os, signal
from pipedit.bench.network import network
with network(2):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_ideal_is_the_longer_of_the_two() -> None:
    assert (ideal_seconds(2.0, 1.0), ideal_seconds(2.0, 3.0)) == (2.0, 3.0)


def test_what_attention_cannot_hide_stays() -> None:
    assert hidden_seconds(compute_s=5.0, attention_s=3.0, communication_s=2.0) == 5.0
    assert hidden_seconds(compute_s=5.0, attention_s=3.0, communication_s=4.0) == 6.0


def test_variants_are_judged_round_by_round() -> None:
    floor = Floor(compute_s=[2.0, 4.0], communication_s=3.0)  # the ideal: 3, then 4
    seconds = {"plain": [6.0, 8.0], "better": [4.0, 4.0]}
    figures = judge(seconds, floor, {"over_plain": "plain"})
    assert figures["better"]["speed_up"]["over_plain"] == {"min": 1.5, "median": 1.75, "max": 2.0}
    assert figures["better"]["share_of_ideal"] == {"min": 0.75, "median": 0.875, "max": 1.0}
    assert figures["better"]["exposed_s"] == {"min": 0.0, "median": 1.0, "max": 2.0}
    assert figures["plain"]["speed_up"]["over_plain"]["median"] == 1.0
    assert floor.ratio.max == 1.5


def test_bytes_sent_by_two_equal_ranks() -> None:
    # query, key, value of 8 tokens for the other's 2 heads; the results of 2 heads for the other's 8 tokens
    assert egress_bytes([8, 8], [2, 2], 0, row_bytes=4) == (3 * 8 * 2 + 8 * 2) * 4


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=5))
def test_every_row_is_sent_but_those_that_stay(shares: list[tuple[int, int]]) -> None:
    tokens, heads = [own for own, _ in shares], [own for _, own in shares]
    sent = sum(egress_bytes(tokens, heads, rank, row_bytes=1) for rank in range(len(shares)))
    staying = sum(own_tokens * own_heads for own_tokens, own_heads in shares)
    assert sent == 4 * (sum(tokens) * sum(heads) - staying)


def test_every_wrong_argument_is_told() -> None:
    bench = SequenceParallelBench(
        links=[0.0, 1.0], ranks=[1, 8], rates_bits_per_s=[1e3], attention=AttentionShape(heads=4)
    )
    told = sequence_parallel.problems(bench)
    assert len(told) == 4
    assert told[0].startswith("a link of 0 should be")
    assert "1 ranks should be 2 to" in told[1]
    assert "0.001 Mbit/s" in told[2]
    assert "8 ranks cannot share 4 heads" in told[3]


def test_ranks_that_diffusers_cannot_take_are_told() -> None:
    (told,) = sequence_parallel.problems(SequenceParallelBench(ranks=[2, 3], parts=[LAYERS]))
    assert "3 ranks do not divide the 8 heads" in told
    assert not sequence_parallel.problems(SequenceParallelBench(ranks=[2, 3], parts=[ATTENTION]))


@pytest.mark.parametrize("flag", ["--links", "--ranks", "--rates"])
def test_lists_of_numbers_are_checked(flag: str, capsys: Said) -> None:
    assert run(["bench", "sequence-parallel", flag, "2,much"]) == 2
    assert f"{flag} 2,much should be numbers" in capsys.readouterr().err


def test_without_root_it_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert run(["bench", "sequence-parallel", "--part", "attention"]) == 1
    said = capsys.readouterr().err
    assert "needs root and iproute2 (ip, tc): this process is not root" in said
    assert requirement_problem() is not None


def test_a_wrong_result_is_seen() -> None:
    reference = torch.ones(3)
    right = measure(Variant(run=lambda: torch.ones(3), is_alone=True), reference)
    wrong = measure(Variant(run=lambda: torch.tensor([1.0, 1.0, 1.5]), is_alone=True), reference)
    assert (right["is_equal"], right["max_difference"]) == (True, 0.0)
    assert (wrong["is_equal"], wrong["max_difference"]) == (False, 0.5)


def test_a_variant_that_writes_nothing_is_seen() -> None:
    reference, shared = torch.ones(3), torch.ones(3)
    variant = Variant(run=lambda: shared, is_alone=True)
    assert measure(variant, reference)["is_equal"]  # the one before has written it
    assert not measure(variant, reference)["is_equal"]


# -- as root ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def namespaces() -> None:
    """Skips where there can be none, and says why: containers often forbid them even to root."""
    try:
        with network(1):
            pass
    except PipeditError as error:
        pytest.skip(str(error))


def left_behind(process: int) -> list[str]:
    """Lines about links and namespaces of a process id."""
    listed = [["ip", "netns", "list"], ["ip", "-o", "link"]]
    said = [subprocess.run(one, capture_output=True, text=True, check=True, timeout=10).stdout for one in listed]
    return re.findall(rf"^.*\bpd{process}(?:br|r\d+)\b.*$", "\n".join(said), re.MULTILINE)


@pytest.mark.usefixtures("namespaces")
def test_nothing_is_left_after_an_interrupt() -> None:
    def interrupted() -> None:
        with network(2) as net:
            net.limit(100e6)
            net.limit(None)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert left_behind(os.getpid()) == []


@pytest.mark.usefixtures("namespaces")
def test_what_a_killed_run_left_is_removed() -> None:
    with subprocess.Popen([sys.executable, "-c", _BUILD_AND_DIE]) as died:
        assert died.wait(60) == -signal.SIGKILL
    assert len(left_behind(died.pid)) >= 5  # two namespaces, their links, the bridge
    with network(1):
        assert left_behind(os.getpid())
    assert left_behind(died.pid) == []


@pytest.mark.usefixtures("namespaces")
def test_attention_from_end_to_end(capsys: Said) -> None:
    small = ["--tokens", "66", "--heads", "5", "--head-dim", "8", "--ranks", "2", "--links", "1", "--rounds", "1"]
    assert run(["bench", "sequence-parallel", "--part", "attention", *small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (measured,) = result["attention"]["runs"]
    names = set(measured["variants"])
    assert {"plain Ulysses", "blocking, 3 chunks", "output only, 3 chunks", "PipeSP, 3 chunks", "PipeSP, auto"} <= names
    check(measured)
    assert {"processor", "commit", "command"} <= set(result["environment"])
    assert left_behind(os.getpid()) == []


@pytest.mark.slow
@pytest.mark.usefixtures("namespaces")
def test_a_whole_transformer_from_end_to_end() -> None:
    shape = LayersShape(latent_frames=2, latent_height=8, latent_width=8, num_layers=1)
    bench = SequenceParallelBench(
        ranks=[2], rates_bits_per_s=[300e6], parts=[LAYERS], rounds=1, layers=shape, timeout_s=120
    )
    (measured,) = sequence_parallel.run(bench, lambda _: None)["layers"]["runs"]
    assert "diffusers context parallel" in measured["variants"]
    assert measured["tokens"] == 2 * 4 * 4
    check(measured)


def check(measured: dict[str, Any]) -> None:
    """Everybody computes the same, and every figure is there."""
    for name, figures in measured["variants"].items():
        assert figures["max_difference"] < 1e-5, name
        assert figures["seconds"]["median"] > 0, name
    assert measured["communication_s"] > 0
    assert all(rate > 0 for rate in measured["delivered_bits_per_s"])
