"""The exchange: reshards between [my tokens, all heads] and [all tokens, my heads], one chunk of heads at a time.

Every exact strategy is this operation with its own splits (PipeDiT, section 3.1, calls the equal case Ulysses). Rank r
of the group owns tokens[r] latent tokens, maybe none, and takes part in each chunk with heads[r], maybe none. Text
tokens are a segment that every rank has: they never travel in, and only their rows of the result travel out.

Helpers (PipeDiT, section 3.3: attention co-processing), the last ranks of the group, only take heads: they own nothing
and have no text. It comes to them behind the tokens of the last owner, so that both are one message, and they get no
results back.

Shape legend: B batch, S latent tokens of the group, s[r] those of rank r, T text tokens, N heads of a chunk, n[r] those
of rank r, D head width. Buffers have rows (tokens) outermost, so that what comes from one rank is contiguous for every
B and is received in place.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch

from pipedit.core.shares import ranges
from pipedit.parallel.channel import Channel, Pending, Transport
from pipedit.parallel.record import Record
from pipedit.parallel.workspace import Workspace

QUERY, KEY, VALUE = range(3)
Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query, key, value


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExchangeShape:
    """What one attention exchanges. `chunks`: [chunk][rank] -> heads, see splits.chunk_heads. The last `helpers` ranks
    help the others."""

    tokens: tuple[int, ...]
    chunks: tuple[tuple[int, ...], ...]
    batch: int
    head_dim: int
    text_tokens: int
    dtype: torch.dtype
    helpers: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.helpers < len(self.tokens) and not any(self.tokens[self.owners :]), self

    @functools.cached_property
    def rows(self) -> tuple[slice, ...]:
        """Rows of each rank's tokens."""
        return ranges(self.tokens)

    @functools.cached_property
    def runs(self) -> tuple[slice, ...]:
        """The run of the model's heads that each chunk covers."""
        return ranges([sum(heads) for heads in self.chunks])

    @property
    def latent_tokens(self) -> int:
        return sum(self.tokens)

    @property
    def owners(self) -> int:
        """How many ranks, the first ones, have the text and may have tokens."""
        return len(self.tokens) - self.helpers

    def text_of(self, member: int) -> int:
        """Text tokens that the member has, and whose results it gets."""
        return self.text_tokens if member < self.owners else 0

    def sent_rows(self, sender: int, receiver: int) -> slice:
        """What goes in from one rank to another: the sender's tokens, and the text from the last owner to helpers."""
        rows = self.rows[sender]
        with_text = sender == self.owners - 1 and receiver >= self.owners
        return slice(rows.start, self.all_rows) if with_text else rows

    @property
    def all_rows(self) -> int:
        return self.latent_tokens + self.text_tokens

    def row_elements(self, heads: int) -> int:
        return self.batch * heads * self.head_dim

    def incoming_bytes(self, chunk: int, member: int) -> int:
        """Query, key and value that `member` receives from the others for a chunk."""
        rows = self.all_rows - self.tokens[member] - self.text_of(member)
        return 3 * rows * self.row_elements(self.chunks[chunk][member]) * self.dtype.itemsize

    def outgoing_bytes(self, chunk: int, member: int) -> int:
        """Results that `member` sends to the others for a chunk, text rows to each of them that has the text."""
        rows = sum(self.tokens[other] + self.text_of(other) for other in range(len(self.tokens)) if other != member)
        return rows * self.row_elements(self.chunks[chunk][member]) * self.dtype.itemsize


