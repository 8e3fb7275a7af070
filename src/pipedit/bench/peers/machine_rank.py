"""A rank of `pipedit profile`: python machine_rank.py OPTIONS, then JSON lines; each is answered with measurements.

OPTIONS is a JSON object: rank, world_size, meeting (a file that all ranks reach), device, each_s, timeout_s.
"""

import datetime
import json
import sys
from typing import Any

import torch
import torch.distributed as dist

from pipedit.bench.machine_rates import Bench


@torch.inference_mode()
def main(options: dict[str, Any]) -> None:
    device, others = str(options["device"]), options["world_size"] > 1
    if device != "cpu":
        torch.cuda.set_device(device)
    if others:
        dist.init_process_group(
            "gloo" if device == "cpu" else "nccl",
            init_method=f"file://{options['meeting']}",
            rank=options["rank"],
            world_size=options["world_size"],
            timeout=datetime.timedelta(seconds=options["timeout_s"]),
        )
    bench = Bench(
        device=device,
        dtype=torch.float32 if device == "cpu" else torch.bfloat16,
        each_s=options["each_s"],
        others=others,
    )
    _say({"ready": True})
    for _ in sys.stdin:
        if others:
            dist.barrier()
        _say(bench.measure())
    if others:
        dist.destroy_process_group()


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
