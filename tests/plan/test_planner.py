"""The planner: what it proposes can run, what it refuses is explained, and the best is the best."""

import dataclasses
import itertools
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipedit.core.placement import Placement, Role
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.arrangements import Arrangement, Asked, Kind, arrangements
from pipedit.plan.degrees import Wanted, choose
from pipedit.plan.planned_video import PlannedVideo
from pipedit.plan.planner import TIE, Plan, make_plan, predict, ranked
from pipedit.plan.rank_memory import rank_needs
from tests.plan.planned import GIB, Rates, hunyuan, published, rates, slow_decode, wan


def plan(videos: list[PlannedVideo], num_workers: int, *, gib: float = 80, **more: Any) -> Plan:
    return make_plan(
        videos, num_workers, available_bytes=int(gib * GIB), durations_of=more.pop("durations_of", rates), **more
    )


def free_help(arrangement: Arrangement, video: PlannedVideo) -> Rates:
    return dataclasses.replace(rates(arrangement, video), decode_factor=0.1)


def dear_help(arrangement: Arrangement, video: PlannedVideo) -> Rates:
    return dataclasses.replace(rates(arrangement, video), help_s=100.0)


# -- what is enumerated -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.sampled_from([hunyuan, wan]), st.booleans())
def test_every_arrangement_can_run(num_workers: int, model: Any, fewer: bool) -> None:
    videos = model(count=2)
    found = list(arrangements(num_workers, videos, Asked(fewer=fewer)))
    assert len(set(found)) == len(found)
    for arrangement in found:
        placement, parallel = arrangement.placement, arrangement.sharing(videos[0])
        assert parallel.world_size == len(placement.denoisers)
        assert parallel.cfg_degree == 1 or videos[0].uses_guidance
        assert parallel.ulysses_degree <= videos[0].heads
        assert placement.is_disaggregated == (arrangement.kind is Kind.DISAGGREGATED)
        assert arrangement.num_workers == num_workers or (fewer and arrangement.num_workers < num_workers)
        assert arrangement.aco is AcoMode.OFF or (placement.is_disaggregated and parallel.ring_degree == 1)


def test_all_splits_and_both_places_of_the_encoder_are_tried() -> None:
    found = {
        (len(a.placement.denoisers), len(a.placement.decoders), a.encoder, a.aco)
        for a in arrangements(8, hunyuan())
        if a.kind is Kind.DISAGGREGATED
    }
    every = itertools.product(range(1, 8), (Role.DENOISER, Role.DECODER), (AcoMode.OFF, AcoMode.AUTO))
    assert found == {(denoise, 8 - denoise, encoder, aco) for denoise, encoder, aco in every}


def test_what_is_asked_for_is_kept() -> None:
    asked = Asked(
        kinds=frozenset([Kind.DISAGGREGATED]), decode_workers=2, encoder=Role.DECODER, aco=(AcoMode.ON,),
        degrees=Wanted(ulysses_degree=3, pipesp_chunks=2),
    )  # fmt: skip
    found = list(arrangements(8, wan(), asked))
    assert {a.sharing(wan()[0]).describe() for a in found} == {"cfg 2 x ring 1 x ulysses 3"}  # a ring is not helped
    assert {(a.encoder, len(a.placement.decoders)) for a in found} == {(Role.DECODER, 2)}
    assert {(a.aco, a.sharing(wan()[0]).pipesp_chunks) for a in found} == {(AcoMode.ON, 2)}


def test_degrees_may_be_left_to_the_engine() -> None:
    for arrangement in arrangements(8, wan(), Asked(default_degrees=True)):
        assert not arrangement.degrees.given
        denoisers = len(arrangement.placement.denoisers)
        assert arrangement.sharing(wan()[0]) == choose(Wanted(), denoisers, 12, True, wan()[0].cost.latent_tokens)


