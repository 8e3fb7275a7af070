"""`pipedit bench sequence-parallel`: how much of the communication is hidden, over real links of a stated rate.

Every rank is a process with one core, one thread, and a network namespace whose link is limited. Attention alone is
measured at given ratios of communication to computing, a whole transformer at given rates beside diffusers.
"""

import dataclasses
import functools
import itertools
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipedit.bench.bounds import Floor, hidden_seconds, judge
from pipedit.bench.environment import environment, load
from pipedit.bench.network import MAX_RANKS, Network, network, requirement_problem
from pipedit.bench.rank_group import RankGroup, Run, rank_group
from pipedit.bench.sampling import Spread, interleave
from pipedit.core.errors import InvalidRequestError, PipeditError

ONE_PROCESS, COMPUTE, EXCHANGE = "one process", "compute only", "exchange only"
PLAIN, DIFFUSERS = "plain Ulysses", "diffusers context parallel"
_REFERENCES = (ONE_PROCESS, COMPUTE, EXCHANGE)  # not the whole work on all ranks: nothing to judge
_BASELINES = {"plain_ulysses": PLAIN, "one_process": ONE_PROCESS, "diffusers": DIFFUSERS}
_CONTROL = "blocking"  # variants that begin so hide nothing, so that none may be faster than plain Ulysses
_NOISE = 1.02  # a control that is faster by more than this shows that the links give credit
_DELIVERED_SHARE = 0.95  # of a limit, before it is measured: the rest is headers
_CALIBRATION_RUNS = 3

ATTENTION, LAYERS = "attention", "layers"
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionShape:
    tokens: int = 4096
    heads: int = 16
    head_dim: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayersShape:
    """A Wan of random_pipelines.SIZES and what goes into it. The defaults make 4096 tokens. `num_layers` None: all."""

    model: str = "wan_mid"
    latent_frames: int = 16
    latent_height: int = 32
    latent_width: int = 32
    text_tokens: int = 64
    num_layers: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceParallelBench:
    """What to measure. `links`: communication : compute of the attention part; `rates_bits_per_s` of the layers part,
    None is unlimited. Each for every number of `ranks`."""

    links: Sequence[float] = (0.5, 1.0, 2.0)
    ranks: Sequence[int] = (2, 4)
    rates_bits_per_s: Sequence[float | None] = (300e6, None)
    parts: Sequence[str] = (ATTENTION, LAYERS)
    rounds: int = 5
    attention: AttentionShape = AttentionShape()
    layers: LayersShape = LayersShape()
    timeout_s: float = 300.0  # of one answer of a rank


def problems(bench: SequenceParallelBench) -> list[str]:
    """Everything wrong with what is asked for, a sentence each."""
    found = [
        f"a link of {link:g} should be a positive ratio of communication to computing, such as 1"
        for link in bench.links
        if not (math.isfinite(link) and link > 0)
    ]
    found += [f"{ranks} ranks should be 2 to {MAX_RANKS}" for ranks in bench.ranks if not 2 <= ranks <= MAX_RANKS]
    found += [
        f"a rate of {rate / 1e6:g} Mbit/s should be at least 1"
        for rate in bench.rates_bits_per_s
        if rate is not None and not (math.isfinite(rate) and rate >= 1e6)
    ]
    heads, tokens = bench.attention.heads, bench.attention.tokens
    if ATTENTION in bench.parts and max(bench.ranks) > min(heads, tokens):
        found.append(f"{max(bench.ranks)} ranks cannot share {heads} heads and {tokens} tokens; take fewer ranks")
    return found + (_layers_problems(bench) if LAYERS in bench.parts else [])


def _layers_problems(bench: SequenceParallelBench) -> list[str]:
    from pipedit.models.random_pipelines import sizes_of

    heads = sizes_of(bench.layers.model).transformer["num_attention_heads"]
    return [
        f"{ranks} ranks do not divide the {heads} heads of {bench.layers.model}, as diffusers needs; "
        "leave them out or measure --part attention"
        for ranks in bench.ranks
        if 2 <= ranks <= MAX_RANKS and heads % ranks
    ]


