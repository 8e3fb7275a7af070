"""Trains the tiny model's VAE (`AutoencoderKLWan`): python -m training.vae --out DIR [--steps N]. Resumes by itself."""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan, patchify, unpatchify

from training import checkpoint, optim, world

CONFIG = dict(
    base_dim=24,
    z_dim=8,
    dim_mult=[1, 2, 2],
    num_res_blocks=1,
    attn_scales=[],
    temperal_downsample=[True, True],
    is_residual=True,
    patch_size=2,
    in_channels=12,
    out_channels=12,
    scale_factor_spatial=8,
    scale_factor_temporal=4,
    latents_mean=[0.0] * 8,
    latents_std=[1.0] * 8,
)


def encode(vae: AutoencoderKLWan, video: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance, each [B, C, n, h, w], of a video [B, 3, 1 + 4 (n - 1), H, W].

    The stock class feeds four frames at a time; two chunks (the first frame, then all others) give the same, faster.
    """
    x = patchify(video, patch_size=2)
    cache = [None] * vae._cached_conv_counts["encoder"]
    parts = [x[:, :, :1], x[:, :, 1:]] if x.shape[2] > 1 else [x]
    out = torch.cat([vae.encoder(part, feat_cache=cache, feat_idx=[0]) for part in parts], 2)
    mean, log_variance = vae.quant_conv(out).float().chunk(2, 1)
    return mean, log_variance.clamp(-30, 10)


def decode(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """Video [B, 3, 1 + 4 (n - 1), H, W] of latents [B, C, n, h, w], in two chunks as in `encode`."""
    x = vae.post_quant_conv(latents)
    cache = [None] * vae._cached_conv_counts["decoder"]
    out = vae.decoder(x[:, :, :1], feat_cache=cache, feat_idx=[0], first_chunk=True)
    if x.shape[2] > 1:
        out = torch.cat([out, vae.decoder(x[:, :, 1:], feat_cache=cache, feat_idx=[0])], 2)
    video: torch.Tensor = unpatchify(out.float(), patch_size=2)
    return video


def batch_shape(step: int, total: int) -> tuple[int, int]:
    """Clips and frames of a step: short clips first, seventeen frames at the end."""
    if step < 0.12 * total:
        return 10, 5
    if step < 0.5 * total or step % 2:
        return 8, 9
    return 4, 17


def loss_terms(video: torch.Tensor, output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    weight = 1.0 + 3.0 * mask
    error = output - video
    loss = (error.abs() * weight).mean() / 1.5 + 0.5 * (error.square() * weight).mean()
    loss = loss + 0.5 * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    if video.shape[2] > 1:
        loss = loss + 0.25 * error.diff(dim=2).abs().mean()
    return loss


def train(out: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(**CONFIG)
    for p in vae.parameters():
        if p.ndim == 5:
            p.data = p.data.contiguous(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        vae.quant_conv.bias[CONFIG["z_dim"] :] = -6.0
    edge = {vae.encoder.conv_in.weight, vae.decoder.conv_out.weight, vae.quant_conv.weight, vae.post_quant_conv.weight}
    hidden = [p for p in vae.parameters() if p.ndim >= 4 and p.shape[1] > 1 and p not in edge]
    rest = [p for p in vae.parameters() if not any(p is h for h in hidden)]
    optimizers = optim.make_optimizers(hidden, rest, rest_lr=2e-3, rest_betas=(0.9, 0.98))
    start = 0
    if (state := checkpoint.load(out / "vae.pt")) is not None:
        vae.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start = state["step"]
    log = checkpoint.Log(out / "vae.jsonl", every=20)
    for step in range(start, steps):
        rng = random.Random(f"vae {seed} {step}")
        torch.manual_seed(hash((seed, step)) % 2**31)
        optim.set_learning_rate(optimizers, step, steps, warm_up=40, floor=0.01)
        clips, frames = batch_shape(step, steps)
        scenes = [world.sample_scene(rng, two_shapes=0.2) for _ in range(clips)]
        video, mask = world.render(scenes, frames), world.foreground(scenes, frames)
        with torch.autocast("cpu", torch.bfloat16):
            mean, log_variance = encode(vae, video)
            latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
            # Windows of long videos start in mid-video: their first latent must decode to its last frame.
            skip = rng.randrange(1, mean.shape[2] - 1) if mean.shape[2] > 2 and rng.random() < 0.3 else 0
            output = decode(vae, latents[:, :, skip:])
        video, mask = video[:, :, 4 * skip :], mask[:, :, 4 * skip :]
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        kl_weight = 1e-6 * 100 ** min(step / (0.5 * steps), 1.0)
        loss = loss_terms(video, output, mask) + kl_weight * kl
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        mse = F.mse_loss(output.detach().clamp(-1, 1), video)
        log.add(step, loss=loss.item(), kl=kl.item(), psnr=10 * (4 / mse).log10().item(), norm=norm.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            saved = [o.state_dict() for o in optimizers]
            checkpoint.save(out / "vae.pt", {"model": vae.state_dict(), "optimizers": saved, "step": step + 1})


def load(out: Path) -> AutoencoderKLWan:
    state = checkpoint.load(out / "vae.pt")
    if state is None:
        raise SystemExit(f"{out / 'vae.pt'} is missing: run python -m training.vae --out {out} first")
    vae = AutoencoderKLWan(**CONFIG)
    vae.load_state_dict(state["model"])
    return vae.eval().requires_grad_(False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.seed)
