"""Ulysses, and PipeSP: Ulysses whose exchanges are pipelined with attention by chunks of heads.

PipeDiT (section 3.1) hides the output exchange of a head under the attention of the next one. Here both directions are
in flight: while chunk c is computed, the chunks after it arrive and those before it leave; and the ends, which have
nothing to hide under in the paper, are hidden too:

* the first chunk's value, query and key leave one by one, each under the projection of the next one, and attention of
  the first chunks starts over the own keys, with the own queries, while the others' are still on their way;
* in the last chunk the others' rows are computed first and leave under the attention of the own rows, which need not
  travel.
"""

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterator, Sequence

import torch

from pipedit.parallel.calls import Call, Kernel, Result, key_mask
from pipedit.parallel.channel import Channel, Transport
from pipedit.parallel.early import EarlyAttention
from pipedit.parallel.exchange import KEY, QUERY, VALUE, ExchangeShape, Inward, Outward
from pipedit.parallel.record import Record
from pipedit.parallel.workspace import Workspace


class Overlap(enum.Enum):
    """What is hidden. FULL is PipeSP. OUTPUT_ONLY is the paper's form and NONE blocks at each exchange: both are there
    to be measured against."""

    FULL = "full"
    OUTPUT_ONLY = "output_only"
    NONE = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """`chunks`: head chunks, at most the largest share of heads. One chunk is plain Ulysses: it blocks."""

    chunks: int
    overlap: Overlap = Overlap.FULL
    transport: Transport = Transport.POINT_TO_POINT

    @property
    def is_plain(self) -> bool:
        return self.chunks == 1 or self.overlap is Overlap.NONE


# Chunks that arrive while one is computed, and results that leave meanwhile. Two keep the link busy when one of them
# happens to be late; more would only cost memory.
AHEAD = 2
BEHIND = 2
# Chunks whose attention starts over the own keys. With as much communication as computing, the second one arrives when
# the first one, begun early, is done; from then on the link is ahead.
EARLY = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lines:
    """The two directions of one group, and the buffers of this rank."""

    inward: Channel
    outward: Channel
    workspace: Workspace

    @property
    def index(self) -> int:
        return self.inward.index


