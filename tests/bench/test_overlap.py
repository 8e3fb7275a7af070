"""The emulated link keeps its rate, and the bench's figures are those of the exchange; speed is not judged."""

import json
import time

import pytest
import torch

from pipedit.bench.emulated_link import EmulatedChannel, SleepingLink
from pipedit.bench.overlap import SITES, OverlapBench, run
from pipedit.cli.app import run as run_cli

# 2 MB each way at 50 MB/s: long against the jitter of sleeping
RATE, PAYLOAD_S = 50e6, 0.04
HAS_GPU = torch.cuda.is_available()


def messages() -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    return [None, torch.ones(500_000)], [None, torch.zeros(500_000)]


def test_both_directions_share_the_link_in_order() -> None:
    link = SleepingLink(RATE)
    inward, outward = EmulatedChannel(2, link), EmulatedChannel(2, link)
    start = time.perf_counter()
    first, second = inward.swap(*messages()), outward.swap(*messages())
    first.wait()
    between = time.perf_counter() - start
    second.wait()
    both = time.perf_counter() - start
    assert PAYLOAD_S <= between < 1.9 * PAYLOAD_S and both >= 2 * PAYLOAD_S
    assert link.take_busy_s() == pytest.approx(2 * PAYLOAD_S) and link.take_busy_s() == 0


def test_a_wait_after_the_arrival_takes_no_time() -> None:
    pending = EmulatedChannel(2, SleepingLink(RATE)).swap(*messages())
    time.sleep(1.1 * PAYLOAD_S)
    start = time.perf_counter()
    pending.wait()
    assert time.perf_counter() - start < 0.5 * PAYLOAD_S


def test_without_a_link_nothing_moves() -> None:
    outgoing, incoming = messages()
    EmulatedChannel(2, None).swap(outgoing, incoming).wait()
    assert incoming[1] is not None and not incoming[1].any()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no CUDA")])]
)
def test_every_chunking_is_measured_against_the_bound(device: str) -> None:
    result = json.loads(json.dumps(run(OverlapBench(device=device, scale="small", links_gb_per_s=(0.1,), rounds=3))))
    assert {"processor", "commit", "command", "packages"} <= set(result["environment"])
    assert "do not exist" in result["emulation"] and result["not_measured"]
    for site, case in zip(SITES["small"], result["cases"], strict=True):
        (link,) = case["links"]
        plain, *chunked = link["forms"]
        assert [form["chunks"] for form in link["forms"]] == [*site.chunk_counts, site.own_heads]
        assert [form["overlap"] for form in chunked] == ["full"] * (len(chunked) - 1) + ["output_only"]
        assert link["bound_s"] == max(link["compute_s"], link["communication_s"])
        # however it is cut, the same bytes travel
        expected_s = (case["incoming_bytes"] + case["outgoing_bytes"]) / 0.1e9
        carried = [form["communication_s"] for form in link["forms"]]
        assert carried == pytest.approx([expected_s] * len(carried), rel=1e-6 if device == "cpu" else 0.5)
        # negative control: what blocks hides nothing, so the figure can tell
        assert plain["hidden_share"]["median"] < 0.2 < max(form["hidden_share"]["median"] for form in chunked)


def test_what_cannot_be_measured_is_said_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "overlap", "--device", "cpu"]) == 2
    assert "use scale small" in capsys.readouterr().err
    assert run_cli(["bench", "overlap", "--scale", "tiny", "--links", "0,nan"]) == 2
    said = capsys.readouterr().err
    assert "scale 'tiny' is not known" in said and "0 GB/s is not possible" in said and "nan GB/s" in said
    assert run_cli(["bench", "overlap", "--links", "fast"]) == 2
    assert "--links fast should be numbers" in capsys.readouterr().err


def test_the_command_prints_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "overlap", "--device", "cpu", "--scale", "small", "--links", "1", "--rounds", "1"]
    assert run_cli([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["benchmark"] == "overlap"
    assert run_cli(arguments) == 0
    assert "small, with text, one of 4 ranks" in capsys.readouterr().out
