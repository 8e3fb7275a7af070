"""How a worker runs its stages. Torch-free, so that whoever starts workers need not load it."""

import dataclasses

from pipedit.models.adapter import Precision


@dataclasses.dataclass(frozen=True, kw_only=True)
class WorkerSettings:
    """`compile_layers`: torch.compile of the repeated layers (regional compilation)."""

    device: str
    precision: Precision
    vae_tiling: bool = False
    compile_layers: bool = False
