"""How long a video takes that is made block by block on stages of layers, by prediction; and what each worker holds.

Operations become seconds in `predict.Predictor` alone: a stage is to it a model with fewer layers. When ops run is the
business of the simulator, which drives the engine's own block scheduler.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Kind, Op, Prefix, Storage
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Role
from pipedit.core.request import VideoRequest
from pipedit.plan.block_arrangement import BlockArrangement
from pipedit.plan.block_clock import RESULTS_SLACK, RingTimes
from pipedit.plan.block_memory import blocks_in_flight, layer_ranges, message_bytes, stage_bytes, stage_cost
from pipedit.plan.block_memory import window_latents as largest_window
from pipedit.plan.costs import Operations, RequestCost, SharedAttention, TransformerCost
from pipedit.plan.durations import DECODE, Piece
from pipedit.plan.jobs import Work
from pipedit.plan.memory import Need, Room
from pipedit.plan.outcome import summarize
from pipedit.plan.pools import Pool, Service
from pipedit.plan.predict import Predictor
from pipedit.plan.predicted_durations import PredictedDurations
from pipedit.plan.simulator import Arrival, simulate

_ALONE = ParallelConfig(pipesp_chunks=1)
# Element-wise work that neighbours bring, in reads and writes of rows of the hidden state: keys and values are joined,
# a neighbour's keys are turned (a third of their channels in float32), and rows are copied to be left for others; where
# they wait in 8 bits, they are packed and unpacked by way of float32.
_JOINING, _TURNING, _LEAVING = 4, 9, 4
_PACKING, _UNPACKING = 20, 14
_EMPTY = Room(available_bytes=0)
_KIND = "video"
_BLOCKS_MORE = 20  # of the longer of two videos, from which longer ones follow


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockVideo:
    """`count` long videos that are alike, and what planning has to know of them. `latents`: latent frames of each.
    `cost_of`: the model's cost of such a video of so many latent frames. `ready_chunks`: see
    ModelAdapter.num_ready_chunks. `request` is complete."""

    request: VideoRequest
    latents: int
    cost_of: Callable[[int], RequestCost]
    ready_chunks: Callable[[int, bool], int]
    count: int = 1

    @property
    def cost(self) -> RequestCost:
        return self.cost_of(self.latents)

    def plan(
        self, *, block_latents: int, context_latents: int, prefix: Prefix = Prefix.CACHE, compat: bool = False
    ) -> BlockPlan:
        return BlockPlan(
            latents=self.latents,
            block_latents=block_latents,
            context_latents=context_latents,
            num_steps=self.cost.num_steps,
            prefix=prefix,
            compat=compat,
        )


# -- seconds ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class BlockDurations:
    """Seconds of everything that workers are told to do for such a video. `measured_s`: what an op in the middle of the
    video takes on each stage, where somebody has measured it (None: as predicted); others follow in proportion."""

    predictor: Predictor
    video: BlockVideo
    arrangement: BlockArrangement
    measured_s: Sequence[float] | None = None

    # -- denoising ----------------------------------------------------------------------------------------------

    @property
    def ring(self) -> RingTimes:
        return RingTimes(
            seconds_of=self.op_s,
            hand_over_s=self.hand_over_s,
            result_s=self.result_s,
            passes=self.window.forwards_per_step,
            results_ahead=self.arrangement.stages + RESULTS_SLACK + 1,
        )

    def op_s(self, stage: int, op: Op) -> float:
        """All forward passes of a step of a block on one stage."""
        return self._stage_s(stage, self._signature(op.block, op.step))

    @functools.cached_property
    def stage_s(self) -> tuple[float, ...]:
        """By stage, an op in the middle of the video."""
        return tuple(self.op_s(stage, self._middle) for stage in range(self.arrangement.stages))

    def denoise_s(self, stage: int) -> float:
        """All ops of a video on one stage."""
        plan, total_s = self._plan, 0.0
        assert plan.num_blocks is not None
        for block in range(plan.num_blocks):
            first_s, last_s = (self.op_s(stage, Op(block, step)) for step in (0, plan.num_steps - 1))
            between_s = self.op_s(stage, Op(block, 1)) * (plan.num_steps - 2) if plan.num_steps > 2 else 0.0
            total_s += first_s + between_s + (last_s if plan.num_steps > 1 else 0.0)
        return total_s

    @functools.cached_property
    def window(self) -> RequestCost:
        """Of the largest window."""
        return self.video.cost_of(largest_window(self._plan))

    @functools.cached_property
    def hop_bytes(self) -> int:
        """Hidden states of one forward pass, from stage to stage."""
        return message_bytes(self.window) if self.arrangement.stages > 1 else 0

    @functools.cached_property
    def hand_over_s(self) -> float:
        return self.predictor.cluster.pass_on_s(self.hop_bytes, self.arrangement.stages)

    @functools.cached_property
    def result_s(self) -> float:
        return self.predictor.cluster.pass_on_s(self._latent_bytes(self._plan.block_latents), self.arrangement.stages)

    @property
    def _plan(self) -> BlockPlan:
        return self.arrangement.plan

    @property
    def _middle(self) -> Op:
        """It has both neighbours where any has, and the largest window."""
        return Op(1 if self._plan.has_block(2) or self._plan.has_block(1) else 0, min(1, self._plan.num_steps - 1))

    @functools.cached_property
    def _signature(self) -> Callable[[int, int], tuple[int, int, int]]:
        return functools.cache(self._latents_of_op)

    def _latents_of_op(self, block: int, step: int) -> tuple[int, int, int]:
        """Latent frames of its window, of neighbours that it reads, and that it leaves for them."""
        plan, op = self._plan, Op(block, step)
        given = sum(d.latents for d in plan.dependencies(op) if d.kind is Kind.FEATURES)
        left = sum(d.latents for d in plan.hand_overs(op) if d.kind is Kind.FEATURES)
        return plan.window_latents(block), given, left

    @functools.cached_property
    def _stage_s(self) -> Callable[[int, tuple[int, int, int]], float]:
        middle = self._signature(*self._middle)
        factors = [1.0] * self.arrangement.stages
        if self.measured_s is not None:
            assert len(self.measured_s) == self.arrangement.stages, self.measured_s
            factors = [seconds / self._predicted_s(stage, *middle) for stage, seconds in enumerate(self.measured_s)]
        return functools.cache(lambda stage, signature: factors[stage] * self._predicted_s(stage, *signature))

    def _predicted_s(self, stage: int, window: int, given: int, left: int) -> float:
        cost, layers = self.video.cost_of(window), layer_ranges(self.window, self.arrangement.stages)[stage]
        is_last = stage == self.arrangement.stages - 1
        tokens = cost.latent_tokens // window
        step = self.predictor.step(part_of(cost, layers, given=given * tokens, is_last=is_last), _ALONE)
        attention = _attention(cost)
        rows = (_JOINING * (window + given) if given else 0) + _TURNING * given + _LEAVING * left
        if self.arrangement.storage is Storage.INT8:
            rows += _UNPACKING * given + _PACKING * left
        moved = rows * tokens * attention.row_bytes * len(layers) * cost.forwards_per_step
        seconds = step.total_s + moved / self.predictor.device.memory_bytes_per_s
        if self.arrangement.storage is Storage.HOST:  # on the same stream, so nothing hides it
            stored = 2 * (given + left) * tokens * attention.row_bytes * len(layers) * cost.forwards_per_step
            seconds += self.predictor.cluster.host_copy_s(stored, self.arrangement.stages)
        return seconds

    # -- encoding and decoding ------------------------------------------------------------------------------------

    def pieces(self, command: messages.Command) -> Sequence[Piece]:
        """See Durations. What is computed in a DenoiseBlocks is the ring's business."""
        match command:
            case messages.DenoiseBlocks() if command.first == 0 and command.conditioning_at is not None:
                return [self._whole.conditioning()]
            case messages.DecodeBlock():
                fetched = self._whole.fetch(self._latent_bytes(self._plan.latents_of(command.block)))
                chunks = self._chunks(command.block)
                return [fetched, Piece(what=DECODE, seconds=self.decode_s(command.block))] if chunks else [fetched]
            case messages.Encode():
                return self._whole.pieces(command)
        return []

    def decode_s(self, block: int) -> float:
        """Of what can be decoded when this block has come, and could not before."""
        return sum(self.predictor.chunk_s(self.video.cost, chunk) for chunk in self._chunks(block))

    @property
    def middle_decode_s(self) -> float:
        """Of a block, on the average of those after the first."""
        blocks = self._plan.num_blocks
        assert blocks is not None
        seconds = [self.decode_s(block) for block in range(blocks)]
        return sum(seconds[1:]) / (blocks - 1) if blocks > 1 else seconds[0]

    def _chunks(self, block: int) -> range:
        return range(self._chunks_after(block), self._chunks_after(block + 1))

    def _chunks_after(self, blocks: int) -> int:
        if blocks == 0:
            return 0
        come = self._plan.first_latent(blocks - 1) + self._plan.latents_of(blocks - 1)
        return min(self.video.ready_chunks(come, blocks == self._plan.num_blocks), self.video.cost.num_chunks)

    @functools.cached_property
    def _whole(self) -> PredictedDurations:
        return PredictedDurations.of(self.predictor, self.video.cost)

    def _latent_bytes(self, latents: int) -> int:
        """Latents in float32. The cost counts the noise scheduler's history, too."""
        return self.window.latent_bytes // largest_window(self._plan) * latents // 3