class PipeSP:
    """One attention over a group. `splits_rows`: the kernel may be called for some query rows at a time (ring
    attention, where every call moves all keys, may not)."""

    def __init__(
        self,
        lines: Lines,
        shape: ExchangeShape,
        schedule: Schedule,
        kernel: Kernel,
        *,
        splits_rows: bool = True,
        record: Record | None = None,
    ) -> None:
        self._lines, self._shape, self._schedule, self._kernel = lines, shape, schedule, kernel
        self._splits_rows = splits_rows and schedule.overlap is Overlap.FULL and schedule.chunks > 1
        self._record = record or Record()
        count = len(shape.chunks)
        # In the paper's form the whole input has arrived before attention starts.
        full = {Overlap.FULL: AHEAD, Overlap.OUTPUT_ONLY: count, Overlap.NONE: 0}[schedule.overlap]
        self._ahead = min(full, count - 1)
        self._behind = 0 if schedule.is_plain else BEHIND

    def attend(self, call: Call) -> Iterator[Result]:
        """Results of the chunks in order of their heads. Every rank of the group runs this at the same time."""
        count = len(self._shape.chunks)
        mask = key_mask(call, self._shape.latent_tokens)
        arriving = collections.deque(self._send(call, chunk) for chunk in range(self._ahead + 1))
        if self._schedule.overlap is Overlap.OUTPUT_ONLY:
            for chunk, inward in enumerate(arriving):
                self._wait(inward, chunk, QUERY, KEY, VALUE)
        leaving: collections.deque[tuple[int, Outward]] = collections.deque()
        for chunk in range(count):
            inward = arriving.popleft()
            leaving.append((chunk, self._compute(inward, chunk, mask)))
            inward.finish()
            if (following := chunk + self._ahead + 1) < count:
                arriving.append(self._send(call, following))
            if len(leaving) > self._behind:
                yield self._result(*leaving.popleft())
        while leaving:
            yield self._result(*leaving.popleft())

    def _send(self, call: Call, chunk: int) -> Inward:
        """Projects a chunk of heads and posts it."""
        lines, shape = self._lines, self._shape
        slot = chunk % (self._ahead + 1)
        inward = Inward(lines.inward, shape, chunk, lines.workspace, slot, self._schedule.transport, self._record)
        run = inward.run
        sent_text = None if inward.sent_text is None else call.text(inward.sent_text)
        if chunk == 0 and self._splits_rows:
            inward.send_part(VALUE, call.value(run), sent_text)
            inward.send_part(QUERY, call.query(run), sent_text)
            inward.send_part(KEY, call.key(run), sent_text)
        else:
            value = call.value(run)
            inward.send_all((call.query(run), call.key(run), value), sent_text)
        if shape.text_of(lines.index):
            inward.put_text(call.text(inward.own_run))
        return inward

    def _compute(self, inward: Inward, chunk: int, mask: torch.Tensor | None) -> Outward:
        """Attention of this rank's heads; posts the result as soon as the others' rows are done."""
        lines, slot = self._lines, chunk % (self._behind + 1)
        outward = Outward(
            lines.outward, self._shape, chunk, lines.workspace, slot, self._schedule.transport, self._record
        )
        is_last = chunk == len(self._shape.chunks) - 1
        if chunk < EARLY and self._splits_rows and not is_last and not self._helps:
            self._put(outward, self._everybody, self._start_early(inward, chunk, mask))
            outward.post()
            return outward
        self._wait(inward, chunk, QUERY, KEY, VALUE)
        if is_last and self._splits_rows:
            self._put(outward, self._others, self._attend(inward, chunk, mask, self._rows(self._others)))
            outward.post()
            own = (self._lines.index,)
            self._put(outward, own, self._attend(inward, chunk, mask, [self._shape.rows[self._lines.index]]))
        else:
            self._put(outward, self._everybody, self._attend(inward, chunk, mask, [slice(0, self._shape.all_rows)]))
            outward.post()
        return outward

    def _start_early(self, inward: Inward, chunk: int, mask: torch.Tensor | None) -> torch.Tensor:
        """A chunk under whose transfer too little was computed: its attention begins with what is here."""
        shape, me = self._shape, self._lines.index
        own, text = shape.rows[me], slice(shape.latent_tokens, shape.all_rows)
        parts = [inward.view(part) for part in (QUERY, KEY, VALUE)]
        if inward.own_heads == 0:
            self._wait(inward, chunk, QUERY, KEY, VALUE)
            return parts[0]
        # The text's keys follow the last rank's: there they are one run with the own ones.
        keys = slice(own.start, shape.all_rows if own.stop == shape.latent_tokens else own.stop)
        query, key, value = parts
        early = EarlyAttention(query, key, value, mask, keys, self._lines.workspace)
        with self._record.measure("attention", chunk):
            early.add([own, text])
        self._wait(inward, chunk, QUERY)
        with self._record.measure("attention", chunk):
            early.add([slice(0, own.start), slice(own.stop, shape.latent_tokens)])
        self._wait(inward, chunk, KEY, VALUE)
        with self._record.measure("attention", chunk):
            return early.finish()

    def _attend(self, inward: Inward, chunk: int, mask: torch.Tensor | None, rows: Sequence[slice]) -> torch.Tensor:
        """[B, n, Q, D] of these query rows; none of them if this rank has no heads in the chunk."""
        query = _pick(inward.view(QUERY), rows)
        if query.numel() == 0:
            return query
        with self._record.measure("attention", chunk):
            return self._kernel(query, inward.view(KEY), inward.view(VALUE), mask)

    @property
    def _helps(self) -> bool:
        """Whether this rank has nothing of its own to begin with."""
        return self._lines.index >= self._shape.owners

    @property
    def _everybody(self) -> tuple[int, ...]:
        return tuple(range(len(self._shape.tokens)))

    @property
    def _others(self) -> tuple[int, ...]:
        return tuple(member for member in self._everybody if member != self._lines.index)

    def _rows(self, members: Sequence[int]) -> list[slice]:
        """Query rows of the members' tokens, and of the text."""
        return [
            *(self._shape.rows[member] for member in members),
            slice(self._shape.latent_tokens, self._shape.all_rows),
        ]

    def _put(self, outward: Outward, members: Sequence[int], result: torch.Tensor) -> None:
        """Hands each member its rows of the result, and the text's rows to all if they are there."""
        counts = [self._shape.tokens[member] for member in members]
        *pieces, text = torch.split(result, [*counts, result.shape[2] - sum(counts)], dim=2)
        for member, piece in zip(members, pieces, strict=True):
            outward.put(piece, member)
        if text.shape[2]:
            outward.put_text(text)

    def _wait(self, inward: Inward, chunk: int, *parts: int) -> None:
        with self._record.measure("wait", chunk):
            for part in parts:
                inward.wait(part)

    def _result(self, chunk: int, outward: Outward) -> Result:
        with self._record.measure("wait", chunk):
            latents, text = outward.wait()
        return Result(heads=outward.run, latents=latents, text=text)


def _pick(query: torch.Tensor, rows: Sequence[slice]) -> torch.Tensor:
    """These rows of [B, n, S + T, D]: a view where they are in one piece."""
    rows = [each for each in rows if each.stop > each.start] or [slice(0, 0)]
    if all(before.stop == after.start for before, after in itertools.pairwise(rows)):
        return query[:, :, rows[0].start : rows[-1].stop]
    return torch.cat([query[:, :, each] for each in rows], dim=2)
