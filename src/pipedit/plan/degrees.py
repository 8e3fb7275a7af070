"""Which degrees of parallelism can share a request, how evenly each of them does it, and which one to take.

Pure arithmetic: knows no model and no device. The degrees multiply to the number of workers; beyond that nothing has
to divide anything, heads and tokens may be dealt out unevenly.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import AUTO, ParallelConfig

MOST_WORKERS = 1024  # more than that is a slip of the finger
_DEGREES = ("cfg_degree", "ring_degree", "ulysses_degree")  # outermost first
_ATTENTION_SHARE = 0.5  # of a forward's time, about: the rest needs tokens only, which always come out even
# Ring degree -> how much longer it takes. TensorRT-LLM's VisualGen measured this for Wan 2.2 A14B (720p, 80 frames) on
# an NVL72 rack: 3 % at 2, 13 % at 4, 83 % at 9. In between we go by straight lines, beyond 9 on along the last one.
_RING_LOSS: tuple[tuple[int, float], ...] = ((1, 0.0), (2, 0.03), (4, 0.13), (9, 0.83))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """The degrees that somebody asked for; None: to be chosen. `pipesp_chunks` as in ParallelConfig."""

    cfg_degree: int | None = None
    ring_degree: int | None = None
    ulysses_degree: int | None = None
    pipesp_chunks: int | str = AUTO

    @property
    def given(self) -> dict[str, int]:
        return {name: value for name in _DEGREES if (value := getattr(self, name)) is not None}

    def admits(self, config: ParallelConfig) -> bool:
        return all(getattr(config, name) == value for name, value in self.given.items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class DegreeRow:
    """One combination. `reason` says why it cannot run, "" where it can. `note` says how the attention falls out, and
    `balance` is the share of attention time in which a rank works instead of waiting for larger shares, 0 to 1."""

    config: ParallelConfig
    reason: str
    note: str
    balance: float

    @property
    def is_legal(self) -> bool:
        return not self.reason


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Shared:
    """What is dealt out. None: not known yet, so it refuses nothing."""

    heads: int | None
    uses_guidance: bool | None
    tokens: int | None


def choose(wanted: Wanted, num_workers: int, heads: int, uses_guidance: bool, tokens: int) -> ParallelConfig:
    """The combination to run: what is wanted, and for what is left open the best rest.

    `heads` and latent `tokens` are those of one forward pass; `uses_guidance`: a step takes two forward passes. Raises
    InvalidRequestError with every problem.

    The order is the one that TensorRT-LLM's VisualGen found to pay for Wan 2.2: guidance first (its halves meet once a
    step, two GPUs were 1.9 times as fast as one), then Ulysses as far as there are heads, then a ring (see _RING_LOSS).
    We go beyond it in one thing: where heads do not come out even, waiting for the larger shares may cost more than a
    small ring does, so both are predicted and compared.
    """
    problems = degree_problems(wanted, num_workers, heads, uses_guidance, tokens)
    if problems:
        raise InvalidRequestError(problems)
    shared = _Shared(heads=heads, uses_guidance=uses_guidance, tokens=tokens)
    best = max(_matching(wanted, num_workers, shared), key=lambda config: _preference(config, shared))
    if best.pipesp_chunks == AUTO:
        return best
    # A chunk has at least a head of the largest share, so more of them than that cannot be, and shall not be claimed.
    largest_share = -(-heads // best.ulysses_degree)
    return dataclasses.replace(best, pipesp_chunks=min(int(best.pipesp_chunks), largest_share))


def legal_configs(num_workers: int, heads: int, uses_guidance: bool, tokens: int) -> list[DegreeRow]:
    """Every combination for this many workers, the best ones first and those that cannot run last."""
    shared = _Shared(heads=heads, uses_guidance=uses_guidance, tokens=tokens)
    combinations = [config for config in _combinations(num_workers) if config.cfg_degree <= 2]
    combinations.sort(key=lambda config: (not _refusals(config, shared), _preference(config, shared)), reverse=True)
    return [
        DegreeRow(
            config=config,
            reason="; ".join(_refusals(config, shared)),
            note=_note(config, heads=heads, tokens=tokens),
            balance=attention_balance(config, heads=heads, tokens=tokens),
        )
        for config in combinations
    ]


def degree_problems(
    wanted: Wanted,
    num_workers: int,
    heads: int | None = None,
    uses_guidance: bool | None = None,
    tokens: int | None = None,
    *,
    setting: str = "num_workers",
) -> list[str]:
    """Why this cannot run, with the nearest that can; a sentence each. None: not known yet, so nothing is refused for
    it (a model without a request, or no model at all). `setting`: the name by which people know the number."""
    if problems := _value_problems(wanted, num_workers, setting):
        return problems
    shared = _Shared(heads=heads, uses_guidance=uses_guidance, tokens=tokens)
    if _matching(wanted, num_workers, shared):
        return []
    legal = _matching(Wanted(), num_workers, shared)
    if not legal:
        return [_too_few_tokens(num_workers, shared, setting)]
    nearest = min(legal, key=lambda config: (_distance(wanted, config), *(-x for x in _preference(config, shared))))
    ways_out = [", ".join(f"{name}={getattr(nearest, name)}" for name in _DEGREES)]
    fitting = math.prod(wanted.given.values())
    if len(wanted.given) == len(_DEGREES) and fitting != num_workers:
        ways_out.append(f"{setting}={_shown(fitting)}")
    noun = "denoise worker" if setting == "denoise_workers" else "worker"
    why, workers = _why_not(wanted, num_workers, shared), _counted(num_workers, noun)
    return [f"{_listed(wanted.given)} cannot run on {workers}: {why}; nearest that can: {', or '.join(ways_out)}"]


def attention_balance(config: ParallelConfig, *, heads: int, tokens: int) -> float:
    """Work done over work that would fit in while the busiest rank computes its attention: 12 heads on 8 Ulysses ranks
    take as long as 16 would, so 0.75. A ring counts its groups' tokens in the same way."""
    ulysses, ring = config.ulysses_degree, config.ring_degree
    least, extra = divmod(tokens, config.sequence_degree)  # the first `extra` ranks have one more
    most_heads, most_tokens = math.ceil(heads / ulysses), least * ulysses + min(extra, ulysses)
    return heads * tokens / (ulysses * most_heads * ring * most_tokens)


