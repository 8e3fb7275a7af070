"""Open-Sora-Plan's costs against what is known of it: parameters, tokens, and counts by hand."""

import pytest

from pipedit.models.open_sora_plan import text_costs, transformer_costs, vae_costs
from pipedit.models.open_sora_plan.costs import PUBLISHED, request_cost

DIT = transformer_costs.TransformerShape.from_config(dict(PUBLISHED["transformer"]))
# Counted in recorded state dicts of the reference code with these configs.
TINY_DIT = {
    "num_layers": 5,
    "num_attention_heads": 4,
    "attention_head_dim": 12,
    "caption_channels": 40,
    "in_channels": 8,
    "sparse1d": True,
    "sparse_n": 4,
}
TINY_VAE = {"base_channels": 8, "latent_dim": 8, "decoder_energy_flow_hidden_size": 8, "connect_res_layer_num": 1}


def test_parameters_are_those_of_the_reference() -> None:
    tiny = transformer_costs.TransformerShape.from_config(TINY_DIT)
    assert transformer_costs.transformer_parameters(tiny) == 225_248
    assert transformer_costs.transformer_parameters(DIT) / 1e9 == pytest.approx(2.772, rel=1e-3)
    assert vae_costs.decoder_parameters(TINY_VAE) == 435_828
    assert vae_costs.decoder_parameters(dict(PUBLISHED["vae"])) / 1e6 == pytest.approx(108.4, rel=1e-3)
    assert text_costs.mt5_parameters(dict(PUBLISHED["text_encoder"])) / 1e9 == pytest.approx(5.7, rel=0.01)


def test_sparse_layers_cost_a_quarter_of_the_dense_ones() -> None:
    layers = [transformer_costs.self_attention_operations(DIT, tokens=1600, layer=layer) for layer in range(DIT.layers)]
    dense = 4 * 1600**2 * 2304
    assert [layer for layer, operations in enumerate(layers) if operations == dense] == [0, 1, 30, 31]
    assert {operations for operations in layers if operations != dense} == {dense // 4}


def test_sparse_layers_pad_to_whole_groups() -> None:
    exact, padded = (transformer_costs.self_attention_operations(DIT, tokens=n, layer=2) for n in (48, 33))
    assert exact == padded == 4 * 4 * 12**2 * 2304


def test_sparse_n_of_one_is_dense() -> None:
    dense = transformer_costs.TransformerShape.from_config({**PUBLISHED["transformer"], "sparse1d": False})
    assert not any(dense.is_sparse(layer) for layer in range(dense.layers))


def test_chunks_add_up_to_the_whole_video_and_their_look_ahead() -> None:
    vae, size = dict(PUBLISHED["vae"]), {"rows": 44, "columns": 60}
    whole = vae_costs.decode_operations(vae, frames=5, **size)
    chunks = [range(1), range(1, 3), range(3, 5)]
    parts = [vae_costs.chunk_operations(vae, frames=chunk, total=5, **size) for chunk in chunks]
    ahead = vae_costs.decode_operations(vae, frames=2, **size).convolution
    ahead -= vae_costs.decode_operations(vae, frames=1, **size).convolution
    assert sum(part.convolution for part in parts) == whole.convolution + 2 * ahead


@pytest.mark.parametrize(("frames", "tokens", "chunks"), [(65, 11_220, 9), (129, 21_780, 17), (1, 660, 1)])
def test_request(frames: int, tokens: int, chunks: int) -> None:
    cost = request_cost(width=480, height=352, num_frames=frames, num_steps=30)
    assert (cost.latent_tokens, cost.num_chunks, cost.forwards_per_step) == (tokens, chunks, 2)
    assert cost.attention is not None
    assert cost.attention.operations + 32 * 4 * tokens * 512 * 2304 == cost.forward.total.attention
    assert cost.decode.total >= cost.decode_first_chunk.total
