"""Trains transformer and text encoder together by rectified flow: python -m training.dit --out DIR [--steps N].

Resumes by itself. Needs DIR/latents.pt. The text padding is learned as the real pipeline uses it: embeddings are padded
with zeros that attention does not mask; any number of equal zeros is one zero whose logit carries the logarithm of it.
"""

import argparse
import itertools
import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanAttnProcessor, WanTransformer3DModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import checkpoint, latents, optim, text, world

CONFIG = dict(
    patch_size=[1, 2, 2],
    num_attention_heads=8,
    attention_head_dim=32,
    in_channels=8,
    out_channels=8,
    text_dim=text.TEXT_DIM,
    freq_dim=64,
    ffn_dim=640,
    num_layers=6,
    cross_attn_norm=True,
    qk_norm="rms_norm_across_heads",
    rope_max_seq_len=256,
)
CAPTION_DROPOUT = 0.12
GENERIC_NEGATIVES = ("", "", "blurry, low quality", "bad video", "worst quality, static")
# latent frames, clips in a batch, share of the steps
BATCHES = ((5, 32, 0.45), (9, 18, 0.27), (3, 48, 0.12), (13, 12, 0.16))
MID_VIDEO_WINDOWS = 0.25
# How often a clip is drawn: what is learned last comes more often, two shapes (hardly learned at this size) less.
WHITE, SQUARE, TWO_SHAPES = 1.8, 1.3, 0.4


class PaddedCrossAttention:
    """The stock processor with a bias on the text logits: -inf for no token, log N for N tokens of padding in one."""

    def __init__(self) -> None:
        self.bias: torch.Tensor | None = None  # [B, 1, 1, L]
        self._stock = WanAttnProcessor()

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        assert attention_mask is None, "the bias takes its place"
        output: torch.Tensor = self._stock(attn, hidden_states, encoder_hidden_states, self.bias, rotary_emb)
        return output


def build_transformer() -> WanTransformer3DModel:
    """Fresh weights; output projections start at zero, so that the first steps are calm."""
    model = WanTransformer3DModel(**CONFIG)
    for zero in (model.proj_out, *(block.attn2.to_out[0] for block in model.blocks)):
        nn.init.zeros_(zero.weight)
        nn.init.zeros_(zero.bias)
    return model


def encode_captions(
    encoder: nn.Module, ids: torch.Tensor, mask: torch.Tensor, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zero-padded embeddings [B, L, D] and the logit bias [B, 1, 1, L] that stands for a random padded length."""
    embeddings = encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
    lengths = mask.sum(1)
    padding = torch.tensor([math.exp(rng.uniform(0, math.log(512))) for _ in range(len(ids))])
    bias = torch.zeros(mask.shape)
    bias.masked_fill_(mask == 0, -math.inf)
    bias[torch.arange(len(ids)), lengths] = padding.log()
    return embeddings, bias[:, None, None, :]


def sample_times(count: int) -> torch.Tensor:
    """Noise levels in (0, 1): logit-normal towards noise, where motion is decided; a fifth uniform."""
    normal = torch.sigmoid(1.2 * torch.randn(count) + 0.9)
    return torch.where(torch.rand(count) < 0.2, torch.rand(count), normal)


def clip_weight(scene: world.Scene) -> float:
    """How often the scene is drawn, relative to the others."""
    if len(scene.things) > 1:
        return TWO_SHAPES
    return (WHITE if scene.background == "white" else 1.0) * (SQUARE if scene.things[0].shape == "square" else 1.0)


def sample_batch(
    rng: random.Random, data: dict[str, torch.Tensor], seed: int, up_to: list[float]
) -> tuple[torch.Tensor, list[str]]:
    """Normalised latents [B, C, n, h, w] of equally long windows, and their captions. `up_to`: the clips' weights
    added up."""
    length, count, _ = rng.choices(BATCHES, weights=[share for *_, share in BATCHES])[0]
    windows, captions = [], []
    for index in rng.choices(range(len(up_to)), cum_weights=up_to, k=count):
        total = data["latents"].shape[2]
        start = rng.randint(0, total - length) if rng.random() < MID_VIDEO_WINDOWS else 0
        windows.append(data["latents"][index, :, start : start + length])
        dropped = rng.random() < CAPTION_DROPOUT
        captions.append(rng.choice(GENERIC_NEGATIVES) if dropped else world.caption(latents.scene(seed, index), rng))
    shape = (1, -1, 1, 1, 1)
    return (torch.stack(windows).float() - data["mean"].view(shape)) / data["std"].view(shape), captions


class Average:
    """Exponential moving average of the weights, short at the start."""

    def __init__(self, modules: list[nn.Module], decay: float = 0.9985) -> None:
        self._modules, self._decay = modules, decay
        self.weights = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        for weights, module in zip(self.weights, self._modules, strict=True):
            for name, value in module.state_dict().items():
                weights[name].lerp_(value, 1 - decay)


def train(out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    data = latents.load(out)
    tokenizer = text.build_tokenizer()
    encoder, model = text.build_encoder(len(tokenizer)), build_transformer()
    cross = PaddedCrossAttention()
    for block in model.blocks:
        block.attn2.set_processor(cross)
    hidden = [p for name, p in model.blocks.named_parameters() if p.ndim == 2 and "table" not in name]
    rest = [p for p in (*model.parameters(), *encoder.parameters()) if not any(p is h for h in hidden)]
    optimizers = optim.make_optimizers(hidden, rest, rest_lr=1.5e-3, rest_betas=(0.9, 0.99))
    average = Average([model, encoder])
    data_seed, start = int(data["seed"]), 0
    up_to = list(itertools.accumulate(clip_weight(latents.scene(data_seed, i)) for i in range(len(data["latents"]))))
    if state := checkpoint.load(out / "dit.pt"):
        model.load_state_dict(state["model"])
        encoder.load_state_dict(state["encoder"])
        average.weights = state["average"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    log = checkpoint.Log(out / "dit.jsonl", every=50)
    for step in range(start, steps):
        rng = random.Random(f"dit {seed} {step}")
        torch.manual_seed(hash((seed, step)) % 2**31)
        optim.set_learning_rate(optimizers, step, steps, warm_up=100, floor=0.02)
        clean, captions = sample_batch(rng, data, data_seed, up_to)
        ids, mask = text.tokenize(tokenizer, captions)
        times = sample_times(len(clean))
        noise = torch.randn_like(clean)
        level = times.view(-1, 1, 1, 1, 1)
        # With so few tokens, plain matrix products beat the CPU's flash kernel: 0.7 against 1.1 s a step on one core.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            embeddings, cross.bias = encode_captions(encoder, ids, mask, rng)
            velocity = model((1 - level) * clean + level * noise, 1000 * times, embeddings, return_dict=False)[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*model.parameters(), *encoder.parameters()], 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update(step)
        log.add(step, loss=loss.item(), norm=norm.item())
        if (step + 1) % 250 == 0 or step + 1 == steps:
            checkpoint.save(
                out / "dit.pt",
                {
                    "model": model.state_dict(),
                    "encoder": encoder.state_dict(),
                    "average": average.weights,
                    "optimizers": [o.state_dict() for o in optimizers],
                    "step": step + 1,
                },
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=14000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.seed)
