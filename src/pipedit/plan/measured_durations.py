"""How long work takes, learnt from spans of a run on this machine: what the simulator needs to predict other runs."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from pipedit.core import messages
from pipedit.core.spans import Span
from pipedit.plan.durations import DECODE, ENCODE, FETCH, HELP, ONLOAD, STEP, Piece

_FIRST = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredDurations:
    """Means over requests of one kind: a makespan is a sum, and whatever disturbs a machine makes work longer, so that
    medians would promise too much. `steps` and `chunks` by index: causal decoders begin with a short chunk, and
    steps differ little, so those that were not seen take what the others do. `helped_s`: a step with helpers.
    `conditioning_s` and `latents_s`: to fetch them; `onload_s`: to bring the stage's weights, by role."""

    encode_s: float
    steps: Mapping[int, float]
    chunks: Mapping[int, float]
    helped_s: float | None = None
    conditioning_s: float = 0.0
    latents_s: float = 0.0
    onload_s: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, spans: Iterable[Span]) -> "MeasuredDurations":
        """From a run that has encoded, denoised and decoded at least one video. Ranks of a step work together: the
        longest of them counts."""
        together: dict[tuple[str, str, str, int | None], float] = defaultdict(float)
        helped = set()
        for span in spans:
            key = (span.request_id, span.role, span.what, span.index)
            together[key] = max(together[key], span.duration_s)
            if span.what == HELP:
                helped.add((span.request_id, span.index))
        groups: dict[tuple[str, str, int | None], list[float]] = defaultdict(list)
        for (request_id, role, what, index), seconds in together.items():
            is_helped = what == STEP and (request_id, index) in helped
            groups[role, "helped" if is_helped else what, None if is_helped else index].append(seconds)
        means = {key: statistics.fmean(values) for key, values in groups.items()}

        def one(role: str, what: str) -> float:
            return means.get((role, what, None), 0.0)

        def by_index(what: str) -> dict[int, float]:
            return {index: s for (_, kind, index), s in means.items() if kind == what and index is not None}

        return cls(
            encode_s=one("encoder", ENCODE),
            steps=by_index(STEP) or {_FIRST: one("denoiser", "helped")},
            chunks=by_index(DECODE),
            helped_s=one("denoiser", "helped") or None,
            conditioning_s=one("denoiser", FETCH),
            latents_s=one("decoder", FETCH),
            onload_s={role: one(role, ONLOAD) for role in ("encoder", "denoiser", "decoder")},
        )

    def pieces(self, command: messages.Command) -> Sequence[Piece]:
        match command:
            case messages.Encode():
                return [*self._onload("encoder", is_first=True), Piece(what=ENCODE, seconds=self.encode_s)]
            case messages.Denoise():
                fetched = self.conditioning_s if command.conditioning_at is not None else 0.0
                units = range(command.step, command.step + command.num_steps)
                known = self.steps if command.aco is None or self.helped_s is None else {_FIRST + 1: self.helped_s}
                return [*self._before("denoiser", units, fetched), *_each(STEP, units, known)]
            case messages.Decode():
                fetched = self.latents_s if command.latents_at is not None else 0.0
                units = range(command.chunk, command.chunk + command.num_chunks)
                return [*self._before("decoder", units, fetched), *_each(DECODE, units, self.chunks)]
        return []

    def _before(self, role: str, units: range, fetched_s: float) -> list[Piece]:
        if units.start != _FIRST:
            return []
        fetch = [Piece(what=FETCH, seconds=fetched_s)] if fetched_s else []
        return [*self._onload(role, is_first=True), *fetch]

    def _onload(self, role: str, *, is_first: bool) -> list[Piece]:
        seconds = self.onload_s.get(role, 0.0)
        return [Piece(what=ONLOAD, seconds=seconds)] if is_first and seconds else []


def _each(what: str, units: range, known: Mapping[int, float]) -> list[Piece]:
    later = [seconds for index, seconds in known.items() if index != _FIRST] or list(known.values())
    usual = statistics.fmean(later)
    # The number of a step matters to nobody but the first one: equal commands are asked for once.
    exact = known if what == DECODE else {_FIRST: known.get(_FIRST, usual)}
    return [Piece(what=what, seconds=exact.get(unit, usual), index=place) for place, unit in enumerate(units)]


def gap_s(spans: Sequence[Span]) -> float:
    """What passes between two commands for a request on one rank: answer, decision, next command. Median; 0 if unknown.
    Seen between the first two steps: later ones may be one command."""
    first_ends = {(s.request_id, s.rank): s.end_s for s in spans if s.what == STEP and s.index == _FIRST}
    gaps = [
        s.start_s - first_ends[s.request_id, s.rank]
        for s in spans
        if s.what == STEP and s.index == _FIRST + 1 and (s.request_id, s.rank) in first_ends
    ]
    return max(statistics.median(gaps), 0.0) if gaps else 0.0