def run(bench: SequenceParallelBench, tell: Tell) -> dict[str, Any]:
    """JSON-ready figures; `tell` hears what is going on. Raises InvalidRequestError for wrong arguments and
    PipeditError on a machine that cannot do it."""
    if found := problems(bench):
        raise InvalidRequestError(found)
    if problem := requirement_problem():
        raise PipeditError(f"bench sequence-parallel {problem}")
    result: dict[str, Any] = {"benchmark": "sequence_parallel", "rounds": bench.rounds, "load_at_start": load()}
    shapes: dict[str, AttentionShape | LayersShape] = {ATTENTION: bench.attention, LAYERS: bench.layers}
    for part in bench.parts:
        result[part] = {"shape": dataclasses.asdict(shapes[part]), "runs": []}
    for ranks in bench.ranks:
        with network(ranks) as net:
            if ATTENTION in bench.parts:
                result[ATTENTION]["runs"] += [_attention_run(bench, net, link, tell) for link in bench.links]
            if LAYERS in bench.parts:
                result[LAYERS]["runs"] += [_layers_run(bench, net, rate, tell) for rate in bench.rates_bits_per_s]
    return {**result, "environment": environment()}


# -- attention alone ----------------------------------------------------------------------------------------------


def _attention_run(bench: SequenceParallelBench, net: Network, link: float, tell: Tell) -> dict[str, Any]:
    net.limit(None)
    options = dataclasses.asdict(bench.attention)
    sent = _attention_egress_bytes(bench.attention, net.size)
    with rank_group("attention_rank.py", net, options, timeout_s=bench.timeout_s) as group:
        limit = _calibrate(group, net, link, sent)
        tell(f"attention, {net.size} ranks, communication : compute {link:g}: links of {limit / 1e6:.1f} Mbit/s")
        measured = _measure(group, limit, bench.rounds, tell)
    floor = Floor(
        compute_s=measured.seconds[COMPUTE], communication_s=sent * 8 / statistics.mean(measured.delivered_bits_per_s)
    )
    return {
        "ranks": net.size,
        "wanted_ratio": link,
        **_link_figures(net, limit, measured),
        "egress_bytes": sent,
        **_figures(measured, floor),
        "control_holds": _control_holds(measured.seconds),
    }


def _attention_egress_bytes(shape: AttentionShape, ranks: int) -> int:
    """Of the rank that sends most."""
    from pipedit.bench.strategies import egress_bytes
    from pipedit.core.shares import split_evenly

    tokens, heads = split_evenly(shape.tokens, ranks), split_evenly(shape.heads, ranks)
    return max(egress_bytes(tokens, heads, rank, shape.head_dim * 4) for rank in range(ranks))


def _calibrate(group: RankGroup, net: Network, link: float, sent_bytes: int) -> float:
    """Limits the links so that sending `sent_bytes` takes `link` times as long as the computing. Returns the limit."""
    group.run(COMPUTE)
    compute_s = statistics.median(group.run(COMPUTE).seconds for _ in range(_CALIBRATION_RUNS))
    wanted = sent_bytes * 8 / (link * compute_s)
    limit = wanted / _DELIVERED_SHARE
    net.limit(limit)
    limit *= wanted / group.delivered(wanted)
    net.limit(limit)
    return limit


def _control_holds(seconds: Mapping[str, Sequence[float]]) -> bool:
    plain = statistics.median(seconds[PLAIN])
    return all(plain <= _NOISE * statistics.median(s) for name, s in seconds.items() if name.startswith(_CONTROL))


# -- a whole transformer ------------------------------------------------------------------------------------------


