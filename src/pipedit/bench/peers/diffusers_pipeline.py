"""The peer: the plain diffusers pipeline, used as its documentation shows. Run as a program, never imported.

python diffusers_pipeline.py serve FOLDER SETTINGS   loads once, then answers each line on stdin with seconds
python diffusers_pipeline.py once FOLDER SETTINGS OUT   a minimal script: load, generate, write OUT
SETTINGS is a JSON object: the arguments of the pipeline's call, plus seed, fps, device, dtype, precision, compile.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def load(folder: str, settings: dict[str, Any]) -> Any:
    import torch
    from diffusers import DiffusionPipeline

    parts = {}
    if "HunyuanVideo" in Path(folder, "model_index.json").read_text():
        # The class named in model_index.json rebuilds the tokenizer wrongly under transformers 5.
        from transformers import PreTrainedTokenizerFast

        parts["tokenizer"] = PreTrainedTokenizerFast.from_pretrained(folder, subfolder="tokenizer")
    settings.pop("dtype")
    precision = {name: getattr(torch, dtype) for name, dtype in settings.pop("precision").items()}
    dtypes = {**precision, "text_encoder_2": precision["text_encoder"], "transformer_2": precision["transformer"]}
    pipe = DiffusionPipeline.from_pretrained(folder, dtype={**dtypes, "default": torch.float32}, **parts)
    pipe.to(settings.pop("device"))
    if settings.pop("compile"):
        for name in ("transformer", "transformer_2"):
            if getattr(pipe, name, None) is not None:
                getattr(pipe, name).compile_repeated_blocks(fullgraph=True)
    return pipe


def generate(pipe: Any, settings: dict[str, Any]) -> Any:
    import torch

    arguments = dict(settings)
    generator = torch.Generator("cpu").manual_seed(arguments.pop("seed"))
    arguments.pop("fps", None)
    return pipe(**arguments, generator=generator, output_type="np").frames[0]


def serve(folder: str, settings: dict[str, Any]) -> None:
    pipe = load(folder, settings)
    pipe.set_progress_bar_config(disable=True)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        frames = (generate(pipe, settings) * 255).round().astype("uint8")
        print(json.dumps({"seconds": time.perf_counter() - start, "frames": len(frames)}), flush=True)


def once(folder: str, settings: dict[str, Any], out: str) -> None:
    import av

    pipe = load(folder, settings)
    frames = (generate(pipe, settings) * 255).round().astype("uint8")
    with av.open(out, "w") as container:
        stream = container.add_stream("libx264", rate=round(settings["fps"]))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    command, model_folder, text = sys.argv[1:4]
    if command == "serve":
        serve(model_folder, json.loads(text))
    else:
        once(model_folder, json.loads(text), sys.argv[4])