def test_videos_that_differ_may_each_have_degrees_of_their_own() -> None:
    guided, unguided = wan(count=3), wan(count=2, guidance_scale=1.0)
    proposals = plan([*guided, *unguided], 2).proposals
    best = proposals[0].arrangement
    assert [best.sharing(video).cfg_degree for video in (guided[0], unguided[0])] == [2, 1]
    assert proposals[0].prediction.num_videos == 5


# -- memory -------------------------------------------------------------------------------------------------------


def test_hunyuan_on_eight_cards_of_48_gib() -> None:
    found = plan(hunyuan(), 8, gib=48, durations_of=slow_decode)
    why = {refusal.what: refusal.reason for refusal in found.refusals}
    assert re.match(
        r"129 frames of 1024x576 need about \S+ GiB on a worker with text encoder, transformer, VAE \(\S+ GiB of it "
        r"weights\), 48\.0 GiB are there; tiling the VAE \(--vae-use-tiling\) would make room",
        why["colocated; colocated, one decodes"],
    )
    assert "transformer" in why["disaggregated 1+7, 2+6 (denoisers encode)"]
    best = found.best_of(Kind.DISAGGREGATED)
    assert best is not None
    assert best.split == (Kind.DISAGGREGATED, 7, 1)
    assert best.arrangement.encoder is Role.DECODER
    assert best.arrangement.sharing(hunyuan()[0]).ulysses_degree == 7
    assert found.best_of(Kind.COLOCATED) is None
    assert found.best_of(Kind.OFFLOADED_SERIAL) is not None


def test_a_rank_holds_what_its_roles_need() -> None:
    (video,) = hunyuan()
    parts = video.cost.parts

    def weights(**split: Any) -> list[int]:
        placement = Placement.disaggregated(**split)
        arrangement = Arrangement(kind=Kind.DISAGGREGATED, placement=placement, degrees=Wanted())
        return [need.need.weights for need in rank_needs(arrangement, [video])]

    text = parts["text_encoder"].weights + parts["text_encoder_2"].weights
    transformer, vae = parts["transformer"].weights, parts["vae"].weights
    assert weights(denoise=2, decode=1, encoder=Role.DECODER) == [transformer, transformer, vae + text]
    assert weights(denoise=1, decode=2, encoder=Role.DENOISER) == [transformer + text, vae, vae]
    serial = Arrangement(kind=Kind.SERIAL, placement=Placement.serial_decode(2), degrees=Wanted())
    first, second = rank_needs(serial, [video])
    assert first.need.weights - second.need.weights == vae


def test_helping_needs_room_and_offloading_needs_less() -> None:
    (video,) = hunyuan()
    placement = Placement.disaggregated(denoise=7, decode=1, encoder=Role.DECODER)
    alone, helping = (
        rank_needs(Arrangement(kind=Kind.DISAGGREGATED, placement=placement, degrees=Wanted(), aco=aco), [video])
        for aco in (AcoMode.OFF, AcoMode.AUTO)
    )
    assert helping[0] == alone[0]
    # queries, keys, values and the result of 3 heads of 128 in two bytes, and some room
    least = 4 * 3 * 128 * 2 * video.cost.latent_tokens
    assert least < helping[7].need.working - alone[7].need.working < 2 * least
    whole, offloaded = (
        rank_needs(Arrangement(kind=kind, placement=Placement.colocated(8), degrees=Wanted()), [video])[0]
        for kind in (Kind.COLOCATED, Kind.OFFLOADED)
    )
    assert offloaded.needed_bytes < whole.needed_bytes / 2


def test_two_experts_are_offloaded_one_at_a_time() -> None:
    (video,) = published("wan2.2-t2v-a14b", count=1)
    arrangement = Arrangement(kind=Kind.OFFLOADED, placement=Placement.colocated(8), degrees=Wanted())
    assert rank_needs(arrangement, [video])[0].need.weights == video.cost.parts["transformer"].weights


def test_nothing_fits_into_nothing() -> None:
    found = plan(hunyuan(), 8, gib=1)
    assert found.best is None
    assert {refusal.what.split()[0].rstrip(",") for refusal in found.refusals} >= {"colocated", "disaggregated"}


