"""How long work takes on a cluster, from what it costs in operations and bytes. Physics with a handful of constants.

Knows no scheduler: it answers for one command at a time (encode, a step, a chunk, a hand-over), so that planner and
simulator can put the answers together.
"""

import dataclasses
import enum
import math

from pipedit.core.errors import InvalidRequestError
from pipedit.core.messages import Aco
from pipedit.core.parallel import AUTO, ParallelConfig
from pipedit.core.shares import split_evenly
from pipedit.plan.costs import Operations, RequestCost, SharedAttention
from pipedit.plan.hardware import Cluster, Device


class Overlap(enum.Enum):
    """What Ulysses hides of its exchanges when it runs in chunks of heads. FULL is ours: both directions under the
    attention of other chunks, the ends under projections. The other two are PipeDiT's: outputs under the attention of
    the next head; and for models whose attention it opened up, inputs under the projections."""

    OUTPUTS = "outputs"
    OUTPUTS_AND_PROJECTIONS = "outputs and projections"
    FULL = "full"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Implementation:
    """What software adds to physics, the same on every device.

    `passes`: how often element-wise work reads or writes a layer's hidden state. `request_s`: fixed cost of a prompt.
    `hidden_cost`: share of the exchange time hidden under computing that comes back because both want the device.
    `chunk_s`, `helper_s`: of one chunk of heads, and of waiting for helpers, at one attention. `ring_loss`: how much
    longer attention takes for every further rank of a ring: smaller kernels, and partial results to be merged.
    `pads_heads`: shares of heads are made equal by heads of zeros; else they may differ by one.
    """

    overlap: Overlap
    passes: float
    request_s: float
    hidden_cost: float
    chunk_s: float
    helper_s: float
    ring_loss: float
    pads_heads: bool = False