# -- what is wrong ------------------------------------------------------------------------------------------------


def _value_problems(wanted: Wanted, num_workers: int, setting: str) -> list[str]:
    """What can be seen of each number alone."""
    problems = [_count_problem(name, value) for name, value in {setting: num_workers, **wanted.given}.items()]
    if _is_whole(num_workers) and num_workers > MOST_WORKERS:
        problems.append(f"{setting}={_shown(num_workers)} is too many; use at most {MOST_WORKERS}")
    if _is_whole(wanted.cfg_degree) and (wanted.cfg_degree or 0) > 2:
        degree = _shown(wanted.cfg_degree)
        problems.append(f"cfg_degree={degree} is too many: guidance makes two predictions; use 1 or 2")
    if wanted.pipesp_chunks != AUTO and (problem := _count_problem("pipesp_chunks", wanted.pipesp_chunks)):
        problems.append(f"{problem}, or {AUTO!r}")
    return [problem for problem in problems if problem is not None]


def _count_problem(name: str, value: Any) -> str | None:
    if not _is_whole(value):
        return f"{name}={value!r} should be a whole number"
    return None if value >= 1 else f"{name}={_shown(value)} must be at least 1"


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A number as text; a huge one by its size (Python refuses to print thousands of digits)."""
    return str(value) if abs(value) < 10**30 else ("-" if value < 0 else "") + "10^30 or more"


def _why_not(wanted: Wanted, num_workers: int, shared: _Shared) -> str:
    """Why no combination with these degrees is legal."""
    given = wanted.given
    product = math.prod(given.values())
    if len(given) == len(_DEGREES) and product != num_workers:
        return f"together they make {_shown(product)}"
    if num_workers % product:
        return f"{_shown(product)}{', which they make,' if len(given) > 1 else ''} does not divide {num_workers}"
    found = [_refusals(config, shared) for config in _combinations(num_workers) if wanted.admits(config)]
    common = [reason for reason in found[0] if all(reason in others for others in found)]
    return ", and ".join(common or dict.fromkeys(reason for reasons in found for reason in reasons))


def _refusals(config: ParallelConfig, shared: _Shared) -> list[str]:
    """Every reason why this combination cannot run."""
    reasons = []
    if config.cfg_degree > 2:
        reasons.append(f"cfg_degree would be {config.cfg_degree}, and guidance makes two predictions")
    elif config.cfg_degree == 2 and shared.uses_guidance is False:
        reasons.append("cfg_degree 2 needs guidance, which makes two predictions a step; the request has none")
    if shared.heads is not None and config.ulysses_degree > shared.heads:
        heads, ranks = _counted(shared.heads, "head"), config.ulysses_degree
        reasons.append(f"{heads} cannot go round {ranks} Ulysses ranks (ring_degree is for the rest)")
    if shared.tokens is not None and config.sequence_degree > shared.tokens:
        reasons.append(f"{_counted(shared.tokens, 'token')} cannot go round {config.sequence_degree} ranks")
    return reasons


def _too_few_tokens(num_workers: int, shared: _Shared, setting: str) -> str:
    assert shared.tokens is not None
    tokens = _counted(shared.tokens, "token")
    more = "" if shared.uses_guidance is False else f", or with guidance an even number up to {2 * shared.tokens}"
    return (
        f"{setting}={num_workers} is too many: the request has {tokens}, and every rank needs one; "
        f"use at most {shared.tokens}{more}"
    )


def _distance(wanted: Wanted, config: ParallelConfig) -> float:
    return sum(abs(math.log(getattr(config, name)) - math.log(value)) for name, value in wanted.given.items())


# -- what there is, and what is best ------------------------------------------------------------------------------


def _combinations(num_workers: int, chunks: int | str = AUTO) -> Iterator[ParallelConfig]:
    """Every way to write the number of workers as cfg x ring x ulysses."""
    divisors = [n for n in range(1, num_workers + 1) if num_workers % n == 0]
    for cfg in divisors:
        for ring in divisors:
            if num_workers % (cfg * ring) == 0:
                yield ParallelConfig(
                    cfg_degree=cfg,
                    ring_degree=ring,
                    ulysses_degree=num_workers // (cfg * ring),
                    pipesp_chunks=chunks,
                )


def _matching(wanted: Wanted, num_workers: int, shared: _Shared) -> list[ParallelConfig]:
    """The legal combinations that are what is wanted."""
    combinations = _combinations(num_workers, wanted.pipesp_chunks)
    return [config for config in combinations if wanted.admits(config) and not _refusals(config, shared)]


def _preference(config: ParallelConfig, shared: _Shared) -> tuple[int, float]:
    """The larger, the better."""
    heads, tokens = shared.heads or config.ulysses_degree, shared.tokens or config.sequence_degree
    balance = attention_balance(config, heads=heads, tokens=tokens)
    relative_time = (1 - _ATTENTION_SHARE + _ATTENTION_SHARE / balance) * (1 + _ring_loss(config.ring_degree))
    return config.cfg_degree, 1 / relative_time


def _ring_loss(degree: int) -> float:
    lines = list(itertools.pairwise(_RING_LOSS))
    (x0, y0), (x1, y1) = next((line for line in lines if degree <= line[1][0]), lines[-1])
    return y0 + (y1 - y0) * (degree - x0) / (x1 - x0)


# -- in words -----------------------------------------------------------------------------------------------------


def _note(config: ParallelConfig, *, heads: int, tokens: int) -> str:
    """How heads and tokens come out, such as "12 heads on 8 ranks: 4 x 2 and 4 x 1, ..."."""
    ranks, sequence = config.ulysses_degree, config.sequence_degree
    parts = [f"all {_counted(heads, 'head')} on each rank" if ranks == 1 else _dealt(heads, "head", ranks)]
    if config.ring_degree > 1:
        loss = round(_ring_loss(config.ring_degree) * 100)
        parts.append(f"ring of {config.ring_degree}: about {loss} % slower")
    balance = attention_balance(config, heads=heads, tokens=tokens)
    if tokens < 100 * sequence and tokens % sequence:  # with more, one token does not matter
        parts.append(_dealt(tokens, "token", sequence))
    if balance < 0.995:
        parts.append(f"attention waits for the larger shares: {balance * 100:.0f} % efficient")
    return ", ".join(parts)


def _dealt(total: int, what: str, ranks: int) -> str:
    """ "24 heads on 8 ranks: 3 each", "12 heads on 8 ranks: 2 on 4 of them, 1 on the others"."""
    least, extra = divmod(total, ranks)
    shares = f"{least + 1} on {extra} of them, {least} on the others" if extra else f"{least} each"
    return f"{_counted(total, what)} on {ranks} ranks: {shares}"


def _listed(given: dict[str, int]) -> str:
    texts = [f"{name}={_shown(value)}" for name, value in given.items()]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
