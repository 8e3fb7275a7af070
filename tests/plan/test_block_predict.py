"""Predictions of videos that are made block by block: figures that can be worked out by hand, and closed forms of the
paper (dualparal.md, section 7)."""

import dataclasses
import functools
import itertools
from typing import Any

import pytest

from pipedit.core.blocks import BlockPlan, Kind, Op, Prefix, Storage
from pipedit.core.placement import Placement, Role
from pipedit.plan import block_predict
from pipedit.plan.block_arrangement import BlockArrangement
from pipedit.plan.block_clock import RingTimes
from pipedit.plan.block_orders import order_of
from pipedit.plan.block_planner import BlocksAsked, find_rivals, make_block_plan, remarks
from pipedit.plan.block_predict import BlockDurations, BlockPrediction, BlockVideo, block_pool, part_of, predict_blocks
from pipedit.plan.block_simulation import time_order
from pipedit.plan.costs import Operations, PartBytes, RequestCost, SharedAttention, TransformerCost
from pipedit.plan.durations import DECODE, STEP, FixedDurations, Piece
from pipedit.plan.hardware import Cluster, Device, Link
from pipedit.plan.jobs import Work
from pipedit.plan.outcome import summarize
from pipedit.plan.planner import make_plan, predicted_by
from pipedit.plan.pools import Pool, Service
from pipedit.plan.predict import Implementation, Overlap, Predictor
from pipedit.plan.simulator import Arrival, simulate
from tests.plan.planned import GIB, wan

TOKENS, HEADS, DIM, LAYERS = 10, 4, 8, 8  # tokens of a latent frame
HIDDEN = HEADS * DIM
LINEAR, ATTENTION = 24 * TOKENS * HIDDEN**2, 4 * TOKENS**2 * HIDDEN  # of a layer, for one latent frame, or a pair
IDEAL = Implementation(overlap=Overlap.FULL, passes=0, request_s=0, hidden_cost=0, chunk_s=0, helper_s=0, ring_loss=0)
FAST = 1e30
DEVICE = Device(
    name="abacus",
    title="",
    memory_bytes=1,
    linear_per_s=LINEAR,  # a second for a layer and a latent frame
    attention_per_s=FAST,
    convolution_per_s=1e5,
    memory_bytes_per_s=FAST,
    host_bytes_per_s=FAST,
    layer_overhead_s=0,
)


def cost_of(
    latents: int, *, passes: int = 1, steps: int = 6, layers: int = LAYERS, decode_s: float = 0.0
) -> RequestCost:
    """Nothing but layers, and a second of decoding for each latent frame if asked for."""
    layer = Operations(linear=LINEAR * latents, attention=ATTENTION * latents**2)
    chunk = Operations(convolution=int(decode_s * 1e5))
    return RequestCost(
        num_steps=steps,
        num_chunks=latents,
        forwards_per_step=passes,
        latent_tokens=TOKENS * latents,
        text_tokens=0,
        latent_bytes=96 * latents,
        encode=Operations(),
        forward=TransformerCost(front=Operations(), layers=(layer,) * layers, back=Operations()),
        decode_first_chunk=chunk,
        decode_chunk=chunk,
        parts={
            "text_encoder": PartBytes(weights=10**5, working=0),
            "transformer": PartBytes(weights=8000 * layers + 100, working=500 * latents, layers=(8000,) * layers),
            "vae": PartBytes(weights=10**4, working=10**4),
        },
        attention=SharedAttention(
            sites=layers,
            heads=HEADS,
            head_dim=DIM,
            operations=layers * ATTENTION * latents**2,
            projections=1,
            element=2,
        ),
    )


def video_of(latents: int, **changes: Any) -> BlockVideo:
    request = wan()[0].request
    cost = functools.cache(functools.partial(cost_of, **changes))
    return BlockVideo(request=request, latents=latents, cost_of=cost, ready_chunks=lambda come, _: come)


