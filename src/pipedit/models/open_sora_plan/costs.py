"""What a request costs on the published Open-Sora-Plan v1.3, without the model itself."""

from collections.abc import Mapping
from typing import Any

from pipedit.models.open_sora_plan import text_costs, transformer_costs, vae_costs
from pipedit.plan.costs import PartBytes, RequestCost, SharedAttention

ELEMENT_BYTES = 2  # bfloat16 and float16 throughout, as published
TEXT_TOKENS = 512
PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "transformer": {
        "attention_head_dim": 96,
        "caption_channels": 4096,
        "cross_attention_dim": 2304,
        "in_channels": 8,
        "num_attention_heads": 24,
        "num_layers": 32,
        "out_channels": 8,
        "patch_size": 2,
        "patch_size_t": 1,
        "sparse1d": True,
        "sparse_n": 4,
    },
    "text_encoder": {
        "d_ff": 10240,
        "d_kv": 64,
        "d_model": 4096,
        "feed_forward_proj": "gated-gelu",
        "num_heads": 64,
        "num_layers": 24,
        "relative_attention_num_buckets": 32,
        "vocab_size": 250112,
    },
    # With these energies and connections the decoder has the 108.4 M parameters that it is known to have.
    "vae": {
        "base_channels": 128,
        "connect_res_layer_num": 1,
        "decoder_energy_flow_hidden_size": 128,
        "decoder_num_resblocks": 2,
        "latent_dim": 8,
        "use_attention": True,
    },
}
"""Component -> config, as far as costs depend on it. Values as in the published code and scripts."""
_FRAME_STEP, _SPACE, _PATCH = 4, 8, 2


def request_cost(
    *, width: int, height: int, num_frames: int, num_steps: int, text_tokens: int = TEXT_TOKENS, guided: bool = True
) -> RequestCost:
    """A video of `num_frames` = 4 n + 1 frames; both forwards of a guided step run as one batch."""
    frames, rows, columns = (num_frames - 1) // _FRAME_STEP + 1, height // _SPACE, width // _SPACE
    tokens = frames * (rows // _PATCH) * (columns // _PATCH)
    shape = transformer_costs.TransformerShape.from_config(dict(PUBLISHED["transformer"]))
    vae, forwards = dict(PUBLISHED["vae"]), 2 if guided else 1
    chunks = _chunks(frames)
    first, middle, last = (
        vae_costs.chunk_operations(vae, frames=chunk, total=frames, rows=rows, columns=columns)
        for chunk in (chunks[0], chunks[min(1, len(chunks) - 1)], chunks[-1])
    )
    return RequestCost(
        num_steps=num_steps,
        num_chunks=len(chunks),
        forwards_per_step=forwards,
        forwards_per_call=forwards,
        latent_tokens=tokens,
        text_tokens=text_tokens,
        latent_bytes=3 * vae["latent_dim"] * frames * rows * columns * 4,  # latents, prediction, and fresh noise
        encode=text_costs.mt5_operations(dict(PUBLISHED["text_encoder"]), text_tokens).times(forwards),
        forward=transformer_costs.transformer_cost(shape, tokens=tokens, text_tokens=text_tokens),
        decode_first_chunk=first,
        decode_chunk=middle,
        decode_last_chunk=last if len(chunks) > 1 else None,
        parts=_parts(shape, tokens=tokens, text_tokens=text_tokens, rows=rows, columns=columns),
        attention=_shared_attention(shape, tokens),
    )


def _chunks(frames: int) -> list[range]:
    """The first latent frame alone, then so many at a time."""
    starts = range(1, frames, vae_costs.CHUNK)
    return [range(1), *(range(start, min(start + vae_costs.CHUNK, frames)) for start in starts)]


def _shared_attention(shape: transformer_costs.TransformerShape, tokens: int) -> SharedAttention:
    return SharedAttention(
        sites=shape.layers,
        heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        operations=sum(
            transformer_costs.self_attention_operations(shape, tokens=tokens, layer=layer)
            for layer in range(shape.layers)
        ),
        projections=shape.layers * 2 * tokens * 3 * shape.hidden**2,
        element=ELEMENT_BYTES,
        is_masked=True,
    )


def _parts(
    shape: transformer_costs.TransformerShape, *, tokens: int, text_tokens: int, rows: int, columns: int
) -> dict[str, PartBytes]:
    text, vae = dict(PUBLISHED["text_encoder"]), dict(PUBLISHED["vae"])
    return {
        "text_encoder": PartBytes(
            weights=text_costs.mt5_parameters(text) * ELEMENT_BYTES,
            working=text_costs.mt5_working_bytes(text, tokens=text_tokens, element=ELEMENT_BYTES),
        ),
        "transformer": PartBytes(
            weights=transformer_costs.transformer_parameters(shape) * ELEMENT_BYTES,
            working=transformer_costs.transformer_working_bytes(
                shape, tokens=tokens, text_tokens=text_tokens, element=ELEMENT_BYTES
            ),
        ),
        "vae": PartBytes(
            weights=vae_costs.decoder_parameters(vae) * ELEMENT_BYTES,
            working=vae_costs.decode_working_bytes(
                vae, frames=vae_costs.CHUNK + 1, rows=rows, columns=columns, element=ELEMENT_BYTES
            ),
        ),
    }