# -- what is best -------------------------------------------------------------------------------------------------


def test_one_video_is_made_by_all_workers_together() -> None:
    best = plan(wan(count=1), 8).best
    assert best is not None
    assert best.arrangement.kind is Kind.COLOCATED
    assert best.prediction.first_video_s == best.makespan_s


@pytest.mark.parametrize(
    "videos", [hunyuan(count=6), wan(count=6), wan(count=1), hunyuan(count=6, num_inference_steps=5)]
)
@pytest.mark.parametrize("durations_of", [rates, slow_decode])
def test_more_workers_are_never_slower(videos: list[PlannedVideo], durations_of: Any) -> None:
    plans = [plan(videos, n, durations_of=durations_of, asked=Asked(fewer=True)) for n in range(1, 10)]
    times = [found.proposals[0].makespan_s for found in plans]
    assert all(later <= earlier * (1 + 2 * TIE) for earlier, later in itertools.pairwise(times)), times


def test_help_is_proposed_where_it_pays() -> None:
    asked = Asked(kinds=frozenset([Kind.DISAGGREGATED]), denoise_workers=6)
    helped = plan(hunyuan(), 8, asked=asked, durations_of=free_help).proposals[0]
    assert helped.arrangement.aco is AcoMode.AUTO
    unhelped = plan(hunyuan(), 8, asked=asked, durations_of=dear_help).proposals[0]
    assert unhelped.arrangement.aco is AcoMode.OFF


def test_more_decoders_are_taken_where_decoding_takes_longer() -> None:
    few_steps = hunyuan(num_inference_steps=4)

    def decoders(durations_of: Any) -> int:
        best = plan(few_steps, 8, asked=Asked(kinds=frozenset([Kind.DISAGGREGATED])), durations_of=durations_of).best
        assert best is not None
        return best.split[2]

    assert decoders(slow_decode) > decoders(rates)


def test_of_equals_the_simplest_is_best() -> None:
    (video,) = wan(count=1)
    found = plan([video], 1)
    kinds = [proposal.arrangement.kind for proposal in found.proposals]
    assert kinds == [Kind.COLOCATED, Kind.OFFLOADED]
    apart = dataclasses.replace(found.proposals[1].prediction, makespan_s=found.proposals[0].makespan_s * (1 - TIE / 2))
    hardly_faster = dataclasses.replace(found.proposals[1], prediction=apart)
    assert ranked([hardly_faster, found.proposals[0]])[0] == found.proposals[0]


def test_the_proposals_are_the_best_of_all() -> None:
    """What is left out after the first guess would not have been better."""
    videos = hunyuan(count=4, num_inference_steps=8)
    found = plan(videos, 5, durations_of=slow_decode)
    assert found.best is not None
    every = [predict(arrangement, videos, slow_decode).makespan_s for arrangement in arrangements(5, videos)]
    assert found.compared == len(every)
    assert found.best.makespan_s <= min(every) * (1 + 2 * TIE)


def test_many_videos_are_extrapolated() -> None:
    few, many = plan(wan(count=10), 8).proposals[0], plan(wan(count=1000), 8).proposals[0]
    assert many.arrangement == few.arrangement
    assert many.makespan_s == pytest.approx(100 * few.makespan_s, rel=0.01)


# -- what is refused ----------------------------------------------------------------------------------------------


def test_refusals_are_sentences_about_each_reason_once() -> None:
    found = plan(hunyuan(), 1)
    (alone,) = [refusal for refusal in found.refusals if refusal.what == Kind.DISAGGREGATED]
    assert "at least 2" in alone.reason
    reasons = [refusal.reason for refusal in plan(hunyuan(), 8).refusals]
    assert len(set(reasons)) == len(reasons)
    assert any("guidance" in reason for reason in reasons)
    assert not any("guidance" in refusal.reason for refusal in plan(wan(), 8).refusals)