def predictor_of(hop_s: float = 0.0, implementation: Implementation = IDEAL, **device: Any) -> Predictor:
    """`hop_s`: a latency of every message."""
    link = Link(name="wire", title="", bytes_per_s=FAST, latency_s=hop_s or 1e-30)
    return Predictor(
        Cluster(device=dataclasses.replace(DEVICE, **device), num_devices=64, devices_per_node=64, link=link),
        implementation,
    )


def predicted(
    video: BlockVideo,
    stages: int,
    *,
    predictor: Predictor | None = None,
    block: int = 2,
    context: int = 1,
    prefix: Prefix = Prefix.CACHE,
    measured_s: tuple[float, ...] | None = None,
    **changes: Any,
) -> BlockPrediction:
    plan = video.plan(block_latents=block, context_latents=context, prefix=prefix)
    way = BlockArrangement(plan=plan, stages=stages, **changes)
    return predict_blocks(way, video, predictor or predictor_of(), measured_s=measured_s)


# -- seconds of an op ---------------------------------------------------------------------------------------------


def test_a_stage_takes_its_share_of_the_layers() -> None:
    """8 layers on 3 stages: 3, 3 and 2, each a second for a latent frame."""
    found = predicted(video_of(20), 3)
    assert found.stage_s == pytest.approx((3 * 2, 3 * 2, 2 * 2))


def test_both_passes_of_guidance_count() -> None:
    assert predicted(video_of(20, passes=2), 2).stage_s == pytest.approx((16, 16))


def test_neighbours_lengthen_attention_but_nothing_else() -> None:
    """Keys of a block of 4 and of 2 on either side."""
    slow = predictor_of(attention_per_s=ATTENTION, linear_per_s=FAST)
    found = predicted(video_of(40), 2, predictor=slow, block=4, context=2)
    assert found.stage_s == pytest.approx((4 * 4 * (4 + 2 + 2),) * 2)
    alone = predicted(video_of(40), 2, predictor=slow, block=4, context=0)
    assert alone.stage_s == pytest.approx((4 * 4 * 4,) * 2)
    again = predicted(video_of(40), 2, predictor=slow, block=4, context=2, prefix=Prefix.RERUN)
    assert again.stage_s == pytest.approx((4 * 6 * (6 + 2),) * 2)


@pytest.mark.parametrize(("block", "context", "gain"), [(8, 8, 2.0), (8, 4, 1.5)])
def test_the_prefix_cache_saves_what_the_notes_promise(block: int, context: int, gain: float) -> None:
    """Section 11: linear work is (nb + nc) / nb times as much where the prefix runs again."""
    cache, rerun = (predicted(video_of(80), 4, block=block, context=context, prefix=prefix) for prefix in Prefix)
    assert rerun.stage_s[0] / cache.stage_s[0] == pytest.approx(gain)
    busy_s = [found.makespan_s - found.idle_s[0] for found in (rerun, cache)]
    assert gain * 0.9 < busy_s[0] / busy_s[1] < gain, "the first block has no prefix to run again"
    assert rerun.makespan_s / cache.makespan_s > gain, "and the published order leaves stages idle"


def test_text_in_the_same_attention_is_seen_too() -> None:
    cost = cost_of(4)
    assert cost.attention is not None
    joint = dataclasses.replace(
        cost, text_tokens=TOKENS, attention=dataclasses.replace(cost.attention, joint_text=True)
    )
    part = part_of(joint, range(2, 4), given=5 * TOKENS, is_last=False)
    assert part.attention is not None and joint.attention is not None
    assert part.attention.operations == joint.attention.operations // 4 * 2, "5 more than the 4 and 1 that there are"
    assert part.forward.total.attention == part.attention.operations
    assert part.attention.sites == 2


