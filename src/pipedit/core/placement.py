"""Which rank plays which roles. Colocated: every rank plays all. Disaggregated: disjoint groups."""

import dataclasses
import enum


class Role(enum.StrEnum):
    ENCODER = "encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Ranks of each role, in group order."""

    encoders: tuple[int, ...]
    denoisers: tuple[int, ...]
    decoders: tuple[int, ...]

    @classmethod
    def colocated(cls, num_workers: int) -> "Placement":
        ranks = tuple(range(num_workers))
        return cls(encoders=ranks, denoisers=ranks, decoders=ranks)

    def ranks(self, role: Role) -> tuple[int, ...]:
        groups = {Role.ENCODER: self.encoders, Role.DENOISER: self.denoisers, Role.DECODER: self.decoders}
        return groups[role]

    def roles(self, rank: int) -> tuple[Role, ...]:
        return tuple(role for role in Role if rank in self.ranks(role))

    @property
    def world(self) -> tuple[int, ...]:
        return tuple(sorted({*self.encoders, *self.denoisers, *self.decoders}))