OURS = Implementation(
    overlap=Overlap.FULL,
    passes=100,  # diffusers' eager modules, much like what was fitted to the paper's
    request_s=0.05,
    hidden_cost=0.05,
    chunk_s=1e-4,
    helper_s=3e-4,
    ring_loss=0.05,  # rings of 2 to 4 in TensorRT-LLM's VisualGen (see plan.degrees)
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """One denoising step. `exchange_s`: on the link, of which `exposed_s` is not hidden under computing; the total is
    the sum of the others. `exchanged_bytes`: sent or received by the busiest rank."""

    linear_s: float
    attention_s: float
    exchange_s: float
    exposed_s: float
    overhead_s: float
    exchanged_bytes: int

    @property
    def total_s(self) -> float:
        return self.linear_s + self.attention_s + self.exposed_s + self.overhead_s


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Exchange:
    """One attention of one call: seconds of each part, and bytes."""

    attention_s: float
    inward_s: float
    outward_s: float
    ring_s: float
    projection_s: float
    num_bytes: float


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Seconds of each kind of command on `cluster`."""

    cluster: Cluster
    implementation: Implementation = OURS

    @property
    def device(self) -> Device:
        return self.cluster.device

    # -- before and after denoising ------------------------------------------------------------------------------

    def operations_s(self, operations: Operations) -> float:
        """On one device, one after the other."""
        return (
            operations.linear / self.device.linear_per_s
            + operations.attention / self.device.attention_per_s
            + operations.convolution / self.device.convolution_per_s
        )

    def encode_s(self, cost: RequestCost) -> float:
        """A prompt on one device: it reads every weight at least once."""
        weights = sum(part.weights for name, part in cost.parts.items() if name.startswith("text_encoder"))
        return max(self.operations_s(cost.encode), weights / self.device.memory_bytes_per_s)

    def chunk_s(self, cost: RequestCost, chunk: int, decoders: int = 1) -> float:
        """Chunk number `chunk`; of several decoders either each takes a chunk of its own in that time, or they share it
        (`RequestCost.decodes_in_rounds`)."""
        shares = 1 if cost.decodes_in_rounds else decoders
        return self.operations_s(_chunk_operations(cost, chunk)) / shares

    def decode_s(self, cost: RequestCost, decoders: int = 1) -> float:
        """All chunks of a request."""
        if decoders == 1 or not cost.decodes_in_rounds:
            return self.operations_s(cost.decode) / decoders
        rounds = range(0, cost.num_chunks, decoders)
        return sum(
            max(self.chunk_s(cost, chunk) for chunk in (first, min(first + 1, cost.num_chunks - 1))) for first in rounds
        )

    def hand_over_s(self, num_bytes: int) -> float:
        """From rank to rank through host memory: down, over the link, and up."""
        copies = 2 * self.cluster.host_copy_s(num_bytes, 1)
        return copies + self.cluster.link.latency_s + num_bytes / self.cluster.link.ring_bytes_per_s

    def offload_s(self, num_bytes: int, num_ranks: int) -> float:
        """Each of `num_ranks` devices of a machine brings weights of so many bytes in from host memory."""
        return self.cluster.host_copy_s(num_bytes, num_ranks)

    # -- a denoising step ----------------------------------------------------------------------------------------

    def step(self, cost: RequestCost, parallel: ParallelConfig, aco: Aco | None = None) -> StepTime:
        """One step of the ranks of `parallel`, with decoders that help as `aco` says. AUTO chunks: the best count.

        Raises InvalidRequestError where the cost does not say what ranks can share.
        """
        attention = cost.attention
        if attention is None:
            raise InvalidRequestError(
                ["this model does not declare what it costs on several ranks; nothing to predict"]
            )
        heads, given = self._heads(attention, parallel, aco), parallel.pipesp_chunks
        counts = range(1, max(heads) + 1) if given == AUTO else (int(given),)
        tried = (self._step(cost, attention, parallel, heads, chunks, helped=aco is not None) for chunks in counts)
        return min(tried, key=lambda time: time.total_s)

    def _heads(self, attention: SharedAttention, parallel: ParallelConfig, aco: Aco | None) -> tuple[int, ...]:
        """Shares of a Ulysses group: denoisers, then helpers."""
        if aco is not None:
            return aco.heads
        shares = split_evenly(attention.heads, parallel.ulysses_degree)
        return (max(shares),) * len(shares) if self.implementation.pads_heads else shares

    def _step(
        self,
        cost: RequestCost,
        attention: SharedAttention,
        parallel: ParallelConfig,
        heads: tuple[int, ...],
        chunks: int,
        *,
        helped: bool,
    ) -> StepTime:
        forwards = -(-cost.forwards_per_step // parallel.cfg_degree)
        batch = min(cost.forwards_per_call, forwards)
        calls, chunks = forwards / batch, min(chunks, max(heads))
        linear_s, beside_s = self._by_tokens(cost, attention, parallel)
        one = self._exchange(cost, attention, parallel, heads, batch)
        exposed_s, hidden_s = self._exposed(one, chunks, len(heads))
        sites = attention.sites * calls
        overhead = self.device.layer_overhead_s + self.implementation.hidden_cost * hidden_s
        overhead += self.implementation.chunk_s * (chunks if chunks > 1 else 0)
        overhead += self.implementation.helper_s if helped else 0.0
        guidance_s = self.cluster.exchange_s(cost.latent_bytes / 2, parallel.cfg_degree) if forwards > 0 else 0.0
        exchange_s = one.inward_s + one.outward_s + one.ring_s
        return StepTime(
            linear_s=linear_s * forwards,
            attention_s=one.attention_s * sites + beside_s * forwards,
            exchange_s=exchange_s * sites + guidance_s,
            exposed_s=exposed_s * sites + guidance_s,
            overhead_s=overhead * sites,
            exchanged_bytes=round(one.num_bytes * sites),
        )

    def _by_tokens(
        self, cost: RequestCost, attention: SharedAttention, parallel: ParallelConfig
    ) -> tuple[float, float]:
        """Of one forward, what every rank does for its own tokens: linear and element-wise work; other attention."""
        tokens, joint = cost.latent_tokens, cost.text_tokens if attention.joint_text else 0
        own = (math.ceil(tokens / parallel.sequence_degree) + joint) / (tokens + joint)  # every rank has all the text
        total = cost.forward.total
        passes = self.implementation.passes * attention.sites * attention.row_bytes * (tokens + joint)
        linear_s = total.linear / self.device.linear_per_s + passes / self.device.memory_bytes_per_s
        beside = total.attention - attention.operations
        return own * linear_s, own * beside / self._attention_rate(attention)

    def _attention_rate(self, attention: SharedAttention) -> float:
        return self.device.attention_per_s * (self.device.masked_attention if attention.is_masked else 1.0)

    def _exchange(
        self,
        cost: RequestCost,
        attention: SharedAttention,
        parallel: ParallelConfig,
        heads: tuple[int, ...],
        batch: int,
    ) -> _Exchange:
        """One attention of one call, on the busiest rank of each kind."""
        ulysses, ring = parallel.ulysses_degree, parallel.ring_degree
        tokens = cost.latent_tokens / ring  # of a Ulysses group
        text = cost.text_tokens if attention.joint_text else 0
        shares = [tokens / ulysses] * ulysses + [0.0] * (len(heads) - ulysses)
        row = attention.row_bytes / attention.heads * batch
        inward = max(_inward_rows(heads, shares, text, rank) for rank in range(len(heads))) * row
        outward = max(_outward_rows(heads, shares, text, rank) for rank in range(len(heads))) * row
        passed_on = 2 * (tokens + text) * max(heads) * row
        operations = attention.operations * batch / attention.sites * max(heads) / attention.heads / ring
        lengthened = 1 + self.implementation.ring_loss * (ring - 1)
        linear_s, _ = self._by_tokens(cost, attention, parallel)
        return _Exchange(
            attention_s=operations * lengthened / self._attention_rate(attention),
            inward_s=self.cluster.exchange_s(inward, len(heads)),
            outward_s=self.cluster.exchange_s(outward, len(heads)),
            ring_s=(ring - 1) * self.cluster.pass_on_s(passed_on, ring),
            projection_s=linear_s * batch / attention.sites * attention.projections / cost.forward.total.linear,
            num_bytes=inward + outward + (ring - 1) * passed_on,
        )

    def _exposed(self, one: _Exchange, chunks: int, ranks: int) -> tuple[float, float]:
        """Seconds of exchange that nothing hides, and those that something does."""
        ring_s = max(one.ring_s - one.attention_s, 0.0)
        whole = one.inward_s + one.outward_s
        if chunks == 1:
            exposed = whole
        elif self.implementation.overlap is Overlap.FULL:
            exposed = _fully_overlapped(one, chunks, ranks)
        else:
            exposed = one.outward_s / chunks + max(one.outward_s - one.attention_s, 0.0) * (chunks - 1) / chunks
            if self.implementation.overlap is Overlap.OUTPUTS_AND_PROJECTIONS:  # the last of q, k and v has no cover
                exposed += max(one.inward_s - one.projection_s, one.inward_s / 3)
            else:
                exposed += one.inward_s
        return exposed + ring_s, whole - exposed + one.ring_s - ring_s


def _fully_overlapped(one: _Exchange, chunks: int, ranks: int) -> float:
    """The first chunk arrives under the projections, the last one leaves under the attention of the rank's own rows;
    in between, arrivals and departures go on under the attention of the other chunks."""
    first = max(one.inward_s / chunks - one.projection_s, 0.0)
    last = max(one.outward_s / chunks - one.attention_s / chunks / ranks, 0.0)
    between = max(one.inward_s + one.outward_s - one.attention_s, 0.0) * (chunks - 1) / chunks
    return first + between + last


def _inward_rows(heads: tuple[int, ...], shares: list[float], text: int, rank: int) -> float:
    """Rows of single heads of q, k and v that a rank sends or receives, whichever are more. Helpers get the text's too,
    from the first denoiser."""
    received = (sum(shares) - shares[rank]) * heads[rank]
    sent = shares[rank] * (sum(heads) - heads[rank])
    for_helpers = sum(count for count, share in zip(heads, shares, strict=True) if not share) * text
    if not shares[rank]:
        received += text * heads[rank]
    elif rank == 0:
        sent += for_helpers
    return 3 * max(received, sent)


def _outward_rows(heads: tuple[int, ...], shares: list[float], text: int, rank: int) -> float:
    """Rows of single heads of the results that a rank sends or receives, whichever are more. Every denoiser gets all
    of the text's."""
    tokens, denoisers = sum(shares), sum(share > 0 for share in shares)
    others = denoisers - (shares[rank] > 0)
    sent = (tokens - shares[rank] + others * text) * heads[rank]
    received = (shares[rank] + text) * (sum(heads) - heads[rank]) if shares[rank] else 0.0
    return max(sent, received)


def _chunk_operations(cost: RequestCost, chunk: int) -> Operations:
    if chunk == 0:
        return cost.decode_first_chunk
    if chunk == cost.num_chunks - 1:
        return cost.decode_last_chunk or cost.decode_chunk
    return cost.decode_chunk
