"""Which rank plays which roles. Colocated: every rank plays all. Disaggregated: disjoint groups."""

import dataclasses
import enum


class Role(enum.StrEnum):
    ENCODER = "encoder"
    DENOISER = "denoiser"
    DECODER = "decoder"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Ranks of each role, in group order. The denoisers of a placement share every step. A request is decoded by one
    decoder, or by all of them together.

    A prompt is encoded by all encoders if they are the denoisers or more, so that nothing has to travel; else by one of
    them.
    """

    encoders: tuple[int, ...]
    denoisers: tuple[int, ...]
    decoders: tuple[int, ...]

    @classmethod
    def colocated(cls, num_workers: int) -> "Placement":
        """Every rank does everything, decoding included."""
        ranks = tuple(range(num_workers))
        return cls(encoders=ranks, denoisers=ranks, decoders=ranks)

    @classmethod
    def serial_decode(cls, num_workers: int) -> "Placement":
        """Every rank encodes and denoises; one of them decodes, and the others wait for it."""
        return dataclasses.replace(cls.colocated(num_workers), decoders=(0,))

    @classmethod
    def disaggregated(cls, *, denoise: int, decode: int, encoder: Role) -> "Placement":
        """DeDiVAE (PipeDiT, section 3.2): `denoise` ranks denoise and `decode` others decode. `encoder` says which of
        the two groups encodes prompts: DENOISER or DECODER."""
        denoisers = tuple(range(denoise))
        decoders = tuple(range(denoise, denoise + decode))
        encoders = {Role.DENOISER: denoisers, Role.DECODER: decoders}[encoder]
        return cls(encoders=encoders, denoisers=denoisers, decoders=decoders)

    @classmethod
    def pipeline(cls, *, stages: int, decoder: bool, encoder: Role | None = None) -> "Placement":
        """DualParal: a rank for each of `stages` ranges of layers. With `decoder` a further rank decodes, else the last
        stage. `encoder`: whether the first stage encodes prompts (DENOISER) or the rank that decodes (DECODER); None:
        the latter if it does nothing else, so that no stage holds text encoder and VAE."""
        if stages == 1 and not decoder:
            return cls.colocated(1)
        ranks = tuple(range(stages))
        decodes = stages if decoder else stages - 1
        encodes = encoder or (Role.DECODER if decoder else Role.DENOISER)
        return cls(encoders=(decodes if encodes is Role.DECODER else ranks[0],), denoisers=ranks, decoders=(decodes,))

    @property
    def is_disaggregated(self) -> bool:
        """Whether no rank both denoises and decodes."""
        return not set(self.denoisers) & set(self.decoders)

    @property
    def encodes_locally(self) -> bool:
        """Whether every denoiser encodes for itself."""
        return set(self.denoisers) <= set(self.encoders)

    @property
    def decodes_locally(self) -> bool:
        """Whether every decoder denoises for itself."""
        return set(self.decoders) <= set(self.denoisers)

    @property
    def hands_over(self) -> bool:
        """Whether conditioning or clean latents travel from rank to rank."""
        return not (self.encodes_locally and self.decodes_locally)

    def ranks(self, role: Role) -> tuple[int, ...]:
        groups = {Role.ENCODER: self.encoders, Role.DENOISER: self.denoisers, Role.DECODER: self.decoders}
        return groups[role]

    def roles(self, rank: int) -> tuple[Role, ...]:
        return tuple(role for role in Role if rank in self.ranks(role))

    @property
    def world(self) -> tuple[int, ...]:
        return tuple(sorted({*self.encoders, *self.denoisers, *self.decoders}))
