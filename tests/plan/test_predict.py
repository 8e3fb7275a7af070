"""Predictions: what must grow, shrink or stay, and figures that can be worked out by hand."""

import dataclasses
from typing import Any

import pytest

from pipedit.core.errors import InvalidRequestError
from pipedit.core.messages import Aco
from pipedit.core.parallel import ParallelConfig
from pipedit.plan.costs import Operations, PartBytes, RequestCost, SharedAttention, TransformerCost
from pipedit.plan.hardware import Cluster, Device, Link
from pipedit.plan.predict import OURS, Implementation, Overlap, Predictor

TOKENS, HEADS, DIM, SITES = 800, 8, 4, 2
HIDDEN = HEADS * DIM
IDEAL = Implementation(overlap=Overlap.FULL, passes=0, request_s=0, hidden_cost=0, chunk_s=0, helper_s=0, ring_loss=0)
DEVICE = Device(
    name="abacus",
    title="",
    memory_bytes=1,
    linear_per_s=1e6,
    attention_per_s=1e6,
    convolution_per_s=1e5,
    memory_bytes_per_s=1e6,
    host_bytes_per_s=1e6,
    layer_overhead_s=1e-9,
)


def make_cost(**changes: Any) -> RequestCost:
    attention = SharedAttention(
        sites=SITES,
        heads=HEADS,
        head_dim=DIM,
        operations=SITES * 4 * TOKENS**2 * HIDDEN,
        projections=SITES * 6 * TOKENS * HIDDEN**2,
        element=2,
    )
    layer = Operations(linear=24 * TOKENS * HIDDEN**2, attention=4 * TOKENS**2 * HIDDEN)
    cost = RequestCost(
        num_steps=10,
        num_chunks=4,
        forwards_per_step=1,
        latent_tokens=TOKENS,
        text_tokens=0,
        latent_bytes=1000,
        encode=Operations(linear=10**6),
        forward=TransformerCost(front=Operations(), layers=(layer,) * SITES, back=Operations()),
        decode_first_chunk=Operations(convolution=10**5),
        decode_chunk=Operations(convolution=3 * 10**5),
        decode_last_chunk=Operations(convolution=2 * 10**5),
        parts={"text_encoder": PartBytes(weights=100, working=0), "vae": PartBytes(weights=100, working=0)},
        attention=attention,
    )
    return dataclasses.replace(cost, **changes)


def make_predictor(implementation: Implementation = IDEAL, rate: float = 1e5, **changes: Any) -> Predictor:
    link = Link(name="wire", title="", bytes_per_s=rate, latency_s=0.0)
    cluster = Cluster(device=dataclasses.replace(DEVICE, **changes), num_devices=8, link=link)
    return Predictor(cluster, implementation)


COST = make_cost()
LINEAR_S = SITES * 24 * TOKENS * HIDDEN**2 / 1e6
ATTENTION_S = SITES * 4 * TOKENS**2 * HIDDEN / 1e6


def test_one_device_does_everything_alone() -> None:
    step = make_predictor().step(COST, ParallelConfig())
    assert step.linear_s == pytest.approx(LINEAR_S)
    assert step.attention_s == pytest.approx(ATTENTION_S)
    assert (step.exchange_s, step.exposed_s, step.exchanged_bytes) == (0, 0, 0)
    assert step.total_s == pytest.approx(LINEAR_S + ATTENTION_S)


def test_ulysses_divides_work_and_exchanges_bytes() -> None:
    step = make_predictor().step(COST, ParallelConfig(ulysses_degree=4, pipesp_chunks=1))
    # Of each of q, k, v and the result, a rank gets 3/4 of its heads' rows from others: a quarter of all.
    num_bytes = SITES * 4 * TOKENS * HIDDEN * 2 * 3 / 16
    assert step.linear_s == pytest.approx(LINEAR_S / 4)
    assert step.attention_s == pytest.approx(ATTENTION_S / 4)
    assert step.exchanged_bytes == num_bytes
    assert step.exposed_s == pytest.approx(step.exchange_s) == pytest.approx(num_bytes / 1e5)


def test_the_largest_share_of_heads_decides() -> None:
    plain = ParallelConfig(ulysses_degree=3, pipesp_chunks=1)
    uneven = make_predictor().step(COST, plain)
    padded = make_predictor(dataclasses.replace(IDEAL, pads_heads=True)).step(COST, plain)
    assert uneven.attention_s == padded.attention_s == pytest.approx(ATTENTION_S * 3 / 8)


def test_chunks_hide_the_exchange_and_never_more_than_all_of_it() -> None:
    predictor = make_predictor()
    plain, *chunked = (
        predictor.step(COST, ParallelConfig(ulysses_degree=2, pipesp_chunks=chunks)) for chunks in (1, 2, 4)
    )
    assert plain.exposed_s > chunked[0].exposed_s >= chunked[1].exposed_s >= 0
    assert plain.exchange_s == chunked[0].exchange_s
    best = predictor.step(COST, ParallelConfig(ulysses_degree=2))
    assert best.total_s == min(step.total_s for step in chunked)


