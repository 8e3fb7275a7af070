"""The training scripts' claims: the judge reads real clips rightly, shortcuts equal the stock classes, runs resume."""

import dataclasses
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

from pipedit.models.random_pipelines import randomise
from training import checkpoint, dit, evaluate, latents, measure, optim, text, vae, world

Clip = np.ndarray


def real_clip(question: evaluate.Question) -> Clip:
    rng = random.Random(question.seed)
    thing = world.sample_thing(
        rng, shape=question.thing.shape, colour=question.thing.colour, motion=question.scene.motion
    )
    video = world.render([dataclasses.replace(question.scene, things=(thing,))], question.num_frames)[0]
    frames: Clip = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
    return frames


# -- the world and the judge --------------------------------------------------------------------------------------


def test_a_quarter_of_the_combinations_is_held_out_and_no_word_is() -> None:
    held, seen = world.combinations(held_out=True), world.combinations(held_out=False)
    assert len(held) * 3 == len(seen)
    for position, words in enumerate((world.SHAPES, world.COLOURS, world.MOTIONS)):
        assert {combination[position] for combination in seen} == set(words)
    scenes = [latents.scene(0, index) for index in range(2000)]
    singles = [scene for scene in scenes if len(scene.things) == 1]
    assert not any(world.is_held_out(s.things[0].shape, s.things[0].colour, s.motion) for s in singles)


def test_the_judge_reads_real_clips_and_refuses_others() -> None:
    asked = evaluate.questions(20)
    assert sum(question.held_out for question in asked) == 5
    clips = [real_clip(question) for question in asked]
    rows = [evaluate.judge(q, measure.measure(clip)) for q, clip in zip(asked, clips, strict=True)]
    assert all(row[name] for row in rows for name in ("colour", "shape", "motion", "background"))
    assert min(row["overlap"] for row in rows) > 0.95
    wrong = [evaluate.judge(q, measure.measure(clip)) for q, clip in zip(asked, clips[3:] + clips[:3], strict=True)]
    assert evaluate.summary(wrong)["colour"] < 0.5
    assert evaluate.summary(wrong)["motion"] < 0.5


def test_the_judge_sees_damage() -> None:
    (question,) = [q for q in evaluate.questions(60) if q.scene.motion == "still" and q.thing.shape == "square"][:1]
    clip = real_clip(question)
    whole = measure.measure(clip).overlap["square"]
    damaged = clip.copy()
    ink = np.abs(clip.astype(int) - clip[0, 0, 0]).sum(-1) > 60
    rows = np.flatnonzero(ink[0].any(1))
    damaged[:, rows[: len(rows) // 2]] = clip[0, 0, 0]  # the upper half is gone
    assert measure.measure(damaged).overlap["square"] < 0.8 * whole
    frozen = np.repeat(clip[:1], len(clip), 0)
    assert measure.measure(frozen).motion == "still"


def test_two_shapes_are_measured_apart() -> None:
    rng = random.Random(4)
    for _ in range(6):
        scene = world.sample_scene(rng, two_shapes=1.0)
        video = world.render([scene], 17)[0]
        frames = ((video.permute(1, 2, 3, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        first, second = scene.things
        seen = measure.measure_pair(frames, (first.colour, second.colour), scene.background)
        assert [s.shape for s in seen] == [first.shape, second.shape]
        assert measure.relation_of(*seen) == scene.relation


def test_every_word_of_a_caption_is_one_token() -> None:
    tokenizer = text.build_tokenizer()
    rng = random.Random(1)
    for index in range(200):
        caption = world.caption(latents.scene(0, index), rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 * caption.count(",") + 1, caption  # a comma is two, the end one
        assert tokenizer.unk_token_id not in ids
    assert tokenizer("A RED Ball").input_ids == tokenizer("a red ball").input_ids


# -- shortcuts equal the stock classes ----------------------------------------------------------------------------


def test_two_chunk_codec_equals_the_stock_one() -> None:
    codec = AutoencoderKLWan(**{**vae.CONFIG, "base_dim": 8}).eval()
    randomise(codec, torch.Generator().manual_seed(0))
    video = torch.rand(1, 3, 9, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.inference_mode():
        mean, log_variance = vae.encode(codec, video)
        stock = codec.encode(video).latent_dist
        assert torch.allclose(mean, stock.mean, atol=1e-4)
        assert torch.allclose(log_variance, stock.logvar, atol=1e-4)
        decoded = vae.decode(codec, mean).clamp(-1, 1)
        assert torch.allclose(decoded, codec.decode(mean).sample, atol=1e-4)
        assert not torch.allclose(decoded[:, :, 1:], codec.decode(mean.flip(2)).sample[:, :, 1:], atol=1e-2)


@pytest.mark.parametrize("length", [16, 64])
def test_one_biased_zero_equals_any_number_of_zeros(length: int) -> None:
    """The padding that training shows is the padding that WanPipeline makes."""
    model = dit.build_transformer()
    randomise(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    words = torch.randn(1, 5, text.TEXT_DIM, generator=generator)
    noisy = torch.randn(1, 8, 2, 8, 8, generator=generator)
    time = torch.tensor([500.0])
    with torch.inference_mode():
        padded = torch.cat([words, torch.zeros(1, length - 5, text.TEXT_DIM)], 1)
        stock = model(noisy, time, padded, return_dict=False)[0]
        cross = dit.PaddedCrossAttention()
        for block in model.blocks:
            block.attn2.set_processor(cross)
        cross.bias = torch.zeros(1, 1, 1, 6)
        cross.bias[..., 5] = math.log(length - 5)
        short = torch.cat([words, torch.zeros(1, 1, text.TEXT_DIM)], 1)
        biased = model(noisy, time, short, return_dict=False)[0]
        cross.bias = torch.zeros(1, 1, 1, 6)
        unbiased = model(noisy, time, short, return_dict=False)[0]
    assert torch.allclose(stock, biased, atol=1e-4)
    assert not torch.allclose(stock, unbiased, atol=1e-3)


# -- runs resume --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch on rms_norm under autocast
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit, "CONFIG", {**dit.CONFIG, "num_layers": 1, "num_attention_heads": 2, "ffn_dim": 64})
    monkeypatch.setattr(dit, "BATCHES", ((3, 2, 1.0),))
    state = {"latents": torch.randn(8, 8, 13, 8, 8).half(), "seed": 0, "mean": torch.zeros(8), "std": torch.ones(8)}
    for name in ("whole", "resumed"):
        checkpoint.save(tmp_path / name / "latents.pt", state)
    dit.train(tmp_path / "whole", 4, seed=0)
    monkeypatch.setattr(optim, "set_learning_rate", _with_total(optim.set_learning_rate, 4))
    dit.train(tmp_path / "resumed", 2, seed=0)
    dit.train(tmp_path / "resumed", 4, seed=0)
    whole, resumed = (checkpoint.load(tmp_path / name / "dit.pt") for name in ("whole", "resumed"))
    assert whole is not None
    assert resumed is not None
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def _with_total(original, total: int):  # type: ignore[no-untyped-def]
    """The schedule of a run of `total` steps, also where it is cut short."""

    def set_learning_rate(optimizers, step, _total, **options) -> None:  # type: ignore[no-untyped-def]
        original(optimizers, step, total, **options)

    return set_learning_rate