def part_of(cost: RequestCost, layers: range, *, given: int, is_last: bool) -> RequestCost:
    """A stage as a model of its own: some layers, in each of which the latents look at `given` more tokens; the
    embedders before them, which every stage has, and what comes after all layers on the last one."""
    attention, forward = _attention(cost), cost.forward
    seen = cost.latent_tokens + (cost.text_tokens if attention.joint_text else 0)
    every = attention.operations // attention.sites
    more = Operations(attention=every * given // seen)
    return dataclasses.replace(
        cost,
        forward=TransformerCost(
            front=forward.front,
            layers=tuple(forward.layers[layer] + more for layer in layers),
            back=forward.back if is_last else Operations(),
        ),
        attention=dataclasses.replace(
            attention,
            sites=len(layers),
            operations=(every + more.attention) * len(layers),
            projections=attention.projections * len(layers) // attention.sites,
        ),
    )


def _attention(cost: RequestCost) -> SharedAttention:
    assert cost.attention is not None, "the model declares no attention"
    return cost.attention


# -- a whole run --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerNeed:
    """What one worker holds at its worst moment. `need.weights` are those of all its roles."""

    roles: tuple[Role, ...]
    need: Need

    @property
    def needed_bytes(self) -> int:
        """With libraries and the margin."""
        return _EMPTY.needed(self.need)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockPrediction:
    """`makespan_s`: all videos, one after the other. `first_frames_s`: until the first block of the first is decoded;
    `decode_tail_s`: what each takes when its last block is denoised and not all are decoded. `block_every_s`: from
    block to block in the steady state, where the slowest part decides; `decode_block_s`: a block, for the decoder.

    `stage_s`: an op on each stage; `idle_s`: time that a stage does not denoise. `utilisation`: of all workers. Each op
    has `passes` forward passes; `hop_bytes` and `hop_s` are those of one from stage to stage. `host_bytes`: keys and
    values in host memory, of all stages. `needs`: by rank.
    """

    arrangement: BlockArrangement
    count: int
    makespan_s: float
    first_frames_s: float
    decode_tail_s: float
    block_every_s: float
    decode_block_s: float
    stage_s: tuple[float, ...]
    idle_s: tuple[float, ...]
    utilisation: float
    passes: int
    hop_bytes: int
    hop_s: float
    host_bytes: int
    needs: tuple[WorkerNeed, ...]

    @property
    def seconds_each(self) -> float:
        return self.makespan_s / self.count

    @property
    def peak_bytes(self) -> tuple[int, ...]:
        return tuple(need.needed_bytes for need in self.needs)

    @property
    def weight_bytes(self) -> tuple[int, ...]:
        return tuple(need.need.weights for need in self.needs)

    @property
    def useful_stages(self) -> int:
        """More of them wait for each other: there are no more forward passes under way. A block's passes of a step
        follow each other through the stages, and its next step begins when the last one is through."""
        return (blocks_in_flight(self.arrangement.plan) - 1) * self.passes + 1

    def lacks(self, available_bytes: int) -> int:
        """Bytes that the fullest worker has too few; 0 where it fits."""
        return max(0, max(self.peak_bytes) - available_bytes)


def predict_blocks(
    arrangement: BlockArrangement,
    video: BlockVideo,
    predictor: Predictor,
    *,
    measured_s: Sequence[float] | None = None,
) -> BlockPrediction:
    """Simulates one video with the engine's block scheduler; several are made one after the other. `measured_s`: see
    BlockDurations."""
    durations = BlockDurations(predictor, video, arrangement, measured_s)
    run, plan, stages = _run(durations), arrangement.plan, range(arrangement.stages)
    return BlockPrediction(
        arrangement=arrangement,
        count=video.count,
        makespan_s=run.makespan_s * video.count,
        first_frames_s=run.first_frames_s,
        decode_tail_s=run.decode_tail_s,
        block_every_s=_block_every_s(durations),
        decode_block_s=durations.middle_decode_s,
        stage_s=durations.stage_s,
        idle_s=tuple(run.makespan_s - durations.denoise_s(stage) for stage in stages),
        utilisation=run.busy_s / (run.makespan_s * arrangement.num_workers),
        passes=durations.window.forwards_per_step,
        hop_bytes=durations.hop_bytes,
        hop_s=durations.hand_over_s,
        host_bytes=sum(
            stage_bytes(
                durations.window, plan, stages=arrangement.stages, stage=stage, storage=arrangement.storage
            ).host_entries
            for stage in stages
        ),
        needs=worker_needs(arrangement, video),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """One video. `busy_s`: of all workers together."""

    makespan_s: float
    first_frames_s: float
    decode_tail_s: float
    busy_s: float


def _run(durations: BlockDurations) -> _Run:
    """Of a very long video the middle is all alike: two shorter ones say how long a block more takes."""
    plan, stages = durations.arrangement.plan, durations.arrangement.stages
    enough = blocks_in_flight(plan) + 3 * stages + 2 * _BLOCKS_MORE
    assert plan.num_blocks is not None
    if plan.num_blocks <= 2 * enough:
        return _simulated(durations)
    long, short = (_simulated(_shortened(durations, count)) for count in (enough, enough - _BLOCKS_MORE))
    more = (plan.num_blocks - enough) / _BLOCKS_MORE
    return dataclasses.replace(
        long,
        makespan_s=long.makespan_s + more * (long.makespan_s - short.makespan_s),
        busy_s=long.busy_s + more * (long.busy_s - short.busy_s),
    )


def _simulated(durations: BlockDurations) -> _Run:
    run = simulate([block_pool(durations)], [Arrival(at_s=0.0, kind=_KIND)])
    outcome, (life,) = summarize(run), run.lives
    return _Run(
        makespan_s=outcome.makespan_s,
        first_frames_s=life.first_frames_s,
        decode_tail_s=life.done_s - life.denoised_s,
        busy_s=sum(use.rank_seconds for use in run.uses),
    )


def _shortened(durations: BlockDurations, num_blocks: int) -> BlockDurations:
    """The same video with fewer blocks, the last of which stays as it is."""
    plan = durations.arrangement.plan
    assert plan.latents is not None and plan.num_blocks is not None
    latents = plan.latents - (plan.num_blocks - num_blocks) * plan.block_latents
    shorter = dataclasses.replace(durations.arrangement, plan=dataclasses.replace(plan, latents=latents))
    return dataclasses.replace(durations, arrangement=shorter)


def block_pool(durations: BlockDurations, kind: str = _KIND, count: int = 1) -> Pool:
    """Engines that make such videos."""
    video, arrangement = durations.video, durations.arrangement
    work = Work(
        num_steps=video.cost.num_steps,
        num_chunks=max(video.cost.num_chunks, 1),
        blocks=arrangement.plan,
        shape=(video.request.width, video.request.height, arrangement.plan),
    )
    service = Service(work=work, durations=durations, ring=durations.ring)
    return Pool(placement=arrangement.placement, services={kind: service}, count=count)


def worker_needs(arrangement: BlockArrangement, video: BlockVideo) -> tuple[WorkerNeed, ...]:
    """By rank."""
    placement, plan = arrangement.placement, arrangement.plan
    window, found = video.cost_of(largest_window(plan)), []
    for rank in placement.world:
        roles = placement.roles(rank)
        cost = stage_cost(
            video.cost,
            window,
            plan,
            stages=arrangement.stages,
            storage=arrangement.storage,
            stage=rank if Role.DENOISER in roles else 0,
            decodes=Role.DENOISER in roles and Role.DECODER in roles,
        )
        found.append(WorkerNeed(roles=roles, need=Need.of(cost, roles=roles)))
    return tuple(found)


def _block_every_s(durations: BlockDurations) -> float:
    """The slowest of the stages, the links between them and the decoder; the last stage may have to decode beside."""
    arrangement, decode_s = durations.arrangement, durations.middle_decode_s
    steps, passes = arrangement.plan.num_steps, durations.window.forwards_per_step
    parts = [steps * max(seconds, passes * durations.hand_over_s) for seconds in durations.stage_s]
    if arrangement.decode_worker:
        parts.append(decode_s)
    else:
        parts[-1] += decode_s
    return max(parts)