def test_embedders_are_on_every_stage_and_the_head_on_the_last() -> None:
    cost = cost_of(2)
    forward = dataclasses.replace(cost.forward, front=Operations(linear=7), back=Operations(linear=11))
    cost = dataclasses.replace(cost, forward=forward)
    layer = cost.forward.layers[0].linear
    parts = [part_of(cost, layers, given=0, is_last=layers.stop == 8) for layers in (range(4), range(4, 8))]
    assert [part.forward.total.linear for part in parts] == [4 * layer + 7, 4 * layer + 7 + 11]


def test_element_wise_work_and_overheads_follow_the_layers() -> None:
    busy = dataclasses.replace(IDEAL, passes=3)
    slow = predictor_of(implementation=busy, linear_per_s=FAST, memory_bytes_per_s=HIDDEN * 2, layer_overhead_s=1.0)
    found = predicted(video_of(20), 4, predictor=slow, context=0)
    assert found.stage_s == pytest.approx((2 * (3 * 2 * TOKENS + 1),) * 4)
    # One latent frame of either neighbour: joined (4), turned (9), and as many left (4).
    more = predicted(video_of(20), 4, predictor=slow)
    assert more.stage_s[1] - found.stage_s[1] == pytest.approx(2 * TOKENS * (4 * (2 + 2) + 9 * 2 + 4 * 2))


def test_host_memory_is_slow_and_8_bits_are_not_free() -> None:
    slow = predictor_of(host_bytes_per_s=HIDDEN * 2, linear_per_s=FAST)
    device, host, _ = (predicted(video_of(20), 4, predictor=slow, storage=storage) for storage in Storage)
    assert host.stage_s[1] - device.stage_s[1] == pytest.approx(2 * 2 * (2 + 2) * TOKENS), "two layers, keys and values"
    device, _, int8 = (
        predicted(video_of(20), 4, predictor=predictor_of(memory_bytes_per_s=HIDDEN), storage=storage)
        for storage in Storage
    )
    assert int8.stage_s[1] > device.stage_s[1]


def test_measured_stages_win_over_predicted_ones() -> None:
    """Ops of another size follow in proportion."""
    video = video_of(19)  # the last block is half as long
    plan = video.plan(block_latents=2, context_latents=0)
    measured = BlockDurations(predictor_of(), video, BlockArrangement(plan=plan, stages=2), (3.0, 5.0))
    assert measured.stage_s == pytest.approx((3, 5))
    assert [measured.op_s(stage, Op(9, 2)) for stage in (0, 1)] == pytest.approx([1.5, 2.5])
    assert predicted(video, 2, context=0, measured_s=(3.0, 5.0)).block_every_s == pytest.approx(6 * 5)


# -- a whole run: closed forms ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "blocks", "steps"), [(2, 10, 6), (4, 10, 6), (4, 20, 10), (8, 33, 50)])
def test_published_runs_follow_the_papers_bubbles(stages: int, blocks: int, steps: int) -> None:
    """The paper's N^2 - N - 1 idle slots and one more (see test_block_schedule); N - 1 to fill and empty the ring."""
    video = video_of(2 * blocks, steps=steps)
    found = predicted(video, stages, prefix=Prefix.RERUN, measured_s=(1.0,) * stages)
    first_s = 2 / 3  # the first block's window is shorter
    slots = found.makespan_s + steps * (1 - first_s)
    assert slots == pytest.approx(blocks * steps + (stages**2 - stages) + (stages - 1))


@pytest.mark.parametrize(("stages", "blocks", "steps"), [(2, 10, 6), (4, 10, 6), (8, 33, 50)])
def test_our_order_only_fills_and_drains(stages: int, blocks: int, steps: int) -> None:
    """No stage is idle between its first and its last op: K T + N - 1 slots."""
    found = predicted(video_of(2 * blocks, steps=steps), stages, measured_s=(1.0,) * stages)
    assert found.makespan_s == pytest.approx(blocks * steps + stages - 1)
    assert found.idle_s == pytest.approx((stages - 1,) * stages)
    assert found.utilisation == pytest.approx(blocks * steps / (blocks * steps + stages - 1))


