"""Ulysses, and PipeSP: Ulysses whose exchanges are pipelined with attention by chunks of heads.

PipeDiT (section 3.1) hides the output exchange of a head under the attention of the next one. Here both directions are
in flight: while chunk c is computed, the chunks after it arrive and those before it leave; and the ends, which have
nothing to hide under in the paper, are hidden too:

* the first chunk's value, key and query leave one by one, each under the projection of the next one, and attention
  starts with the own queries while the others' are still on their way;
* in the last chunk the others' rows are computed first and leave under the attention of the own rows, which need not
  travel.
"""

import collections
import dataclasses
import enum
import itertools
from collections.abc import Iterator

import torch

from pipedit.parallel.calls import Call, Kernel, Result, key_mask
from pipedit.parallel.channel import Channel, Transport
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
        if chunk == 0 and self._splits_rows:
            inward.send_part(VALUE, call.value(run))
            inward.send_part(KEY, call.key(run))
            inward.send_part(QUERY, call.query(run))
        else:
            value = call.value(run)
            inward.send_all((call.query(run), call.key(run), value))
        if shape.text_tokens:
            inward.put_text(call.text(inward.own_run))
        return inward

    def _compute(self, inward: Inward, chunk: int, mask: torch.Tensor | None) -> Outward:
        """Attention of this rank's heads; posts the result as soon as the others' rows are done."""
        lines, shape = self._lines, self._shape
        slot = chunk % (self._behind + 1)
        outward = Outward(lines.outward, shape, chunk, lines.workspace, slot, self._schedule.transport, self._record)
        others, own = self._portions(chunk)
        self._wait(inward, chunk, KEY, VALUE)
        if own is not None and chunk == 0:
            self._attend_to(own, inward, outward, chunk, mask)
        self._wait(inward, chunk, QUERY)
        self._attend_to(others, inward, outward, chunk, mask)
        outward.post()
        if own is not None and chunk > 0:
            self._attend_to(own, inward, outward, chunk, mask)
        return outward

    def _portions(self, chunk: int) -> tuple["Portion", "Portion | None"]:
        """Whose query rows go through the kernel together: everybody's; in the first and in the last chunk the others'
        and then, or before, the own ones."""
        count, members = len(self._shape.chunks), range(len(self._shape.tokens))
        if not self._splits_rows or 0 < chunk < count - 1:
            return Portion(members=tuple(members), with_text=self._shape.text_tokens > 0), None
        others = tuple(member for member in members if member != self._lines.index)
        return (
            Portion(members=others, with_text=self._shape.text_tokens > 0),
            Portion(members=(self._lines.index,), with_text=False),
        )

    def _attend_to(
        self, portion: "Portion", inward: Inward, outward: Outward, chunk: int, mask: torch.Tensor | None
    ) -> None:
        shape = self._shape
        rows = [shape.rows[member] for member in portion.members]
        if portion.with_text:
            rows.append(slice(shape.latent_tokens, shape.all_rows))
        counts = [each.stop - each.start for each in rows]
        if inward.own_heads == 0 or sum(counts) == 0:
            return
        query = _pick(inward.view(QUERY), rows)
        with self._record.measure("attention", chunk):
            result = self._kernel(query, inward.view(KEY), inward.view(VALUE), mask)
        pieces = list(torch.split(result, counts, dim=2))
        if portion.with_text:
            outward.put_text(pieces.pop())
        for member, piece in zip(portion.members, pieces, strict=True):
            outward.put(piece, member)

    def _wait(self, inward: Inward, chunk: int, *parts: int) -> None:
        with self._record.measure("wait", chunk):
            for part in parts:
                inward.wait(part)

    def _result(self, chunk: int, outward: Outward) -> Result:
        with self._record.measure("wait", chunk):
            latents, text = outward.wait()
        return Result(heads=outward.run, latents=latents, text=text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Portion:
    """Query rows of some members, and of the text."""

    members: tuple[int, ...]
    with_text: bool


def _pick(query: torch.Tensor, rows: list[slice]) -> torch.Tensor:
    """These rows of [B, n, S + T, D]: a view where they are in one piece."""
    if all(before.stop == after.start for before, after in itertools.pairwise(rows)):
        return query[:, :, rows[0].start : rows[-1].stop]
    return torch.cat([query[:, :, each] for each in rows], dim=2)