def test_a_slow_link_cannot_be_hidden() -> None:
    step = make_predictor(rate=1e2).step(COST, ParallelConfig(ulysses_degree=2))
    assert step.exposed_s > 0.5 * step.exchange_s > step.attention_s


@pytest.mark.parametrize("overlap", [Overlap.OUTPUTS, Overlap.OUTPUTS_AND_PROJECTIONS])
def test_the_papers_overlaps_hide_less_than_ours(overlap: Overlap) -> None:
    config = ParallelConfig(ulysses_degree=4, pipesp_chunks=2)
    theirs = make_predictor(dataclasses.replace(IDEAL, overlap=overlap), rate=1e4).step(COST, config)
    ours = make_predictor(rate=1e4).step(COST, config)
    plain = make_predictor(rate=1e4).step(COST, dataclasses.replace(config, pipesp_chunks=1))
    assert ours.exposed_s < theirs.exposed_s < plain.exposed_s


def test_helpers_take_attention_and_no_linear_work() -> None:
    predictor = make_predictor(rate=1e9)
    config = ParallelConfig(ulysses_degree=3, pipesp_chunks=1)
    helped = predictor.step(COST, config, Aco(helpers=((3,),), heads=(2, 2, 2, 2), text_tokens=(0,)))
    alone = predictor.step(COST, config)
    assert helped.linear_s == alone.linear_s
    assert helped.attention_s == pytest.approx(ATTENTION_S / 4)
    assert alone.attention_s == pytest.approx(ATTENTION_S * 3 / 8)


def test_a_helper_gets_everything_through_its_own_link() -> None:
    config = ParallelConfig(ulysses_degree=3, pipesp_chunks=1)
    helped = make_predictor().step(COST, config, Aco(helpers=((3,),), heads=(1, 1, 1, 5), text_tokens=(0,)))
    inward, outward = 3 * TOKENS * 5 * DIM * 2, TOKENS * 5 * DIM * 2
    assert helped.exchanged_bytes == SITES * (inward + outward)


def test_a_ring_hides_under_attention_and_loses_by_its_rounds() -> None:
    lossy = dataclasses.replace(IDEAL, ring_loss=0.1)
    config = ParallelConfig(ring_degree=4)
    fast, slow = (make_predictor(lossy, rate=rate).step(COST, config) for rate in (1e9, 1e2))
    assert fast.exposed_s == 0 < fast.exchange_s
    assert fast.attention_s == pytest.approx(ATTENTION_S / 4 * 1.3)
    assert slow.exposed_s == pytest.approx(slow.exchange_s - slow.attention_s)


def test_guidance_ranks_take_a_forward_each() -> None:
    guided = dataclasses.replace(COST, forwards_per_step=2)
    predictor = make_predictor()
    both, halves = (predictor.step(guided, ParallelConfig(cfg_degree=degree)) for degree in (1, 2))
    assert both.linear_s == pytest.approx(2 * halves.linear_s)
    assert halves.exposed_s > 0


def test_a_batch_of_two_has_the_overhead_of_one() -> None:
    predictor = make_predictor(layer_overhead_s=1.0)
    apart, together = (
        predictor.step(make_cost(forwards_per_step=2, forwards_per_call=calls), ParallelConfig()) for calls in (1, 2)
    )
    assert (apart.overhead_s, together.overhead_s) == (2 * SITES, SITES)
    assert apart.attention_s == together.attention_s


def test_masks_slow_attention_down() -> None:
    assert COST.attention is not None
    masked = dataclasses.replace(COST, attention=dataclasses.replace(COST.attention, is_masked=True))
    predictor = make_predictor(masked_attention=0.5)
    assert predictor.step(masked, ParallelConfig()).attention_s == pytest.approx(2 * ATTENTION_S)


def test_decoding() -> None:
    predictor = make_predictor()
    assert [predictor.chunk_s(COST, chunk) for chunk in range(4)] == pytest.approx([1, 3, 3, 2])
    assert predictor.decode_s(COST) == pytest.approx(9)
    assert predictor.decode_s(COST, 3) == pytest.approx(3)
    assert predictor.decode_s(dataclasses.replace(COST, decodes_in_rounds=True), 3) == pytest.approx(3 + 2)


def test_encoding_reads_all_weights() -> None:
    assert make_predictor().encode_s(COST) == pytest.approx(1)
    assert make_predictor(memory_bytes_per_s=10.0).encode_s(COST) == pytest.approx(10)


def test_copies() -> None:
    predictor = make_predictor()
    assert predictor.offload_s(10**6, 8) == pytest.approx(1)
    assert predictor.hand_over_s(10**5) == pytest.approx(0.2 + 1)


def test_what_is_not_declared_is_not_predicted() -> None:
    with pytest.raises(InvalidRequestError, match="does not declare"):
        make_predictor().step(make_cost(attention=None), ParallelConfig())


def test_our_own_constants_are_no_ideal() -> None:
    config = ParallelConfig(ulysses_degree=2)
    assert make_predictor(OURS).step(COST, config).total_s > make_predictor().step(COST, config).total_s
