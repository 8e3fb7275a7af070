"""Makes the README's picture of one attention on two ranks over a slow link, plain and pipelined.

Needs root and iproute2: sudo python docs/make_exchange_picture.py [FILE.svg]
"""

import statistics
import sys
from pathlib import Path

from pipedit.bench.network import network
from pipedit.bench.rank_group import rank_group
from pipedit.media import save_picture
from pipedit.plan.timeline import Timeline
from pipedit.plan.timeline_layout import Panel

IMAGE = Path(__file__).parent / "images" / "exchange.svg"
SHAPE = {"tokens": 4096, "heads": 16, "head_dim": 64}
BYTES_SENT = 4 * 2048 * 8 * 64 * 4  # query, key, value and result: half of the tokens, half of the heads, float32
DELIVERED_SHARE = 0.95  # of a limit; the rest is headers
SETTLING_RUNS = 3
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
            for _ in range(SETTLING_RUNS):
                group.run(variant)
            # Waits are what is left white.
            spans = tuple(span for span in group.trace(variant) if span.what != "wait")
            panels.append(Panel(timeline=Timeline(spans=spans, metadata={}), title=title))
    save_picture(panels, str(path))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGE)
