"""Writes the trained model as an ordinary WanPipeline folder: python -m training.export --out DIR --to FOLDER."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from training import checkpoint, dit, latents, text, vae

# What pipedit takes where a request is silent; a plain diffusers user passes the same values by hand.
DEFAULTS = {
    "height": 64,
    "width": 64,
    "num_frames": 33,
    "fps": 16,
    "num_inference_steps": 20,
    "guidance_scale": 2.5,
    "max_sequence_length": 64,
}


def build_pipeline(out: Path) -> WanPipeline:
    state = checkpoint.load(out / "dit.pt")
    if state is None:
        raise SystemExit(f"{out / 'dit.pt'} is missing: run python -m training.dit --out {out} first")
    tokenizer = text.build_tokenizer()
    transformer = WanTransformer3DModel(**dit.CONFIG)
    encoder = text.build_encoder(len(tokenizer))
    averages: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = state["average"]
    transformer.load_state_dict(averages[0])
    encoder.load_state_dict(averages[1])
    statistics = latents.load(out)
    means = {"latents_mean": statistics["mean"].tolist(), "latents_std": statistics["std"].tolist()}
    codec = AutoencoderKLWan(**{**vae.CONFIG, **means})
    codec.load_state_dict(vae.load(out).state_dict())
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=codec, scheduler=scheduler, transformer=transformer
    )


def export(out: Path, to: Path) -> None:
    """Replaces the folder `to`."""
    pipeline = build_pipeline(out)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        for parameter in module.parameters():
            # Half the size of float32, and three more bits than bfloat16; weights this small fit its range.
            parameter.data = parameter.data.to(torch.float16)
    beside = to.with_name(to.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    pipeline.save_pretrained(beside)
    _name_tokenizer_class(beside)
    (beside / "pipedit.json").write_text(json.dumps({"defaults": DEFAULTS}, indent=2) + "\n")
    shutil.rmtree(to, ignore_errors=True)
    beside.rename(to)


def _name_tokenizer_class(folder: Path) -> None:
    """The class by the name that every version of transformers knows."""
    for file in (folder / "model_index.json", folder / "tokenizer" / "tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--to", type=Path, required=True)
    arguments = parser.parse_args()
    export(arguments.out, arguments.to)
