"""How a group of ranks shares one video: the degrees of each axis, and who sits where. Pure arithmetic.

Ranks are numbered with Ulysses innermost (neighbours, the fastest links), ring attention around it, and guidance
(classifier-free guidance, CFG) outermost: rank = (cfg * ring_degree + ring) * ulysses_degree + ulysses.
"""

import dataclasses

AUTO = "auto"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """`cfg_degree` 2: conditional and unconditional prediction on two halves of the ranks. `ulysses_degree` ranks deal
    the heads among themselves, `ring_degree` such groups pass keys and values round. `pipesp_chunks`: head chunks in
    which Ulysses' exchanges are pipelined with attention; 1 is plain Ulysses, AUTO measures and keeps the best."""

    cfg_degree: int = 1
    ring_degree: int = 1
    ulysses_degree: int = 1
    pipesp_chunks: int | str = AUTO

    @property
    def sequence_degree(self) -> int:
        """Ranks that share the tokens of one prediction."""
        return self.ring_degree * self.ulysses_degree

    @property
    def world_size(self) -> int:
        return self.cfg_degree * self.sequence_degree

    def describe(self) -> str:
        """Such as "cfg 2 x ring 1 x ulysses 4"."""
        return f"cfg {self.cfg_degree} x ring {self.ring_degree} x ulysses {self.ulysses_degree}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshPosition:
    """Where a rank sits, and with whom on each axis. Groups hold indices into the ranks of the mesh, in order."""

    cfg: int
    ring: int
    ulysses: int
    cfg_group: tuple[int, ...]  # same place in the other branches
    sequence_group: tuple[int, ...]  # shares the tokens of this branch, in the order of the tokens
    ring_group: tuple[int, ...]
    ulysses_group: tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshGroups:
    """All groups of each axis, as indices; each is a partition of 0 .. world_size - 1."""

    cfg: tuple[tuple[int, ...], ...]
    sequence: tuple[tuple[int, ...], ...]
    ring: tuple[tuple[int, ...], ...]
    ulysses: tuple[tuple[int, ...], ...]


def mesh_groups(config: ParallelConfig) -> MeshGroups:
    positions = [mesh_position(config, index) for index in range(config.world_size)]
    return MeshGroups(
        cfg=tuple(sorted({position.cfg_group for position in positions})),
        sequence=tuple(sorted({position.sequence_group for position in positions})),
        ring=tuple(sorted({position.ring_group for position in positions})),
        ulysses=tuple(sorted({position.ulysses_group for position in positions})),
    )


def mesh_position(config: ParallelConfig, index: int) -> MeshPosition:
    """The place of rank number `index` (0 .. world_size - 1)."""
    assert 0 <= index < config.world_size, (index, config)
    around, ulysses = divmod(index, config.ulysses_degree)
    cfg, ring = divmod(around, config.ring_degree)
    degree = config.sequence_degree
    first = cfg * degree
    return MeshPosition(
        cfg=cfg,
        ring=ring,
        ulysses=ulysses,
        cfg_group=tuple(range(index % degree, config.world_size, degree)),
        sequence_group=tuple(range(first, first + degree)),
        ring_group=tuple(range(first + ulysses, first + degree, config.ulysses_degree)),
        ulysses_group=tuple(range(first + ring * config.ulysses_degree, first + (ring + 1) * config.ulysses_degree)),
    )
