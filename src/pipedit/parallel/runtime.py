"""One rank's side of a parallel run: its process groups, its share of the tokens, and the strategy that is in use.

Models see it as "shard, attend, gather" (pipedit.models.sequence.SequenceParallel). The split can change between steps
with `use`; process groups are made once for each and kept.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence

import torch

from pipedit.core.errors import InvalidRequestError, PipeditError
from pipedit.core.messages import Aco
from pipedit.core.parallel import AUTO, ParallelConfig
from pipedit.core.shares import ranges, split_evenly
from pipedit.parallel.aco import Forward, HelpersCall, aco_problems
from pipedit.parallel.calls import Call, Kernel, Result, key_mask
from pipedit.parallel.channel import Channel, Transport
from pipedit.parallel.exchange import ExchangeShape
from pipedit.parallel.groups import OpenChannel
from pipedit.parallel.kernels import attention
from pipedit.parallel.mesh import Helpers, Mesh, open_mesh
from pipedit.parallel.pipesp import Lines, Overlap, PipeSP, Schedule
from pipedit.parallel.record import Record
from pipedit.parallel.ring import RingAttention
from pipedit.parallel.splits import chunk_heads
from pipedit.parallel.tuning import Tuner
from pipedit.parallel.workspace import Workspace

# What AUTO tries, and as many chunks as the largest share has heads.
CHUNK_CHOICES = (1, 2, 4)


class ParallelRuntime:
    """`ranks`: global ranks that share the denoising, in order; `rank` is this one, which is one of them or helps them.
    `open_channel` is not used where a rank is alone. Starts out with one rank doing everything.

    Memory: the buffers of the exchanges (see exchange.py), as large as the largest call so far needed, whatever the
    split. Process groups, kept for each split and each set of helpers: two where ranks only help, else up to five.
    """

    def __init__(
        self,
        *,
        ranks: Sequence[int],
        rank: int,
        device: str,
        open_channel: OpenChannel,
        clock: Callable[[], float] = time.perf_counter,
        overlap: Overlap = Overlap.FULL,
    ) -> None:
        """`overlap` other than FULL is for measurements."""
        self._ranks, self._rank, self._device = tuple(ranks), rank, torch.device(device)
        self._open_channel, self._overlap = open_channel, overlap
        self._workspace = Workspace(self._device)
        self._epoch = 0
        self._channels: dict[tuple[str, tuple[int, ...]], Channel] = {}
        self._meshes: dict[tuple[ParallelConfig, Helpers], Mesh] = {}
        self._mesh: Mesh | None = None
        self._aco: Aco | None = None
        self._tokens: tuple[int, ...] = ()
        self._forwards = 0  # since the split is in use
        self._under_way: Call | None = None  # the attention that the other ranks wait for
        self.tuner = Tuner(self._device, clock)
        self.record = Record()  # replaced by whoever wants to see what happens
        self._context: Kernel | None = None

    # -- the split ----------------------------------------------------------------------------------------------

    def use(self, config: ParallelConfig, *, aco: Aco | None = None, epoch: int = 0) -> None:
        """Splits the work like this from now on. All who take part, helpers included, call it with the same: the first
        time, a split's process groups are made, for which they wait for each other. In a larger `epoch` than before
        everything is made anew: something failed, and messages may be left over. Raises InvalidRequestError for what
        cannot be."""
        assert epoch >= self._epoch, (epoch, self._epoch)
        if epoch > self._epoch:
            self.reset()
            self._epoch = epoch
        self._check(config, aco)
        helpers = () if aco is None else aco.helpers
        mesh = self._meshes.get((config, helpers))
        if mesh is None:
            mesh = self._meshes[config, helpers] = self._make_mesh(config, helpers)
        self._mesh, self._aco, self._forwards = mesh, aco, 0

    def reset(self) -> None:
        """After something failed: messages may be left in the process groups, so the next `use`, in a new epoch, makes
        new ones. Ranks that wait for this one fail too (with gloo, at once). Late messages may still be written into
        the buffers, and ranks may have counted different calls, so buffers are left to whoever holds them, and what was
        learnt about chunks is forgotten."""
        for channel in self._channels.values():
            channel.abandon()
        self._forget_channels()
        self._workspace.clear()
        self.tuner.forget()

    def close(self) -> None:
        """Ends the process groups that `use` made. Every rank calls it; afterwards each works alone."""
        for channel in self._channels.values():
            channel.close()
        self._forget_channels()

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

    def _check(self, config: ParallelConfig, aco: Aco | None) -> None:
        problems = []
        if config.world_size not in (1, len(self._ranks)):
            problems = [f"{config.describe()} is for {config.world_size} workers, but there are {len(self._ranks)}"]
        elif aco is not None:
            problems = aco_problems(config, aco, self._ranks)
        if self._context is not None:
            problems += _context_problems(config, aco)
        if problems:
            raise InvalidRequestError(problems)

    def _make_mesh(self, config: ParallelConfig, helpers: Helpers) -> Mesh:
        # With a degree of one everywhere, each rank does the whole work for itself.
        ranks = self._ranks if config.world_size > 1 or helpers else (self._rank,)
        return open_mesh(
            config,
            helpers,
            ranks=ranks,
            rank=self._rank,
            workspace=self._workspace,
            open_channel=self._channel,
        )

    def _channel(self, purpose: str, members: Sequence[int]) -> Channel:
        key = (purpose, tuple(members))
        if key not in self._channels:
            self._channels[key] = self._open_channel(f"denoise/{self._epoch}/{purpose}", members)
        return self._channels[key]

    def _forget_channels(self) -> None:
        self._channels, self._meshes, self._mesh, self._aco = {}, {}, None, None
        self._under_way = None  # if there was one, it has no channels any more

    def take_keys_from(self, context: Kernel) -> None:
        """Every later attention is one call of this kernel a head chunk, which may bring keys of its own (see
        context_attention.py): so the number of chunks is never tried out. Ring attention and helpers cannot do that:
        this and `use` raise InvalidRequestError for them."""
        if problems := _context_problems(self.config, self._aco):
            raise InvalidRequestError(problems)
        self._context = context

    # -- what a model asks for ----------------------------------------------------------------------------------

    def branches(self, predictions: Sequence[Callable[[], torch.Tensor]]) -> list[torch.Tensor]:
        """All predictions (conditional, unconditional), on every rank. With a CFG degree of 2, each half of the ranks
        computes one of them and gets the other from its counterpart: the same numbers as one after the other."""
        mesh = self._mesh
        if mesh is None or mesh.config.cfg_degree == 1 or len(predictions) == 1:
            return [predict() for predict in predictions]
        assert len(predictions) == mesh.config.cfg_degree, "one prediction a branch"
        own = predictions[mesh.branch]().contiguous()
        all_ = [own if branch == mesh.branch else torch.empty_like(own) for branch in range(len(predictions))]
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
        self._forwards += 1

    def shard(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's rows, a view."""
        mesh = self._mesh
        if mesh is None:
            return tensor
        assert mesh.place is not None, "helpers have no tokens"
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
        """One attention over all tokens, by Ulysses or PipeSP inside and ring attention around it. Raises PipeditError
        while another one is under way: both would use the same buffers, and the ranks' messages would be mixed up."""
        mesh = self._mesh
        if mesh is None or mesh.is_alone:
            yield _alone(call, self._context or attention)
            return
        self._check_call(mesh, call)
        if self._under_way is not None:
            raise PipeditError(
                "another attention over these ranks is still under way: take all of its results first, and run a model "
                "that is spread over ranks in one thread only"
            )
        self._under_way = call
        try:
            yield from self._attend_together(mesh, call)
        finally:
            if self._under_way is call:  # else `reset` or `close` came in between
                self._under_way = None

    @torch.inference_mode()
    def help(self, forwards: Sequence[Forward]) -> None:
        """A helper's part of one step: takes its share of the heads, as `use` said, at every attention of the forward
        passes. With a CFG degree of 2, of the one pass that its group runs."""
        mesh = self._mesh
        assert mesh is not None and mesh.place is None, "this rank does not help; see `use`"
        if mesh.config.cfg_degree > 1:
            assert len(forwards) == mesh.config.cfg_degree, forwards
            forwards = [forwards[mesh.branch]]
        for forward in forwards:
            self.begin_forward(forward.latent_tokens)
            call = HelpersCall(forward, self._device)
            for _ in range(forward.sites):
                for _ in self.attend(call):
                    pass

    # -- inside -------------------------------------------------------------------------------------------------

    def _check_call(self, mesh: Mesh, call: Call) -> None:
        """What helpers rely on, who never see the call."""
        if self._aco is None:
            return
        if call.text_mask is not None:
            raise InvalidRequestError(
                ["attention co-processing cannot mask text: make videos of prompts of unequal length one by one"]
            )
        passes = self._aco.text_tokens
        number = mesh.branch if mesh.config.cfg_degree > 1 else (self._forwards - 1) % len(passes)
        assert call.text_tokens == passes[number], (call.text_tokens, passes, number)
        assert call.heads == sum(self._aco.heads), (call.heads, self._aco)

    def _attend_together(self, mesh: Mesh, call: Call) -> Iterator[Result]:
        shares = self._shares(mesh, call.heads)
        # All tokens: rings need the same chunks everywhere, and their own shares may change at different times.
        key = (mesh.config, mesh.members, shares, self._tokens, call.batch, call.head_dim, call.text_tokens > 0)
        schedules = self._schedules(mesh.config, shares)
        chosen = self.tuner.choose(key, len(schedules)) if len(schedules) > 1 else 0
        watch = self.tuner.start() if len(schedules) > 1 else None
        yield from self._strategy(mesh, shares, call, schedules[chosen]).attend(call)
        if watch is not None and self.tuner.finish(key, watch, functools.partial(self._agree, mesh)):
            self._workspace.clear()  # of what only the losers needed

    def _shares(self, mesh: Mesh, heads: int) -> tuple[int, ...]:
        """Heads of each member of the group of Ulysses."""
        return split_evenly(heads, mesh.config.ulysses_degree) if self._aco is None else self._aco.heads

    def _schedules(self, config: ParallelConfig, shares: tuple[int, ...]) -> list[Schedule]:
        """The candidates, plain Ulysses first; one where the number of chunks was given."""
        most = max(shares)
        if config.pipesp_chunks != AUTO:
            return [Schedule(chunks=min(int(config.pipesp_chunks), most), overlap=self._overlap)]
        if len(shares) == 1 or self._context is not None:
            return [Schedule(chunks=1)]
        counts = sorted({min(count, most) for count in (*CHUNK_CHOICES, most)})
        transports = tuple(Transport) if self._device.type == "cuda" else (Transport.POINT_TO_POINT,)
        return [
            Schedule(chunks=count, overlap=self._overlap, transport=transport)
            for count in counts
            for transport in transports
        ]

    def _strategy(self, mesh: Mesh, shares: tuple[int, ...], call: Call, schedule: Schedule) -> PipeSP:
        tokens = self._tokens[mesh.first : mesh.first + mesh.config.ulysses_degree]
        shape = ExchangeShape(
            tokens=(*tokens, *[0] * mesh.helpers),
            chunks=chunk_heads(shares, schedule.chunks),
            batch=call.batch,
            head_dim=call.head_dim,
            text_tokens=call.text_tokens,
            dtype=call.dtype,
            helpers=mesh.helpers,
        )
        return PipeSP(
            mesh.lines,
            shape,
            schedule,
            self._kernel(mesh, call.text_tokens),
            splits_rows=mesh.ring.size == 1 and self._context is None,
            record=self.record,
        )

    def _kernel(self, mesh: Mesh, text_tokens: int) -> Kernel:
        if mesh.ring.size == 1:
            return self._context or attention
        degree = mesh.config.ulysses_degree
        ring = RingAttention(
            mesh.ring,
            [sum(self._tokens[first : first + degree]) for first in range(0, len(self._tokens), degree)],
            self._workspace,
        )
        return lambda query, key, value, mask: ring(query, key, value, text_tokens=text_tokens, mask=mask)

    def _agree(self, mesh: Mesh, seconds: Sequence[float]) -> list[float]:
        """The slowest rank's times. A helper's would count what denoisers do between attentions; what it takes itself
        is in theirs, since they wait for its results."""
        if mesh.place is None:
            seconds = [0.0] * len(seconds)
        values = torch.tensor(seconds, dtype=torch.float64, device=self._device)
        return [float(value) for value in mesh.everybody.max(values)]


def _context_problems(config: ParallelConfig, aco: Aco | None) -> list[str]:
    """Why nobody could take keys of other blocks, a sentence each."""
    problems = []
    if config.ring_degree > 1:
        problems.append("ring attention cannot take keys of other blocks; use Ulysses")
    if aco is not None:
        problems.append("helpers have no keys of other blocks; leave attention co-processing off")
    return problems


def _alone(call: Call, kernel: Kernel) -> Result:
    """Attention where one rank has all tokens: nothing is exchanged."""
    everything = slice(0, call.heads)
    parts = [call.query(everything), call.key(everything), call.value(everything)]
    tokens = call.local_tokens
    if call.text_tokens:
        parts = [torch.cat([own, text], dim=1) for own, text in zip(parts, call.text(everything), strict=True)]
    query, key, value = (part.transpose(1, 2) for part in parts)
    result = kernel(query, key, value, key_mask(call, tokens)).transpose(1, 2)
    text = result[:, tokens:] if call.text_tokens else None
    return Result(heads=everything, latents=result[:, :tokens], text=text)
