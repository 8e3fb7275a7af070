"""`parallelize`: spreads a diffusers pipeline over the ranks of torchrun, and leaves it as it found it.

Knows pipelines only by their transformers: `transformer`, and `transformer_2` where there are two experts; and by
their `vae`.
"""

import contextlib
import dataclasses
import datetime
import itertools
import os
import secrets
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from pipedit.core.errors import InvalidRequestError
from pipedit.core.parallel import AUTO, ParallelConfig
from pipedit.models.decode_bindings import spread_decode
from pipedit.models.sequence import attach
from pipedit.models.sequence_bindings import binding_of
from pipedit.parallel.groups import channel_opener, default_store
from pipedit.parallel.rows import ChannelRows
from pipedit.parallel.runtime import ParallelRuntime
from pipedit.plan.degrees import Wanted, choose, degree_problems
from pipedit.worker.interception import intercept
from pipedit.worker.pipeline_calls import PipelineCalls

# For ranks that never come; a rank that died is noticed at once.
TIMEOUT = datetime.timedelta(minutes=10)
_started = itertools.count()  # how often torch.distributed was initialised here
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextlib.contextmanager
def parallelize(
    pipe: Any,
    *,
    ulysses_degree: int | None = None,
    ring_degree: int | None = None,
    cfg_degree: int | None = None,
    pipesp_chunks: int | str = AUTO,
) -> Iterator[Any]:
    """Within the context, calling `pipe` on every rank makes one video together; every rank gets the whole of it.

    Every rank must call `pipe` with the same arguments and the same noise, so with a generator:

        with pipedit.parallelize(pipe, ulysses_degree=4):  # under torchrun --nproc-per-node 4
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(0))

    The degrees multiply to the number of ranks. `ulysses_degree` and `ring_degree` are chosen where they are not
    given; `cfg_degree` is 1 unless 2 is asked for, which needs a pipeline that uses guidance: half of the ranks then
    make the conditional prediction and half the unconditional one (from a prompt's second step on: the first one shows
    what the pipeline asks for). `pipesp_chunks`: see ParallelConfig.

    The VAE decodes on all ranks too, so every rank calls `pipe.vae.decode`, if one does: Wan's by rows, HunyuanVideo's
    by its temporal tiles, either by spatial tiles where `pipe.vae.enable_tiling()` says so. What cannot be shared is
    decoded whole by each rank, which is as right, only not faster: other VAEs, compiled ones, one on another device
    than the transformer, a HunyuanVideo that fits one temporal tile or is decoded without them, Wan's pictures of few
    rows, tiles of unusual sizes, decoding outside torch.no_grad.

    torch.distributed is initialised if it is not, and then also ended. Raises InvalidRequestError for degrees that
    cannot be, models that are not supported, and ranks that were given different inputs.
    """
    experts = _experts(pipe)
    wanted = Wanted(
        ulysses_degree=ulysses_degree, ring_degree=ring_degree, cfg_degree=cfg_degree, pipesp_chunks=pipesp_chunks
    )
    device = pipe._execution_device  # unlike `device`, right for weights that are offloaded
    with contextlib.ExitStack() as undo:
        bindings = [binding_of(expert) for expert in experts]
        if device.type == "cuda":
            undo.enter_context(torch.cuda.device(device))
        undo.enter_context(_process_group(device))
        config = _choose(wanted, experts)
        ranks, rank = range(config.world_size), dist.get_rank()
        open_channel = channel_opener(_own_store(), rank=rank, device=str(device))
        runtime = ParallelRuntime(ranks=ranks, rank=rank, device=str(device), open_channel=open_channel)
        undo.callback(runtime.close)
        runtime.use(config)
        for expert, binding in zip(experts, bindings, strict=True):
            undo.callback(attach(expert, binding, runtime))
        calls = PipelineCalls(runtime.branches if config.cfg_degree == 2 else None)
        for expert in experts:
            undo.callback(intercept(expert, calls.answer))
        if (vae := getattr(pipe, "vae", None)) is not None:
            rows = ChannelRows(ranks=ranks, rank=rank, device=str(device), open_channel=open_channel)
            undo.callback(rows.close)
            undo.callback(spread_decode(vae, rows, device))
        yield pipe
        calls.finish()


def _experts(pipe: Any) -> list[Any]:
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    experts = [expert for expert in found if expert is not None]
    if not experts:
        raise InvalidRequestError([f"{type(pipe).__name__} has no transformer to spread over ranks"])
    return experts


def _choose(wanted: Wanted, experts: Sequence[Any]) -> ParallelConfig:
    """Heads are known, the tokens of a video only when it is made: too few are refused then. Whether the pipeline uses
    guidance is not known either, so that halves are only made where they are asked for."""
    world_size, heads = dist.get_world_size(), experts[0].config.num_attention_heads
    if problems := degree_problems(wanted, world_size, heads):
        raise InvalidRequestError(problems)
    if wanted.cfg_degree is None:
        given, wanted = wanted.given, dataclasses.replace(wanted, cfg_degree=1)
        if degree_problems(wanted, world_size, heads):
            named = " and ".join(f"{name}={value}" for name, value in given.items())
            raise InvalidRequestError(
                [
                    f"{named} on {world_size} ranks would need cfg_degree=2, which is only taken if it is asked for, "
                    "because it is for pipelines that use guidance; give cfg_degree=2, or other degrees"
                ]
            )
    return choose(wanted, world_size, heads, uses_guidance=wanted.cfg_degree == 2, tokens=world_size)


def _own_store() -> Any:
    """Where the ranks of one call of `parallelize` meet, and nobody met before: they agree on a name."""
    name = [secrets.token_hex(8)]
    dist.broadcast_object_list(name, src=0)
    return default_store(f"pipedit/{name[0]}")


@contextlib.contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    """torch.distributed, for as long as the context lasts or longer, where somebody else has initialised it."""
    if dist.is_initialized():
        yield
        return
    if any(name not in os.environ for name in _LAUNCHED):
        raise InvalidRequestError(
            ["parallelize needs several processes; start the script with: torchrun --nproc-per-node N script.py"]
        )
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # torchrun's store outlives what we make, so each time needs keys of its own.
    store, rank, world_size = next(rendezvous("env://", timeout=TIMEOUT))
    store = dist.PrefixStore(f"pipedit/{next(_started)}", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
