"""How a worker runs its stages. Torch-free, so that whoever starts workers need not load it."""

import dataclasses

from pipedit.models.adapter import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """`compile_layers`: torch.compile of the repeated layers (regional compilation). `offload`: weights live in host
    memory, and those of one stage at a time come to the device."""

    device: str
    precision: Precision
    vae_tiling: bool = False
    compile_layers: bool = False
    offload: bool = False
