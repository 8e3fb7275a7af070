"""`pipedit plan`: how some workers would make some videos soonest, before anybody rents them. Reads configs only."""

from typing import Annotated

import typer

from pipedit.cli.console import session_of
from pipedit.cli.options import default, option, switch

_WHAT, _WHERE, _OUTPUT = "What is to be made", "On which machine", "Output"
EPILOG = """
[bold]Examples[/bold]

pipedit plan --model hunyuanvideo --gpu a6000 --gpus 8 --width 1024 --height 576 --num-frames 129 --prompts 10

pipedit plan --model wan2.1-t2v-14b --cluster cluster.json --prompts 100 --json

[dim]Figures are predicted from the model's operations and bytes and the device's rates; nothing is run.[/dim]
"""


def plan(
    context: typer.Context,
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
    top: Annotated[
        int, option("--top", panel=_OUTPUT, metavar="N", help=f"How many proposals to show. {default('5')}")
    ] = 5,
    as_json: Annotated[bool, switch("--json", panel=_OUTPUT, help="Print one JSON document.")] = False,
) -> None:
    """Predict how a machine would make videos soonest: who does what, how long it takes, what does not fit and why."""
    from pipedit.cli.plan_answer import answer
    from pipedit.cli.plan_question import Machine, ask
    from pipedit.cli.plan_tables import plan_as_json, plan_report

    session = session_of(context)
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
    )
    found = answer(question)
    session.report.update(plan_as_json(found))
    if not as_json:
        session.terminal.table(plan_report(found, top))
