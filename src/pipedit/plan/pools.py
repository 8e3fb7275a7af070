"""Replicas that are alike, and the kinds of request that they serve. Data; the simulator runs it."""

import dataclasses
from collections.abc import Mapping

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Op
from pipedit.core.placement import Placement
from pipedit.core.request import VideoRequest
from pipedit.plan.block_clock import RingTimes
from pipedit.plan.durations import Durations
from pipedit.plan.jobs import Work
from pipedit.plan.scheduler import Policy

_REQUEST = VideoRequest(prompt="")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
    """One kind of request, as a replica serves it. `ring`: what the stages take, where `work` is in blocks."""

    work: Work
    durations: Durations
    ring: RingTimes | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """`count` replicas that are alike. `services`: by the name of the kind of request."""

    placement: Placement
    services: Mapping[str, Service]
    policy: Policy = dataclasses.field(default_factory=Policy)
    count: int = 1

    @property
    def is_blockwise(self) -> bool:
        """Whether videos are made block by block. The requests of a pool all are, or none."""
        return any(service.work.blocks is not None for service in self.services.values())

    @property
    def num_ranks(self) -> int:
        return self.count * len(self.placement.world)

    def groups(self) -> dict[str, tuple[int, ...]]:
        """Ranks of one replica that are told apart in figures: the denoisers, the decoders, others; or all."""
        placement = self.placement
        if not placement.is_disaggregated:
            return {"all": placement.world}
        others = tuple(rank for rank in placement.encoders if rank not in placement.denoisers + placement.decoders)
        groups = {"denoise": placement.denoisers, "decode": placement.decoders, "encode": others}
        return {name: ranks for name, ranks in groups.items() if ranks}


def seconds_each(placement: Placement, service: Service) -> float:
    """From one request to the next where a replica has nothing but requests of this kind: the slower group's time for
    one, and where the groups are one, the time of everything."""
    work, durations = service.work, service.durations
    if work.blocks is not None:
        return _seconds_in_blocks(work.blocks, service)
    encode = messages.Encode(request_id="", request=_REQUEST, ranks=placement.encoders)
    denoise = messages.Denoise(
        request_id="", request=_REQUEST, ranks=placement.denoisers, step=0, num_steps=work.num_steps,
        parallel=work.parallel,
    )  # fmt: skip
    decoders = placement.decoders[:1] if placement.is_disaggregated else placement.decoders
    decode = messages.Decode(
        request_id="", request=_REQUEST, ranks=decoders, chunk=0, num_chunks=work.chunks(len(decoders))
    )
    encode_s, denoise_s, decode_s = (
        sum(piece.seconds for piece in durations.pieces(command)) for command in (encode, denoise, decode)
    )
    if not placement.is_disaggregated:
        return encode_s + denoise_s + decode_s
    if placement.encodes_locally:
        return max(encode_s + denoise_s, decode_s / len(placement.decoders))
    return max(denoise_s, (encode_s + decode_s) / len(placement.decoders))


def _seconds_in_blocks(plan: BlockPlan, service: Service) -> float:
    """About: the first stage's steps of all blocks. There is one video at a time."""
    assert service.ring is not None and plan.num_operations is not None
    return service.ring.seconds_of(0, Op(0, plan.num_steps - 1)) * plan.num_operations