class Inward:
    """One chunk's query, key and value on their way to the ranks that take its heads.

    Memory: (S + T) * B * 3 * n * D elements to receive into and s * B * 3 * (N - n) * D to send from, on the last owner
    also T * B * 3 * n[h] * D for each helper h; one such set a `slot`. `send_all` packs the three into one message to
    each rank; `send_part` sends them one by one, for the first chunk, whose transfer hides only under its own
    projections. Both take the text q, k, v that `sent_text` asks for.
    """

    def __init__(
        self,
        channel: Channel,
        shape: ExchangeShape,
        chunk: int,
        workspace: Workspace,
        slot: int,
        transport: Transport = Transport.POINT_TO_POINT,
        record: Record | None = None,
    ) -> None:
        self._channel, self._shape, self._chunk = channel, shape, chunk
        self._transport, self._record = transport, record or Record()
        self.heads = shape.chunks[chunk]
        self.run = shape.runs[chunk]
        self._of = ranges(self.heads)
        self._mine = self.heads[channel.index]
        own = self._of[channel.index]
        self.own_run = slice(self.run.start + own.start, self.run.start + own.stop)  # among the model's heads
        elements = shape.all_rows * 3 * shape.row_elements(self._mine)
        self._storage = workspace.take(("in", slot), (elements,), shape.dtype)
        send_elements = sum(self._sent_elements(3, member) for member in range(channel.size) if member != channel.index)
        self._staging = workspace.take(("in staging", slot), (send_elements,), shape.dtype)
        self._staged = 0
        self._pending: dict[int, Pending] = {}
        self._views: list[torch.Tensor] = []  # query, key, value as [S + T, B, n, D]

    @property
    def own_heads(self) -> int:
        return self._mine

    @property
    def sent_text(self) -> slice | None:
        """The heads, among the model's, whose text q, k, v this rank sends along; None: it sends no text."""
        shape, me = self._shape, self._channel.index
        first = self._of[shape.owners - 1].stop
        if me != shape.owners - 1 or not shape.text_tokens or first == self._of[-1].stop:
            return None
        return slice(self.run.start + first, self.run.stop)

    def send_all(self, parts: Parts, text: Parts | None = None) -> None:
        """The local tokens' q, k, v [B, s, N, D], in one message to each rank."""
        shape = self._shape
        received = self._storage.view(shape.all_rows, shape.batch, 3, self._mine, shape.head_dim)
        self._views = [received[:, :, part] for part in range(3)]
        self._pending[QUERY] = self._pending[KEY] = self._pending[VALUE] = self._swap(parts, text, received)

    def send_part(self, part: int, tensor: torch.Tensor, text: Parts | None = None) -> None:
        """One of the three, [B, s, N, D]. All ranks send them in the same order."""
        shape = self._shape
        received = self._storage.view(3, shape.all_rows, shape.batch, 1, self._mine, shape.head_dim)
        self._views = [received[each, :, :, 0] for each in range(3)]
        self._pending[part] = self._swap((tensor,), None if text is None else (text[part],), received[part])

    def put_text(self, parts: Parts) -> None:
        """The text's q, k, v for this rank's heads, [B, T, n, D]. After the sends."""
        for view, tensor in zip(self._views, parts, strict=True):
            view[self._shape.latent_tokens :].copy_(tensor.transpose(0, 1))

    def wait(self, part: int) -> None:
        """Until the part is there from all ranks; the own rows are from the start."""
        self._pending[part].wait_received()

    def view(self, part: int) -> torch.Tensor:
        """The part for this rank's heads, [B, n, S + T, D], in place."""
        return self._views[part].permute(1, 2, 0, 3)

    def finish(self) -> None:
        """Waits until the slot may be used again."""
        for pending in self._pending.values():
            pending.wait()

    def _swap(
        self, parts: tuple[torch.Tensor, ...], text: tuple[torch.Tensor, ...] | None, received: torch.Tensor
    ) -> Pending:
        shape, me = self._shape, self._channel.index
        outgoing: list[torch.Tensor | None] = []
        incoming: list[torch.Tensor | None] = []
        for member, heads in enumerate(self._of):
            if member == me:
                target = received[shape.rows[me]]
                outgoing.append(None)
                incoming.append(None)
            else:
                target = self._take_staging(len(parts), member)
                outgoing.append(target)
                incoming.append(received[shape.sent_rows(member, me)])
            own = shape.tokens[me]
            for number, part in enumerate(parts):
                target[:own, :, number].copy_(part[:, :, heads].transpose(0, 1))
            if len(target) > own and text is not None:
                first = self._of[shape.owners].start
                for number, part in enumerate(text):
                    some = part[:, :, heads.start - first : heads.stop - first]
                    target[own:, :, number].copy_(some.transpose(0, 1))
        pending = self._channel.swap(outgoing, incoming, self._transport)
        payload = shape.incoming_bytes(self._chunk, me) * len(parts) // 3
        return self._record.watch(pending, "input exchange", self._chunk, payload)

    def _sent_elements(self, parts: int, member: int) -> int:
        rows = self._shape.sent_rows(self._channel.index, member)
        return int(rows.stop - rows.start) * parts * self._shape.row_elements(self.heads[member])

    def _take_staging(self, parts: int, member: int) -> torch.Tensor:
        shape = self._shape
        start, self._staged = self._staged, self._staged + self._sent_elements(parts, member)
        staging = self._staging[start : self._staged]
        rows = shape.sent_rows(self._channel.index, member)
        return staging.view(rows.stop - rows.start, shape.batch, parts, self.heads[member], shape.head_dim)