def test_passes_follow_each_other_through_the_stages() -> None:
    """With two passes of half the length the next stage begins half a slot earlier."""
    one, two = (predicted(video_of(40, passes=passes), 4, measured_s=(1.0,) * 4) for passes in (1, 2))
    assert one.makespan_s - two.makespan_s == pytest.approx(3 / 2)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("blocks", [2, 3])
def test_more_stages_than_passes_under_way_are_waste(blocks: int, passes: int) -> None:
    """No faster by a single op: `useful_stages` is exact where stages are equal and links cost nothing."""
    video = video_of(2 * blocks, passes=passes, steps=30, layers=16)

    def idle_between(stages: int) -> float:
        found = predicted(video, stages, measured_s=(1.0,) * stages)
        fill_s = (stages - 1) / passes
        return found.idle_s[0] - fill_s

    useful = predicted(video, 1).useful_stages
    assert useful == (blocks - 1) * passes + 1
    assert idle_between(useful) == pytest.approx(0, abs=1)
    assert idle_between(useful + 2) > 20


def test_the_slowest_of_stages_and_links_sets_the_pace() -> None:
    uneven = predicted(video_of(80), 3)
    assert uneven.block_every_s == pytest.approx(6 * 6)
    assert uneven.makespan_s == pytest.approx(40 * 36, rel=0.02)
    linked = predicted(video_of(80), 4, predictor=predictor_of(hop_s=10.0))
    assert linked.block_every_s == pytest.approx(6 * 10), "a stage takes 4"
    assert linked.makespan_s == pytest.approx(40 * 60, rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"decode_s": 5.0}, {"passes": 2}])
