"""`pipedit generate`: the flags, and the way from them to files and a report."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipedit.cli.console import session_of
from pipedit.cli.options import default, option, switch

if TYPE_CHECKING:
    from pipedit.engine.engine import Engine
    from pipedit.engine.settings import EngineSettings

_WHAT, _SAMPLING, _RUN, _OUTPUT = "What to show", "How it is sampled", "How it runs", "Output"
EPILOG = """
[bold]Examples[/bold]

pipedit generate "a red ball moves right" -o ball.mp4

pipedit generate --prompt-file prompts.txt -o "clips/{index}.mp4"

pipedit generate --like ball.mp4 --seed 7 -o other.gif

pipedit generate "waves at dusk" --model wan2.1-t2v-1.3b --trace trace.json

[dim]Flags win over lines of a prompt file, those over --like, and that over the model's defaults.[/dim]

[dim]--num_frames is --num-frames. Exit codes: 0 done, 1 failed, 2 wrong input, 130 interrupted.[/dim]
"""


def open_engine(settings: "EngineSettings") -> "Engine":
    """The engine of everyday use; tests bring another one."""
    from pipedit.engine.engine import Engine

    return Engine.of(settings)


def generate(
    typer_context: typer.Context,
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT", hidden=True)] = None,
    prompt_file: Annotated[
        str | None,
        option(
            "--prompt-file",
            panel=_WHAT,
            metavar="FILE",
            help="One prompt a line, - is stdin; .jsonl: an object a line with [b]prompt[/b], settings, [b]output[/b].",
        ),
    ] = None,
    like: Annotated[
        str | None,
        option("--like", panel=_WHAT, metavar="FILE", help="Prompt, model and settings of a file that pipedit made."),
    ] = None,
    model: Annotated[
        str | None,
        option("--model", "-m", panel=_WHAT, metavar="M", help=f"Name, folder or hub id. {default('tiny')}"),
    ] = None,
    negative_prompt: Annotated[
        str | None, option("--negative-prompt", panel=_WHAT, metavar="TEXT", help="What it should not show.")
    ] = None,
    prompts_at: Annotated[
        str | None,
        option(
            "--prompts-at",
            panel=_WHAT,
            metavar="TIMES",
            help='Later prompts of a long video, with dualparal: \'30s:"a blue ball",60s:"snow"\'; without s, frames.',
        ),
    ] = None,
    num_frames: Annotated[
        int | None, option("--num-frames", panel=_WHAT, metavar="N", help="Frames, 4n+1 for most models.")
    ] = None,
    height: Annotated[int | None, option("--height", panel=_WHAT, metavar="PIXELS", help="Height of a frame.")] = None,
    width: Annotated[int | None, option("--width", panel=_WHAT, metavar="PIXELS", help="Width of a frame.")] = None,
    fps: Annotated[
        float | None, option("--fps", panel=_WHAT, metavar="R", help="Frames per second of the file.")
    ] = None,
    seed: Annotated[
        int | None,
        option("--seed", panel=_SAMPLING, metavar="K", help=f"The same seed, the same video. {default('random')}"),
    ] = None,
    num_inference_steps: Annotated[
        int | None, option("--num-inference-steps", panel=_SAMPLING, metavar="S", help="Denoising steps.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        option("--guidance-scale", panel=_SAMPLING, metavar="G", help="How closely to follow the prompt."),
    ] = None,
    guidance_scale_2: Annotated[
        float | None,
        option("--guidance-scale-2", panel=_SAMPLING, metavar="G", help="The same for Wan 2.2's low-noise expert."),
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        option("--true-cfg-scale", panel=_SAMPLING, metavar="G", help="HunyuanVideo's guidance with two passes."),
    ] = None,
    flow_shift: Annotated[
        float | None, option("--flow-shift", panel=_SAMPLING, metavar="X", help="Shift of the noise schedule.")
    ] = None,
    max_sequence_length: Annotated[
        int | None,
        option("--max-sequence-length", panel=_SAMPLING, metavar="N", help="Tokens that a prompt may have."),
    ] = None,
    device: Annotated[
        str | None,
        option("--device", panel=_RUN, metavar="D", help=f"auto, cpu, cuda or cuda:N. {default('auto')}"),
    ] = None,
    dtype: Annotated[
        str | None,
        option("--dtype", panel=_RUN, metavar="T", help="auto, float32, bfloat16, float16."),
    ] = None,
    vae_use_tiling: Annotated[
        bool, switch("--vae-use-tiling", panel=_RUN, help="Decode in tiles: less memory, faint seams.")
    ] = False,
    enable_torch_compile: Annotated[
        bool, switch("--enable-torch-compile", panel=_RUN, help="Compile the layers first: pays in long runs.")
    ] = False,
    num_workers: Annotated[
        int | None,
        option(
            "--num-workers",
            "--num-gpus",
            panel=_RUN,
            metavar="N",
            help=f"Workers that share each video; pipedit doctor --num-workers N lists the ways. {default('1')}",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        option(
            "--strategy",
            panel=_RUN,
            metavar="S",
            help="colocated: every worker does everything; disaggregated: some denoise, others decode meanwhile; "
            "dualparal: long videos block by block, each worker with some of the layers. "
            f"{default('auto')}",
        ),
    ] = None,
    denoise_workers: Annotated[
        int | None,
        option("--denoise-workers", panel=_RUN, metavar="A", help="Of disaggregated workers, those that denoise."),
    ] = None,
    decode_workers: Annotated[
        int | None,
        option("--decode-workers", panel=_RUN, metavar="B", help="And those that decode."),
    ] = None,
    encode_on: Annotated[
        str | None,
        option(
            "--encode-on",
            panel=_RUN,
            metavar="GROUP",
            help=f"denoise or decode: where prompts are encoded. {default('by memory')}",
        ),
    ] = None,
    aco: Annotated[
        str | None,
        option(
            "--aco",
            panel=_RUN,
            metavar="A",
            help=f"on, off: idle decode workers help with attention; auto: where that is faster. {default('auto')}",
        ),
    ] = None,
    decode: Annotated[
        str | None,
        option(
            "--decode",
            panel=_RUN,
            metavar="D",
            help=f"spread: colocated workers decode together; serial: one of them does. {default('spread')}",
        ),
    ] = None,
    offload: Annotated[
        bool, switch("--offload", panel=_RUN, help="Keep weights in host memory while they are not used: slow, small.")
    ] = False,
    block_size: Annotated[
        int | None,
        option("--block-size", panel=_RUN, metavar="N", help=f"dualparal: latent frames in a block. {default('8')}"),
    ] = None,
    context: Annotated[
        int | None,
        option(
            "--context",
            panel=_RUN,
            metavar="N",
            help=f"dualparal: latent frames of each neighbour that a block sees. {default('a whole block')}",
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        option(
            "--prefix",
            panel=_RUN,
            metavar="P",
            help=f"dualparal: cache what a block sees of the one before, or rerun it. {default('cache')}",
        ),
    ] = None,
    context_storage: Annotated[
        str | None,
        option(
            "--context-storage",
            panel=_RUN,
            metavar="S",
            help=f"dualparal: where that waits: device, host, or int8, which rounds. {default('device')}",
        ),
    ] = None,
    dualparal_compat: Annotated[
        bool, switch("--dualparal-compat", panel=_RUN, help="As the released code does it; needs --prefix rerun.")
    ] = False,
    hardware: Annotated[
        str | None,
        option(
            "--hardware",
            panel=_RUN,
            metavar="FILE",
            help="What auto predicts with: a file of pipedit profile, or a name that pipedit plan knows.",
        ),
    ] = None,
    cfg_degree: Annotated[
        int | None,
        option(
            "--cfg-degree",
            "--cfg-parallel-size",
            panel=_RUN,
            metavar="C",
            help=f"2: both predictions of guidance at a time. {default('chosen')}",
        ),
    ] = None,
    ring_degree: Annotated[
        int | None,
        option("--ring-degree", panel=_RUN, metavar="R", help=f"Groups that pass keys round. {default('chosen')}"),
    ] = None,
    ulysses_degree: Annotated[
        int | None,
        option("--ulysses-degree", panel=_RUN, metavar="U", help=f"Workers that deal heads. {default('chosen')}"),
    ] = None,
    pipesp_chunks: Annotated[
        str | None,
        option(
            "--pipesp-chunks",
            panel=_RUN,
            metavar="N",
            help=f"Exchange heads in N parts while attention runs, 1: all at once. {default('auto')}",
        ),
    ] = None,
    output: Annotated[
        str | None,
        option(
            "--output",
            "-o",
            panel=_OUTPUT,
            metavar="FILE",
            help="Ends in .mp4, .gif, .npy, .png, or is a folder/ for frames. Several prompts: out-1.mp4, out-2.mp4 "
            "..., or put {index} and {seed} into the name. Without it, a name made from the prompt.",
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        option(
            "--checkpoint", panel=_OUTPUT, metavar="DIR", help="dualparal: save the run there, to go on if it stops."
        ),
    ] = None,
    checkpoint_every: Annotated[
        int | None,
        option(
            "--checkpoint-every",
            panel=_OUTPUT,
            metavar="K",
            help=f"So many passes over the blocks in flight between two savings. {default('10')}",
        ),
    ] = None,
    resume: Annotated[
        str | None,
        option("--resume", panel=_OUTPUT, metavar="DIR", help="Go on with the run that was saved there, as it was."),
    ] = None,
    overwrite: Annotated[
        bool, switch("--overwrite", "-y", panel=_OUTPUT, help="Replace files that exist; else they are an error.")
    ] = False,
    trace: Annotated[
        str | None,
        option("--trace", panel=_OUTPUT, metavar="FILE", help="Write a timeline for Perfetto and pipedit trace."),
    ] = None,
    as_json: Annotated[  # noqa: ARG001 - known before the flags are read, see app.run
        bool, switch("--json", panel=_OUTPUT, help="Print one JSON document instead of paths.")
    ] = False,
    quiet: Annotated[bool, switch("--quiet", "-q", panel=_OUTPUT, help="Nothing on stderr but errors.")] = False,
) -> None:
    """Make a video from each PROMPT, given in quotes, and print the names of the files."""
    if _has_served(num_workers):
        return
    from pipedit.cli.checkpoints import CheckpointFlags
    from pipedit.cli.order import Order, make_plan

    session = session_of(typer_context)
    session.terminal.quiet = quiet
    if not session.terminal.is_live or quiet:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # before huggingface_hub is imported and reads it
    request_flags = {
        "negative_prompt": negative_prompt,
        "prompts_at": prompts_at,
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "fps": fps,
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "true_cfg_scale": true_cfg_scale,
        "flow_shift": flow_shift,
        "max_sequence_length": max_sequence_length,
    }
    engine_flags = {
        "model": model,
        "device": device,
        "dtype": dtype,
        "vae_tiling": vae_use_tiling or None,
        "compile_layers": enable_torch_compile or None,
        "num_workers": num_workers,
        "strategy": strategy,
        "denoise_workers": denoise_workers,
        "decode_workers": decode_workers,
        "encode_on": encode_on,
        "aco": aco,
        "decode": decode,
        "offload": offload or None,
        "block_size": block_size,
        "context": context,
        "prefix": prefix,
        "context_storage": context_storage,
        "dualparal_compat": dualparal_compat or None,
        "hardware": hardware,
        "cfg_degree": cfg_degree,
        "ring_degree": ring_degree,
        "ulysses_degree": ulysses_degree,
        "pipesp_chunks": None if pipesp_chunks is None else _count_or_word(pipesp_chunks),
    }
    order = Order(
        prompts=tuple(prompts or ()),
        prompt_file=prompt_file,
        like=like,
        request_flags=_given(request_flags),
        engine_flags=_given(engine_flags),
        output=output,
        trace=trace,
        overwrite=overwrite,
        checkpoint=CheckpointFlags(folder=checkpoint, every=checkpoint_every, resume=resume),
    )
    if _looks_unquoted(order.prompts):
        session.terminal.note(f"{len(order.prompts)} prompts of one word each; put quotes around a longer prompt")
    plan = make_plan(order)
    from pipedit.cli.fulfil import fulfil

    fulfil(session, plan, like=like, trace=trace)


def _has_served(num_workers: int | None) -> bool:
    """Whether this process is one of a launcher's ranks that only serve the first one, and has done so."""
    from pipedit.executor.launched import find_launch, follow

    launch = find_launch() if num_workers != 1 else None
    if launch is None or launch.rank == 0:
        return False
    follow(launch)
    return True


def _given(flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _count_or_word(text: str) -> int | str:
    """What is no number is judged with everything else."""
    try:
        return int(text)
    except ValueError:
        return text


def _looks_unquoted(prompts: Sequence[str]) -> bool:
    """pipedit generate a red ball"""
    return len(prompts) > 2 and not any(any(c.isspace() for c in prompt.strip()) for prompt in prompts)
