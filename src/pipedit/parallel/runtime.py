"""One rank's side of a parallel run: its process groups, its share of the tokens, and the strategy that is in use.

Models see it as "shard, attend, gather" (pipedit.models.sequence.SequenceParallel). The split can change between steps
with `use`; process groups are made once for each and kept.
"""

import dataclasses
import datetime
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import AUTO, MeshPosition, ParallelConfig, mesh_groups, mesh_position
from pipedit.parallel.calls import Call, Kernel, Result, key_mask
from pipedit.parallel.channel import Channel, Transport
from pipedit.parallel.exchange import ExchangeShape
from pipedit.parallel.kernels import attention
from pipedit.parallel.pipesp import Lines, Overlap, PipeSP, Schedule
from pipedit.parallel.record import Record
from pipedit.parallel.ring import RingAttention
from pipedit.parallel.splits import chunk_heads, ranges, split_evenly
from pipedit.parallel.tuning import Tuner
from pipedit.parallel.workspace import Workspace

# A dead neighbour is noticed at once by its closed connection, or by whoever started the ranks; this is for one that
# hangs.
TIMEOUT = datetime.timedelta(minutes=10)
# What AUTO tries, and as many chunks as the largest share has heads.
CHUNK_CHOICES = (1, 2, 4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Mesh:
    """The channels of one split, as this rank sees them."""

    config: ParallelConfig
    position: MeshPosition
    lines: Lines
    ring: Channel
    rows: Channel  # of everybody who shares the tokens
    branches: Channel

    @property
    def place(self) -> int:
        """This rank's place in the order of the tokens."""
        return self.position.ring * self.config.ulysses_degree + self.position.ulysses


class ParallelRuntime:
    """`ranks`: global ranks that share the denoising, in order; `rank` is this one. torch.distributed is initialised
    unless there is one rank only. Starts out with one rank doing everything."""

    def __init__(
        self,
        *,
        ranks: Sequence[int],
        rank: int,
        device: str,
        timeout: datetime.timedelta = TIMEOUT,
        clock: Callable[[], float] = time.perf_counter,
        overlap: Overlap = Overlap.FULL,
    ) -> None:
        """`overlap` other than FULL is for measurements."""
        self._ranks, self._rank, self._device, self._timeout = tuple(ranks), rank, torch.device(device), timeout
        self._overlap = overlap
        self._workspace = Workspace(self._device)
        self._channels: dict[tuple[str, tuple[tuple[int, ...], ...]], Channel] = {}
        self._meshes: dict[ParallelConfig, _Mesh] = {}
        self._mesh: _Mesh | None = None
        self._tokens: tuple[int, ...] = ()
        self.tuner = Tuner(self._device, clock)
        self.record = Record()  # replaced by whoever wants to see what happens

    # -- the split ----------------------------------------------------------------------------------------------

    def use(self, config: ParallelConfig) -> None:
        """Splits the work like this from now on. Every rank of torch.distributed calls it with the same: the first
        time, a split's process groups are made, for which all wait."""
        if config.world_size not in (1, len(self._ranks)):
            raise InvalidRequestError(
                [f"{config.describe()} is for {config.world_size} workers, but there are {len(self._ranks)}"]
            )
        mesh = self._meshes.get(config)
        if mesh is None:
            # Those who are not among `ranks` would not come to make the process groups with us.
            assert config.world_size == 1 or dist.get_world_size() == len(self._ranks), self._ranks
            mesh = self._meshes[config] = self._make_mesh(config)
        self._mesh = mesh

    def reset(self) -> None:
        """After something failed: messages may be left in the process groups, so the next `use` makes new ones. Every
        rank calls it. Late messages may still be written into the buffers, and ranks may have counted different calls,
        so buffers are left to whoever holds them, and what was learnt about chunks is forgotten."""
        self.close()
        self._workspace.clear()
        self.tuner.forget()

    @property
    def config(self) -> ParallelConfig:
        """The split in use; all ones before the first `use`."""
        return self._mesh.config if self._mesh is not None else ParallelConfig()

    @property
    def lines(self) -> Lines:
        """The channels and buffers of Ulysses in the split in use, for those who measure on the very same."""
        assert self._mesh is not None, "use a split first"
        return self._mesh.lines

    @property
    def workspace_bytes(self) -> int:
        """What the exchanges' buffers hold; it does not grow once the largest shape was seen and measured."""
        return self._workspace.allocated_bytes

    def _make_mesh(self, config: ParallelConfig) -> _Mesh:
        # With a degree of one everywhere, each rank does the whole work for itself.
        alone = config.world_size == 1
        ranks = (self._rank,) if alone else self._ranks
        position = mesh_position(config, ranks.index(self._rank))

        groups = mesh_groups(config)

        def channel(purpose: str, parts: Sequence[Sequence[int]]) -> Channel:
            return self._channel(purpose, tuple(tuple(ranks[index] for index in part) for part in parts))

        return _Mesh(
            config=config,
            position=position,
            lines=Lines(
                inward=channel("inward", groups.ulysses),
                outward=channel("outward", groups.ulysses),
                workspace=self._workspace,
            ),
            ring=channel("ring", groups.ring),
            rows=channel("rows", groups.sequence),
            branches=channel("branches", groups.cfg),
        )

    def _channel(self, purpose: str, groups: tuple[tuple[int, ...], ...]) -> Channel:
        key = (purpose, groups)
        if key not in self._channels:
            self._channels[key] = Channel.open(groups, self._rank, device=self._device, timeout=self._timeout)
        return self._channels[key]

    def close(self) -> None:
        """Ends the process groups that `use` made. Every rank calls it; afterwards each works alone."""
        for channel in self._channels.values():
            channel.close()
        self._channels, self._meshes, self._mesh = {}, {}, None

    # -- what a model asks for ----------------------------------------------------------------------------------

    def branches(self, predictions: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """All predictions (conditional, unconditional), on every rank. With a CFG degree of 2, each half of the ranks
        computes one of them and gets the other from its counterpart: the same numbers as one after the other."""
        mesh = self._mesh
        if mesh is None or mesh.config.cfg_degree == 1 or len(predictions) == 1:
            return [predict() for predict in predictions]
        assert len(predictions) == mesh.config.cfg_degree, "one prediction a branch"
        own = predictions[mesh.position.cfg]().contiguous()
        all_ = [own if branch == mesh.position.cfg else torch.empty_like(own) for branch in range(len(predictions))]
        mesh.branches.swap([own] * len(predictions), all_).wait()
        return all_

    def begin_forward(self, tokens: int) -> None:
        """Deals `tokens` latent tokens out. Raises InvalidRequestError if there are fewer than ranks."""
        degree = self.config.sequence_degree
        if tokens < degree:
            raise InvalidRequestError(
                [f"{tokens} latent tokens cannot be shared by {degree} workers; take fewer workers or a larger video"]
            )
        self._tokens = split_evenly(tokens, degree)

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's rows, a view."""
        mesh = self._mesh
        if mesh is None:
            return tensor
        assert tensor.shape[dim] == sum(self._tokens), f"{tuple(tensor.shape)} has not all {sum(self._tokens)} tokens"
        mine = ranges(self._tokens)[mesh.place]
        return tensor.narrow(dim, mine.start, mine.stop - mine.start)

    def gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """All rows, from each rank's own. Memory: the result, and a copy of the own rows where dim > 0 and B > 1."""
        mesh = self._mesh
        if mesh is None or mesh.rows.size == 1:
            return tensor
        own = tensor.movedim(dim, 0).contiguous()
        whole = own.new_empty(sum(self._tokens), *own.shape[1:])
        incoming = [whole[rows] for rows in ranges(self._tokens)]
        mesh.rows.swap([own] * mesh.rows.size, incoming).wait()
        return whole.movedim(0, dim)

    def attend(self, call: Call) -> Iterator[Result]:
        """One attention over all tokens, by Ulysses or PipeSP inside and ring attention around it."""
        mesh = self._mesh
        if mesh is None or mesh.rows.size == 1:
            yield _alone(call)
            return
        tokens = self._group_tokens(mesh)
        # All tokens: rings need the same chunks everywhere, and their own shares may change at different times.
        key = (mesh.config, self._tokens, call.batch, call.heads, call.head_dim, call.text_tokens > 0)
        schedules = self._schedules(mesh.config, call.heads)
        chosen = self.tuner.choose(key, len(schedules)) if len(schedules) > 1 else 0
        watch = self.tuner.start() if len(schedules) > 1 else None
        yield from self._strategy(mesh, tokens, call, schedules[chosen]).attend(call)
        if watch is not None and self.tuner.finish(key, watch, functools.partial(self._agree, mesh)):
            self._workspace.clear()  # of what only the losers needed

    # -- inside -------------------------------------------------------------------------------------------------

    def _group_tokens(self, mesh: _Mesh) -> tuple[int, ...]:
        first = mesh.position.ring * mesh.config.ulysses_degree
        return self._tokens[first : first + mesh.config.ulysses_degree]

    def _schedules(self, config: ParallelConfig, heads: int) -> list[Schedule]:
        """The candidates, plain Ulysses first; one where the number of chunks was given."""
        most = max(split_evenly(heads, config.ulysses_degree))
        if config.pipesp_chunks != AUTO:
            return [Schedule(chunks=min(int(config.pipesp_chunks), most), overlap=self._overlap)]
        if config.ulysses_degree == 1:
            return [Schedule(chunks=1)]
        counts = sorted({min(count, most) for count in (*CHUNK_CHOICES, most)})
        transports = tuple(Transport) if self._device.type == "cuda" else (Transport.POINT_TO_POINT,)
        return [
            Schedule(chunks=count, overlap=self._overlap, transport=transport)
            for count in counts
            for transport in transports
        ]

    def _strategy(self, mesh: _Mesh, tokens: tuple[int, ...], call: Call, schedule: Schedule) -> PipeSP:
        heads = split_evenly(call.heads, mesh.config.ulysses_degree)
        shape = ExchangeShape(
            tokens=tokens,
            chunks=chunk_heads(heads, schedule.chunks),
            batch=call.batch,
            head_dim=call.head_dim,
            text_tokens=call.text_tokens,
            dtype=call.dtype,
        )
        return PipeSP(
            mesh.lines,
            shape,
            schedule,
            self._kernel(mesh, call.text_tokens),
            splits_rows=mesh.ring.size == 1,
            record=self.record,
        )

    def _kernel(self, mesh: _Mesh, text_tokens: int) -> Kernel:
        if mesh.ring.size == 1:
            return attention
        degree = mesh.config.ulysses_degree
        ring = RingAttention(
            mesh.ring,
            [sum(self._tokens[first : first + degree]) for first in range(0, len(self._tokens), degree)],
            self._workspace,
        )
        return lambda query, key, value, mask: ring(query, key, value, text_tokens=text_tokens, mask=mask)

    def _agree(self, mesh: _Mesh, seconds: Sequence[float]) -> list[float]:
        """The slowest rank's times."""
        values = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        return [float(value) for value in mesh.rows.max(values)]


def _alone(call: Call) -> Result:
    """Attention where one rank has all tokens: nothing is exchanged."""
    everything = slice(0, call.heads)
    parts = [call.query(everything), call.key(everything), call.value(everything)]
    tokens = call.local_tokens
    if call.text_tokens:
        parts = [torch.cat([own, text], dim=1) for own, text in zip(parts, call.text(everything), strict=True)]
    query, key, value = (part.transpose(1, 2) for part in parts)
    result = attention(query, key, value, key_mask(call, tokens)).transpose(1, 2)
    text = result[:, tokens:] if call.text_tokens else None
    return Result(heads=everything, latents=result[:, :tokens], text=text)