def _layers_run(bench: SequenceParallelBench, net: Network, limit: float | None, tell: Tell) -> dict[str, Any]:
    net.limit(limit)
    options = dataclasses.asdict(bench.layers)
    tell(f"whole transformer, {net.size} ranks, {_name_rate(limit)}")
    with rank_group("transformer_rank.py", net, options, timeout_s=bench.timeout_s) as group:
        measured = _measure(group, limit, bench.rounds, tell)
        size = {name: group.facts[name] for name in ("parameters", "tokens")}
    computing = measured.facts[COMPUTE]
    floor = Floor(
        compute_s=measured.seconds[COMPUTE],
        communication_s=computing["egress_bytes"] * 8 / statistics.mean(measured.delivered_bits_per_s),
    )
    attainable = [hidden_seconds(one, computing["attention_s"], floor.communication_s) for one in floor.compute_s]
    return {
        "ranks": net.size,
        **size,
        **_link_figures(net, limit, measured),
        "egress_bytes": computing["egress_bytes"],
        "attention_s": computing["attention_s"],
        # exchanges hidden under attention only; the projections of other chunks can hide a little more
        "hidden_under_attention_s": dataclasses.asdict(Spread.of(attainable)),
        **_figures(measured, floor),
    }


def _name_rate(bits_per_s: float | None) -> str:
    return "unlimited links" if bits_per_s is None else f"links of {bits_per_s / 1e6:g} Mbit/s"


# -- both ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """By variant: seconds of each round, the worst comparison with the reference, and facts. The delivered rate before
    and after."""

    seconds: dict[str, list[float]]
    worst: dict[str, Run]
    facts: Mapping[str, dict[str, Any]]
    delivered_bits_per_s: list[float]


def _measure(group: RankGroup, limit: float | None, rounds: int, tell: Tell) -> _Measured:
    """The delivered rate, rounds of all variants in turn, and the rate again."""
    before = group.delivered(limit)
    group.settle()
    worst: dict[str, Run] = {}
    begun = itertools.count()

    def run_one(name: str) -> float:
        if name == group.variants[0]:
            number = next(begun)
            tell(f"  round {number} of {rounds}" if number else f"  {len(group.variants)} variants, once to warm up")
        done = group.run(name)
        worst[name] = _worse(worst.get(name, done), done)
        return done.seconds

    seconds = interleave({name: functools.partial(run_one, name) for name in group.variants}, rounds=rounds)
    after = group.delivered(limit)
    facts = group.variant_facts()
    return _Measured(seconds=seconds, worst=worst, facts=facts, delivered_bits_per_s=[before, after])


def _worse(one: Run, other: Run) -> Run:
    if one.max_difference is None or other.max_difference is None:
        return one
    return dataclasses.replace(
        one,
        is_equal=bool(one.is_equal and other.is_equal),
        max_difference=max(one.max_difference, other.max_difference),
    )


def _link_figures(net: Network, limit: float | None, measured: _Measured) -> dict[str, Any]:
    return {
        "ranks_per_core": math.ceil(net.size / len(os.sched_getaffinity(0))),
        "limit_bits_per_s": limit,
        "delivered_bits_per_s": measured.delivered_bits_per_s,
    }


def _figures(measured: _Measured, floor: Floor) -> dict[str, Any]:
    baselines = {key: name for key, name in _BASELINES.items() if name in measured.seconds}
    variants = judge(measured.seconds, floor, baselines)
    for name, figures in variants.items():
        worst = measured.worst[name]
        figures |= {"is_equal": worst.is_equal, "max_difference": worst.max_difference, **measured.facts[name]}
    references = {name: measured.seconds[name] for name in _REFERENCES if name in measured.seconds}
    return {
        "communication_s": floor.communication_s,
        "ratio": dataclasses.asdict(floor.ratio),
        "ideal_s": dataclasses.asdict(Spread.of(floor.ideal_s)),
        "references_s": {name: dataclasses.asdict(Spread.of(seconds)) for name, seconds in references.items()},
        "variants": {name: figures for name, figures in variants.items() if name not in _REFERENCES},
    }