class Outward:
    """One chunk's result on its way back to the ranks that own the tokens.

    Memory: (S + (R - 1) * T) * B * n * D elements to send from and (s + T) * B * N * D to receive into for R owners
    (a helper: S + R * T rows, and nothing); one such pair a `slot`.
    """

    def __init__(
        self,
        channel: Channel,
        shape: ExchangeShape,
        chunk: int,
        workspace: Workspace,
        slot: int,
        transport: Transport = Transport.POINT_TO_POINT,
        record: Record | None = None,
    ) -> None:
        self._channel, self._shape, self._workspace = channel, shape, workspace
        self._transport, self._slot, self._chunk = transport, slot, chunk
        self._record = record or Record()
        self.heads, self.run = shape.chunks[chunk], shape.runs[chunk]
        self._mine = self.heads[channel.index]
        rows = [tokens + shape.text_of(member) for member, tokens in enumerate(shape.tokens)]
        self._outgoing = self._split("out", rows, [self._mine] * channel.size)
        self._incoming = self._split("back", [rows[channel.index]] * channel.size, self.heads)
        self._pending = Pending()

    def put(self, result: torch.Tensor, member: int) -> None:
        """Result rows of `member`'s tokens, [B, n, s[member], D]: for the others before `post`, the own at any time."""
        target = self._target(member)
        target[: self._shape.tokens[member]].copy_(result.permute(2, 0, 1, 3))

    def put_text(self, result: torch.Tensor) -> None:
        """Result rows of the text, [B, n, T, D], which go to every owner. Before `post`."""
        for member in range(self._shape.owners):
            self._target(member)[self._shape.tokens[member] :].copy_(result.permute(2, 0, 1, 3))

    def post(self) -> None:
        """Starts the transfer of all but the own rows."""
        me = self._channel.index
        outgoing = [None if member == me else x for member, x in enumerate(self._outgoing)]
        incoming = [None if member == me else x for member, x in enumerate(self._incoming)]
        pending = self._channel.swap(outgoing, incoming, self._transport)
        payload = self._shape.outgoing_bytes(self._chunk, me)
        self._pending = self._record.watch(pending, "output exchange", self._chunk, payload)

    def wait(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """This rank's tokens with all heads of the chunk, [B, s, N, D], and the text's rows [B, T, N, D] (None without
        text). Valid until the next chunk's `wait`."""
        self._pending.wait()
        shape, me = self._shape, self._channel.index
        rows = shape.tokens[me] + shape.text_of(me)
        whole = self._workspace.take("merged", (rows, shape.batch, sum(self.heads), shape.head_dim), shape.dtype)
        torch.cat(self._incoming, dim=2, out=whole)
        merged = whole.transpose(0, 1)
        text = merged[:, shape.tokens[me] :] if shape.text_of(me) else None
        return merged[:, : shape.tokens[me]], text

    def _target(self, member: int) -> torch.Tensor:
        """Own rows go straight to where the others' are received."""
        return self._incoming[member] if member == self._channel.index else self._outgoing[member]

    def _split(self, name: str, rows: Sequence[int], heads: Sequence[int]) -> list[torch.Tensor]:
        """Contiguous [rows, B, n, D] tensors, one a rank, in one buffer."""
        shape = self._shape
        sizes = [r * shape.row_elements(n) for r, n in zip(rows, heads, strict=True)]
        buffer = self._workspace.take((name, self._slot), (sum(sizes),), shape.dtype)
        pieces = torch.split(buffer, sizes)
        return [piece.view(r, shape.batch, n, shape.head_dim) for piece, r, n in zip(pieces, rows, heads, strict=True)]