@pytest.mark.parametrize("prefix", Prefix)
def test_very_long_videos_follow_from_shorter_ones(
    prefix: Prefix, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(more: int) -> BlockPrediction:
        monkeypatch.setattr(block_predict, "_BLOCKS_MORE", more)
        return predicted(video_of(2 * 299 + 1, **changes), 3, prefix=prefix, decode_worker=True)

    whole, short = found(10**6), found(20)
    assert short.makespan_s == pytest.approx(whole.makespan_s, rel=1e-3)
    assert short.utilisation == pytest.approx(whole.utilisation, rel=1e-3)
    assert short.first_frames_s == whole.first_frames_s
    assert found(2).makespan_s == pytest.approx(whole.makespan_s, rel=0.05)


def test_first_frames_come_when_the_first_block_is_decoded() -> None:
    """It cannot be done before all ops below the diagonal are: 1 + 2 + ... + T."""
    found = predicted(video_of(40, steps=6, decode_s=0.25), 1, measured_s=(1.0,), context=1)
    assert found.first_frames_s >= 6 * 7 / 2 + 2 * 0.25
    assert found.first_frames_s <= 6 * 7 / 2 + 2 * 0.25 + 6 + 4, "a piece, and results on their way"


# -- decoding -----------------------------------------------------------------------------------------------------


def test_a_worker_of_its_own_hides_decoding() -> None:
    video = video_of(80, decode_s=1.0)
    none, own, last = (
        predicted(each, 4, measured_s=(1.0,) * 4, decode_worker=own)
        for each, own in ((video_of(80), True), (video, True), (video, False))
    )
    assert own.decode_block_s == pytest.approx(2)
    assert own.block_every_s == pytest.approx(6)
    assert own.makespan_s - none.makespan_s == pytest.approx(own.decode_tail_s, abs=1)
    assert last.block_every_s == pytest.approx(6 + 2)
    assert last.makespan_s >= 40 * (6 + 2)
    assert "Decoding keeps up" in " ".join(remarks(own, 5))
    assert "25% of the last stage's time" in " ".join(remarks(last, 4))


def test_a_slow_decoder_is_told() -> None:
    found = predicted(video_of(80, decode_s=5.0), 4, measured_s=(1.0,) * 4, decode_worker=True)
    assert found.block_every_s == pytest.approx(10)
    assert found.makespan_s >= 40 * 10
    assert "Decoding is the slower side" in " ".join(remarks(found, 5))


def test_chunks_are_decoded_with_the_block_that_completes_them() -> None:
    """As for tiles of several latent frames: nothing with the first block, everything else with the last one."""
    video = dataclasses.replace(video_of(8, decode_s=1.0), ready_chunks=lambda come, done: come if done else come // 3)
    plan = video.plan(block_latents=2, context_latents=0)
    durations = BlockDurations(predictor_of(), video, BlockArrangement(plan=plan, stages=1))
    assert [durations.decode_s(block) for block in range(4)] == pytest.approx([0, 1, 1, 6])
    run = simulate([block_pool(durations)], [Arrival(at_s=0.0, kind="video")], keep_spans=True)
    second = next(span for span in run.spans if span.what == DECODE and span.block == 1)
    assert run.lives[0].first_frames_s == second.end_s


# -- the simulator ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plain:
    """Ops of the ring, and a second to encode; decoding takes as long as it is told."""

    decode_s: float = 0.0

    def pieces(self, command: Any) -> list[Piece]:
        if hasattr(command, "block"):
            return [Piece(what=DECODE, seconds=self.decode_s)]
        return list(FixedDurations(encode_s=1.0).pieces(command))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("prefix", Prefix)
@pytest.mark.parametrize(("stages", "decoder"), [(1, False), (3, False), (4, True)])
def test_the_scheduler_loses_no_time(stages: int, decoder: bool, prefix: Prefix, passes: int) -> None:
    """Commands piece by piece give every op the times that it has without any scheduler."""
    plan = BlockPlan(latents=19, block_latents=2, context_latents=1, num_steps=5, prefix=prefix)

    def seconds_of(stage: int, op: Op) -> float:
        return 1 + (stage * 3 + op.block * 5 + op.step) % 4

    ring = RingTimes(seconds_of=seconds_of, hand_over_s=0.25, passes=passes)
    placement = Placement.pipeline(stages=stages, decoder=decoder)
    work = Work(num_steps=5, num_chunks=1, blocks=plan)
    pool = Pool(placement=placement, services={"a": Service(work=work, durations=Plain(), ring=ring)})
    run = simulate([pool], [Arrival(at_s=0.0, kind="a")], keep_spans=True)
    steps = [span for span in run.spans if span.what == STEP]
    assert len(steps) == 10 * 5 * stages * passes
    if passes == 1:
        expected = {
            (stage, timed.op): (timed.starts_s[stage] + 1, timed.ends_s[stage] + 1)
            for timed in time_order(order_of(plan, stages), plan, stages, seconds_of, 0.25)
            for stage in range(stages)
        }
        assert {(s.rank, Op(s.block or 0, s.index or 0)): (s.start_s, s.end_s) for s in steps} == expected


def test_ranks_do_one_thing_at_a_time_and_blocks_are_decoded_in_order() -> None:
    plan = BlockPlan(latents=20, block_latents=2, context_latents=1, num_steps=5)
    work = Work(num_steps=5, num_chunks=1, blocks=plan)
    service = Service(work=work, durations=Plain(decode_s=2.5), ring=RingTimes(hand_over_s=0.1, results_ahead=6))
    pool = Pool(placement=Placement.pipeline(stages=3, decoder=False), services={"a": service}, count=2)
    run = simulate([pool], [Arrival(at_s=float(at_s), kind="a") for at_s in range(5)], keep_spans=True)
    for rank in range(6):
        spans = sorted((span.start_s, span.end_s) for span in run.spans if span.rank == rank)
        assert all(before[1] <= after[0] + 1e-9 for before, after in itertools.pairwise(spans)), rank
    for number in range(1, 6):
        decoded = [s.block for s in run.spans if s.what == DECODE and s.request_id == f"request-{number}"]
        assert decoded == list(range(10))
    outcome = summarize(run)
    assert outcome.requests == 5
    assert outcome.groups["all"].busy_s[DECODE] == pytest.approx(5 * 10 * 2.5)
    assert outcome.groups["all"].busy_s[STEP] == pytest.approx(5 * 10 * 5 * 3)
    assert run.lives[0].done_s == max(span.end_s for span in run.spans if span.request_id == "request-1")


def test_a_decoder_that_lags_holds_the_stages_up() -> None:
    """No more than a few finished blocks wait (BlockPolicy.blocks_waiting)."""
    plan = BlockPlan(latents=60, block_latents=2, context_latents=1, num_steps=4)
    work = Work(num_steps=4, num_chunks=1, blocks=plan)
    service = Service(work=work, durations=Plain(decode_s=40.0), ring=RingTimes())
    pool = Pool(placement=Placement.pipeline(stages=2, decoder=True), services={"a": service})
    run = simulate([pool], [Arrival(at_s=0.0, kind="a")], keep_spans=True)
    finished = {s.block: s.end_s for s in run.spans if s.what == STEP and s.rank == 1 and s.index == 3}
    decoded = {s.block: s.end_s for s in run.spans if s.what == DECODE}
    waiting = [
        sum(f <= at_s for f in finished.values()) - sum(d <= at_s for d in decoded.values())
        for at_s in decoded.values()
    ]
    assert max(waiting[:-8]) <= 4 + 4, "those that wait, and what was under way"
    assert run.lives[0].done_s == pytest.approx(30 * 40.0, rel=0.1)


# -- who does what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "decode_worker", "encode_on", "roles"),
    [
        (1, False, None, ["encoder denoiser decoder"]),
        (3, False, None, ["encoder denoiser", "denoiser", "denoiser decoder"]),
        (3, False, "decode", ["denoiser", "denoiser", "encoder denoiser decoder"]),
        (2, True, None, ["denoiser", "denoiser", "encoder decoder"]),
        (2, True, "denoise", ["encoder denoiser", "denoiser", "decoder"]),
    ],
)
def test_roles(stages: int, decode_worker: bool, encode_on: str | None, roles: list[str]) -> None:
    plan = video_of(8).plan(block_latents=2, context_latents=1)
    way = BlockArrangement(plan=plan, stages=stages, decode_worker=decode_worker, encode_on=encode_on)
    assert [" ".join(way.placement.roles(rank)) for rank in way.placement.world] == roles
    assert way.num_workers == len(roles)


def test_a_worker_holds_what_its_roles_need() -> None:
    found = predicted(video_of(40), 4, decode_worker=True)
    assert [need.roles for need in found.needs[::4]] == [(Role.DENOISER,), (Role.ENCODER, Role.DECODER)]
    assert found.weight_bytes == (2 * 8000 + 100,) * 4 + (110000,)
    last = predicted(video_of(40), 4)
    assert last.weight_bytes == (2 * 8000 + 100 + 10**5, 16100, 16100, 16100 + 10**4)
    assert last.needs[3].need.working > found.needs[3].need.working, "it decodes while keys and values wait"


# -- the planner --------------------------------------------------------------------------------------------------


def plan_for(video: BlockVideo, num_workers: int, available_bytes: int = 2**40, **asked: Any) -> Any:
    wanted = BlocksAsked(**{"block_latents": 2, "context_latents": 1, **asked})
    predictor = predictor_of(host_bytes_per_s=1e6, memory_bytes_per_s=1e8)
    return make_block_plan(video, num_workers, asked=wanted, available_bytes=available_bytes, predictor=predictor)


def test_every_way_once_and_the_fastest_first() -> None:
    found = plan_for(video_of(40, decode_s=0.1), 4)
    ways = [(p.arrangement.plan.prefix, p.arrangement.decode_worker) for p in found.proposals]
    assert len(ways) == len(set(ways)) == 4
    assert [p.makespan_s for p in found.proposals] == sorted(p.makespan_s for p in found.proposals)
    assert found.best.arrangement.plan.prefix is Prefix.CACHE
    assert found.best.arrangement.stages == 4
    assert not found.refusals


def test_stages_that_are_no_use_are_left_out() -> None:
    """Two blocks, one pass: two stages. The third and fourth would only wait."""
    found = plan_for(video_of(4, steps=30), 4)
    assert found.best.arrangement.num_workers == 2
    assert any("More than 2 stages bring little" in remark for remark in remarks(found.best, 4))
    assert any("2 workers have nothing to do" in remark for remark in remarks(found.best, 4))


def test_what_does_not_fit_is_refused_with_figures_and_makes_room() -> None:
    roomy = plan_for(video_of(40), 4, prefix=Prefix.CACHE)
    most = max(max(p.peak_bytes) for p in roomy.proposals)
    tight = plan_for(video_of(40), 4, available_bytes=most - 1, prefix=Prefix.CACHE)
    storages = {p.arrangement.storage for p in tight.proposals}
    assert storages > {Storage.INT8}
    nothing = plan_for(video_of(40), 4, available_bytes=GIB // 2)
    assert not nothing.proposals
    assert all("a worker with" in refusal.reason for refusal in nothing.refusals)
    assert {refusal.what.split(", ")[0] for refusal in nothing.refusals} == {"dualparal"}


def test_what_was_asked_for_is_kept() -> None:
    found = plan_for(video_of(40), 3, prefix=Prefix.RERUN, compat=True)
    assert {(p.arrangement.plan.prefix, p.arrangement.plan.compat) for p in found.proposals} == {(Prefix.RERUN, True)}
    assert "--dualparal-compat" in found.best.arrangement.flags()
    stored = plan_for(video_of(40), 3, storage=Storage.HOST)
    assert {p.arrangement.storage for p in stored.proposals} == {Storage.HOST}
    assert stored.best.arrangement.flags()[-2:] == ["--context-storage", "host"]


def test_more_workers_than_layers() -> None:
    found = plan_for(video_of(80, layers=2), 8)
    assert max(p.arrangement.stages for p in found.proposals) == 2
    assert any("2 layers" in refusal.reason for refusal in found.refusals)


def test_rivals_say_what_they_lack() -> None:
    (video,) = wan(num_frames=1025, count=1)
    durations_of = predicted_by(predictor_of(linear_per_s=1e14, attention_per_s=1e14, convolution_per_s=1e14))
    rivals = find_rivals(video, 8, available_bytes=24 * GIB, durations_of=durations_of)
    assert [rival.name for rival in rivals] == ["one device", "Ulysses on 8", "Ring on 8"]
    one, ulysses, ring = rivals
    assert one.lacks_bytes == max(one.proposal.peak_bytes) - 24 * GIB > 0
    assert ulysses.lacks_bytes == ring.lacks_bytes == 0
    assert one.proposal.makespan_s > 5 * ulysses.proposal.makespan_s
    assert ulysses.proposal.prediction.first_frames_s < ulysses.proposal.makespan_s


def test_it_is_never_chosen_unasked() -> None:
    """The planner of `auto` knows no such arrangement."""
    (video,) = wan(num_frames=161, count=1)
    found = make_plan([video], 2, available_bytes=80 * GIB, durations_of=predicted_by(predictor_of()))
    assert found.proposals
    assert not any(isinstance(proposal.arrangement, BlockArrangement) for proposal in found.proposals)


def test_features_are_what_the_plan_says() -> None:
    """Control for the count of neighbours: an op at either end of the video has one fewer."""
    video = video_of(40)
    plan = video.plan(block_latents=2, context_latents=1)
    durations = BlockDurations(
        predictor_of(attention_per_s=ATTENTION, linear_per_s=FAST), video, BlockArrangement(plan=plan, stages=1)
    )
    for op in (Op(0, 0), Op(0, 1), Op(3, 0), Op(3, 2), Op(19, 5)):
        given = sum(d.latents for d in plan.dependencies(op) if d.kind is Kind.FEATURES)
        assert durations.op_s(0, op) == pytest.approx(LAYERS * 2 * (2 + given))
