"""A rank of the attention measurement: python attention_rank.py OPTIONS, then JSON lines (see bench.rank_program).

OPTIONS is a JSON object: place, tokens, heads, head_dim.
"""

import functools
import json
import sys
from typing import Any

import torch

from pipedit.bench.rank_program import Place, Variant, join, serve
from pipedit.bench.strategies import TUNING_CALLS, AttentionBench
from pipedit.parallel.pipesp import Overlap, Schedule
from pipedit.parallel.runtime import CHUNK_CHOICES


def variants(bench: AttentionBench) -> dict[str, Variant]:
    """In the order in which a round runs them."""
    counts = sorted({min(count, bench.most_chunks) for count in (*CHUNK_CHOICES, bench.most_chunks)} - {1})
    auto = bench.auto()
    named = {
        "one process": Variant(run=bench.one_process, is_alone=True),
        "compute only": Variant(run=bench.compute, has_result=False),
        "exchange only": Variant(run=bench.exchange(), has_result=False),
        "plain Ulysses": by(bench, Schedule(chunks=1)),
    }
    for label, overlap in (("blocking", Overlap.NONE), ("output only", Overlap.OUTPUT_ONLY), ("PipeSP", Overlap.FULL)):
        for count in counts:
            named[f"{label}, {count} chunks"] = by(bench, Schedule(chunks=count, overlap=overlap))
    named["PipeSP, auto"] = Variant(run=auto.run, facts=auto.facts, settle=functools.partial(settle, auto.run))
    return named


def by(bench: AttentionBench, schedule: Schedule) -> Variant:
    strategy = bench.strategy(schedule)
    return Variant(run=strategy.run, facts=strategy.facts, trace=strategy.trace)


def settle(run: Any) -> None:
    for _ in range(TUNING_CALLS):
        run()


@torch.inference_mode()
def main(options: dict[str, Any]) -> None:
    place = Place(**options.pop("place"))
    join(place)
    bench = AttentionBench(rank=place.rank, world_size=place.world_size, **options)
    serve(place, variants(bench), bench.reference)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
