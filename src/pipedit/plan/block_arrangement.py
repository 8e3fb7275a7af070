"""Who does what where a long video is made block by block: stages of layers, and who encodes and decodes. Knows no
times."""

import dataclasses

from pipedit.core.blocks import BlockPlan, Prefix, Storage
from pipedit.core.placement import Placement, Role
from pipedit.plan.aco_gate import AcoMode


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockArrangement:
    """A layer pipeline of `stages` workers and, with `decode_worker`, one more that decodes (and encodes prompts). Keys
    and values of neighbours wait in `storage`. `encode_on`: "denoise" or "decode", None: as suits best."""

    plan: BlockPlan
    stages: int
    decode_worker: bool = False
    storage: Storage = Storage.DEVICE
    encode_on: str | None = None

    aco = AcoMode.OFF  # stages share no attention

    @property
    def num_workers(self) -> int:
        return self.stages + self.decode_worker

    @property
    def placement(self) -> Placement:
        encoder = {"denoise": Role.DENOISER, "decode": Role.DECODER, None: None}[self.encode_on]
        return Placement.pipeline(stages=self.stages, decoder=self.decode_worker, encoder=encoder)

    def describe(self) -> str:
        return describe_pipeline(self.placement)

    def flags(self) -> list[str]:
        """What `pipedit generate` has to be told."""
        plan, flags = self.plan, ["--strategy", "dualparal", "--num-workers", str(self.num_workers)]
        flags += ["--decode-workers", "1"] if self.decode_worker else []
        flags += ["--block-size", str(plan.block_latents), "--context", str(plan.context_latents)]
        flags += ["--prefix", plan.prefix] if plan.prefix is not Prefix.CACHE else []
        flags += ["--context-storage", self.storage] if self.storage is not Storage.DEVICE else []
        return flags + (["--dualparal-compat"] if plan.compat else [])


def describe_pipeline(placement: Placement) -> str:
    """Such as "layers on 2 stages, 1 encodes and decodes"."""
    count, (decoder, *_) = len(placement.denoisers), placement.decoders
    stages = f"layers on {count} stages" if count > 1 else "all layers on 1 worker"
    if decoder in placement.denoisers:
        return stages if count == 1 else f"{stages}, the last one decodes"
    return f"{stages}, 1 {'encodes and ' if decoder in placement.encoders else ''}decodes"
