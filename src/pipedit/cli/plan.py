"""`pipedit plan`: how some workers would make some videos soonest, before anybody rents them. Reads configs only."""

from typing import Annotated

import typer

from pipedit.cli.console import session_of
from pipedit.cli.options import default, option, switch

_WHAT, _WHERE, _RUN, _OUTPUT = "What is to be made", "On which machine", "How it runs", "Output"
EPILOG = """
[bold]Examples[/bold]

pipedit plan --model hunyuanvideo --gpu a6000 --gpus 8 --width 1024 --height 576 --num-frames 129 --prompts 10

pipedit plan --model wan2.1-t2v-14b --cluster cluster.json --prompts 100 --json

pipedit plan --model wan2.1-t2v-1.3b --gpu rtx4090 --num-frames 1025 --prompts 1 --strategy dualparal

[dim]Figures are predicted from the model's operations and bytes and the device's rates; nothing is run.[/dim]
"""


def plan(
    typer_context: typer.Context,
    model: Annotated[
        str | None, option("--model", "-m", panel=_WHAT, metavar="M", help="Name, folder or hub id.")
    ] = None,
    width: Annotated[int | None, option("--width", panel=_WHAT, metavar="PIXELS", help="Width of a frame.")] = None,
    height: Annotated[int | None, option("--height", panel=_WHAT, metavar="PIXELS", help="Height of a frame.")] = None,
    num_frames: Annotated[
        int | None, option("--num-frames", panel=_WHAT, metavar="N", help="Frames, 4n+1 for most models.")
    ] = None,
    num_inference_steps: Annotated[
        int | None,
        option("--num-inference-steps", "--steps", panel=_WHAT, metavar="S", help="Denoising steps."),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        option("--guidance-scale", panel=_WHAT, metavar="G", help="Above 1, most models take two passes a step."),
    ] = None,
    true_cfg_scale: Annotated[
        float | None,
        option("--true-cfg-scale", panel=_WHAT, metavar="G", help="HunyuanVideo's guidance with two passes."),
    ] = None,
    prompts: Annotated[
        int, option("--prompts", panel=_WHAT, metavar="P", help=f"Videos, handed in at once. {default('10')}")
    ] = 10,
    vae_use_tiling: Annotated[
        bool, switch("--vae-use-tiling", panel=_WHAT, help="Decode in tiles: less memory, faint seams.")
    ] = False,
    gpu: Annotated[
        str | None, option("--gpu", panel=_WHERE, metavar="D", help="Kind of device, by name or a profile's file.")
    ] = None,
    gpus: Annotated[
        int | None,
        option("--gpus", "--num-workers", "--num-gpus", panel=_WHERE, metavar="N", help=f"How many. {default('8')}"),
    ] = None,
    link: Annotated[
        str | None,
        option("--link", panel=_WHERE, metavar="L", help=f"What joins them. {default('as the device usually comes')}"),
    ] = None,
    cluster: Annotated[
        str | None, option("--cluster", panel=_WHERE, metavar="FILE", help="All of this from a cluster file.")
    ] = None,
    memory: Annotated[
        float | None,
        option("--memory", panel=_WHERE, metavar="GIB", help=f"Free on each device. {default('all that it has')}"),
    ] = None,
    strategy: Annotated[
        str | None,
        option(
            "--strategy",
            panel=_RUN,
            metavar="S",
            help="colocated, disaggregated; auto: whichever is faster; dualparal: beside them, long videos block by "
            f"block, which are other videos. {default('auto')}",
        ),
    ] = None,
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
        option("--prefix", panel=_RUN, metavar="P", help=f"dualparal: cache or rerun. {default('both are compared')}"),
    ] = None,
    context_storage: Annotated[
        str | None,
        option(
            "--context-storage",
            panel=_RUN,
            metavar="S",
            help=f"dualparal: device, host or int8. {default('device, else what makes room')}",
        ),
    ] = None,
    dualparal_compat: Annotated[
        bool, switch("--dualparal-compat", panel=_RUN, help="dualparal: as the released code does it.")
    ] = False,
    top: Annotated[
        int, option("--top", panel=_OUTPUT, metavar="N", help=f"How many proposals to show. {default('5')}")
    ] = 5,
    as_json: Annotated[bool, switch("--json", panel=_OUTPUT, help="Print one JSON document.")] = False,
) -> None:
    """Predict how a machine would make videos soonest: who does what, how long it takes, what does not fit and why."""
    from pipedit.cli.plan_answer import answer
    from pipedit.cli.plan_blocks import block_report, blocks_as_json
    from pipedit.cli.plan_question import Machine, ask
    from pipedit.cli.plan_tables import plan_as_json, plan_report

    session = session_of(typer_context)
    fields = {
        "width": width,
        "height": height,
        "num_frames": num_frames,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "true_cfg_scale": true_cfg_scale,
    }
    question = ask(
        model,
        {name: value for name, value in fields.items() if value is not None},
        Machine(gpu=gpu, gpus=gpus, link=link, cluster=cluster, memory_gib=memory),
        prompts=prompts,
        top=top,
        tiling=vae_use_tiling,
        strategy=strategy,
        blocks={
            "block_size": block_size,
            "context": context,
            "prefix": prefix,
            "context_storage": context_storage,
            "dualparal_compat": dualparal_compat or None,
        },
    )
    found = answer(question)
    session.report.update(plan_as_json(found))
    if found.blocks is not None:
        session.report.update(dualparal=blocks_as_json(found.blocks, question))
    if not as_json:
        report = plan_report(found, top) if found.blocks is None else block_report(found, found.blocks, top)
        session.terminal.table(report)
