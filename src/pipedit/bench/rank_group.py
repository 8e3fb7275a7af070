"""The ranks of a measured group as processes, each in its namespace and on its core, asked together."""

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipedit.bench.network import DEVICE, Network
from pipedit.bench.processes import Peer
from pipedit.core.spans import Span

_POLL_S = 0.02  # no time is taken here: the ranks take their own
_LEAST_PROBE_BYTES, _MOST_PROBE_BYTES = 1 << 20, 1 << 28


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a variant: wall seconds from the first rank's start to the last rank's end. `is_equal` and
    `max_difference` compare its result, on all ranks, with the reference; None where there is none."""

    seconds: float
    is_equal: bool | None
    max_difference: float | None


class RankGroup:
    """Made by `rank_group`. `alone`: variants that rank 0 runs by itself."""

    def __init__(self, peers: Sequence[Peer], program: str, timeout_s: float) -> None:
        self._peers, self._program, self._timeout_s = peers, program, timeout_s
        first = self._answers(range(len(peers)))[0]
        self.variants: list[str] = first["variants"]
        self._alone: list[str] = first["alone"]
        self.facts: dict[str, Any] = first

    def run(self, variant: str) -> Run:
        ranks = range(1 if variant in self._alone else len(self._peers))
        answers = self._ask(ranks, do="run", variant=variant)
        compared = [answer for answer in answers if "is_equal" in answer]
        return Run(
            seconds=max(answer["end_s"] for answer in answers) - min(answer["start_s"] for answer in answers),
            is_equal=all(answer["is_equal"] for answer in compared) if compared else None,
            max_difference=max(answer["max_difference"] for answer in compared) if compared else None,
        )

    def trace(self, variant: str) -> list[Span]:
        """Spans of one run on all ranks."""
        answers = self._ask(range(len(self._peers)), do="trace", variant=variant)
        return [Span(**span) for answer in answers for span in answer["spans"]]

    def settle(self) -> None:
        """Lets variants that tune themselves do so."""
        self._ask(range(len(self._peers)), do="settle")

    def delivered(self, expected_bits_per_s: float | None, *, for_s: float = 0.6) -> float:
        """Bits per second that a link delivers to a plain stream while all ranks send and receive: their mean."""
        payload = _MOST_PROBE_BYTES if expected_bits_per_s is None else int(expected_bits_per_s * for_s / 8)
        payload = min(max(payload, _LEAST_PROBE_BYTES), _MOST_PROBE_BYTES)
        answers = self._ask(range(len(self._peers)), do="probe", payload_bytes=payload)
        rates = [float(answer["bits_per_s"]) for answer in answers]
        return sum(rates) / len(rates)

    def variant_facts(self) -> Mapping[str, dict[str, Any]]:
        """What the variants have to report after their runs, from rank 0."""
        return self._ask(range(1), do="facts")[0]

    def _ask(self, ranks: Sequence[int], **request: Any) -> list[dict[str, Any]]:
        for rank in ranks:
            self._peers[rank].ask(json.dumps(request))
        return self._answers(ranks)

    def _answers(self, ranks: Sequence[int]) -> list[dict[str, Any]]:
        """One answer of each. A rank that ends is noticed while others are waited for."""
        answers: dict[int, dict[str, Any]] = {}
        deadline = time.monotonic() + self._timeout_s
        while len(answers) < len(ranks):
            for rank in ranks:
                if rank not in answers and (answer := self._peers[rank].poll(_POLL_S)) is not None:
                    answers[rank] = answer
            if time.monotonic() > deadline:
                silent = [rank for rank in ranks if rank not in answers]
                raise TimeoutError(f"ranks {silent} of {self._program} did not answer within {self._timeout_s:.0f} s")
        return [answers[rank] for rank in ranks]


@contextlib.contextmanager
def rank_group(program: str, network: Network, options: Mapping[str, Any], *, timeout_s: float) -> Iterator[RankGroup]:
    """Starts `program` (below peers/) once a rank: rank i on core i of those that this process may use, and round
    again. It is handed one JSON object: its place, and `options`."""
    cores = sorted(os.sched_getaffinity(0))
    addresses = [network.address(rank) for rank in range(network.size)]
    # torch warns that the addresses have no names
    variables = {"GLOO_SOCKET_IFNAME": DEVICE, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
    with contextlib.ExitStack() as stack:
        peers = []
        for rank in range(network.size):
            # waits inside the ranks are shorter, so that they can still say what they waited for
            place = {"rank": rank, "addresses": addresses, "core": cores[rank % len(cores)], "timeout_s": timeout_s / 2}
            peer = Peer(
                program, [json.dumps({"place": place, **options})], timeout_s=timeout_s,
                enter=network.enter(rank), variables=variables, wait_ready=False,
            )  # fmt: skip
            peers.append(stack.enter_context(peer))
        for peer in peers:
            # called before any of them is waited for: none shall live to complain that another has gone
            stack.callback(peer.kill)
        yield RankGroup(peers, program, timeout_s)
