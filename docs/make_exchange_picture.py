"""Makes the README's picture of one attention on two ranks over a slow link, plain and pipelined.

Needs root and iproute2: sudo python docs/make_exchange_picture.py [FILE.svg]
"""

import statistics
import sys
from pathlib import Path

from pipedit.bench.network import network
from pipedit.bench.rank_group import rank_group
from pipedit.core.spans import Span
from pipedit.media import save_picture
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_layout import Panel

IMAGE = Path(__file__).parent / "images" / "exchange.svg"
SHAPE = {"tokens": 4096, "heads": 16, "head_dim": 64}
BYTES_SENT = 4 * 2048 * 8 * 64 * 4  # query, key, value and result: half of the tokens, half of the heads, float32
DELIVERED_SHARE = 0.95  # of a limit; the rest is headers
SETTLING_RUNS, TRACES = 5, 9
TITLES = {
    "plain Ulysses": "Plain Ulysses: compute, or communicate",
    "PipeSP, 8 chunks": "PipeSP: the exchanges run under the attention",
}


def main(path: Path) -> None:
    with network(2) as net, rank_group("attention_rank.py", net, SHAPE, timeout_s=120) as group:
        compute_s = statistics.median(group.run("compute only").seconds for _ in range(SETTLING_RUNS))
        net.limit(8 * BYTES_SENT / compute_s / DELIVERED_SHARE)
        panels = []
        for variant, title in TITLES.items():
            group.run(variant)
            panels.append(Panel(timeline=_typical([group.trace(variant) for _ in range(TRACES)]), title=title))
    save_picture(panels, str(path))


def _typical(traces: list[list[Span]]) -> Timeline:
    """The run of median length. Waits are what is left white."""
    timelines = [Timeline(spans=tuple(span for span in spans if span.what != "wait"), metadata={}) for spans in traces]
    return sorted(timelines, key=lambda timeline: timeline.makespan_s)[len(timelines) // 2]


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGE)
