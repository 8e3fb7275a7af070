"""How a worker runs its stages. Torch-free, so that whoever starts workers need not load it."""

import dataclasses

from pipedit.models.adapter import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """`compile_layers`: torch.compile of the repeated layers (regional compilation). `offload`: weights live in host
    memory, and those of one stage at a time come to the device. `is_blockwise`: videos are made block by block, and
    the denoisers are the stages of a layer pipeline. `context_storage`: where its keys and values wait (see
    parallel.context_attention)."""

    device: str
    precision: Precision
    vae_tiling: bool = False
    compile_layers: bool = False
    offload: bool = False
    is_blockwise: bool = False
    context_storage: str = "device"
