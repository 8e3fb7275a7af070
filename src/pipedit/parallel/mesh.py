"""The channels of one split of the work, as one rank sees them: who meets whom, for what.

Helpers (attention co-processing, PipeDiT, section 3.3) belong to one group of Ulysses each, behind its denoisers.
"""

import dataclasses
from collections.abc import Callable, Sequence

from pipedit.core.parallel import ParallelConfig, mesh_groups, mesh_position
from pipedit.parallel.channel import Channel
from pipedit.parallel.pipesp import Lines
from pipedit.parallel.workspace import Workspace

Helpers = tuple[tuple[int, ...], ...]  # global ranks, for each group of Ulysses in order; empty: nobody helps
Open = Callable[[str, Sequence[int]], Channel]  # purpose and members


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """`members`: global ranks of this rank's group of Ulysses, the last `helpers` of which help. `first`: the place of
    the group's first member in the order of the tokens; `place`: that of this rank, None if it helps."""

    config: ParallelConfig
    members: tuple[int, ...]
    helpers: int
    branch: int
    first: int
    place: int | None
    lines: Lines
    ring: Channel
    rows: Channel  # of everybody who shares the tokens
    branches: Channel

    @property
    def is_alone(self) -> bool:
        """Whether this rank does each attention by itself."""
        return self.lines.inward.size == 1 and self.ring.size == 1

    @property
    def everybody(self) -> Channel:
        """All who take part in one attention."""
        return self.lines.outward if self.helpers else self.rows


def open_mesh(
    config: ParallelConfig,
    helpers: Helpers,
    *,
    ranks: Sequence[int],
    rank: int,
    workspace: Workspace,
    open_channel: Open,
) -> Mesh:
    """`ranks`: the denoisers. Everybody opens channels in the same order of purposes, so that nobody waits in a circle;
    within a purpose, every rank has one channel at most."""
    if rank not in ranks:
        return _helpers_mesh(config, helpers, ranks=ranks, rank=rank, workspace=workspace, open_channel=open_channel)
    position = mesh_position(config, ranks.index(rank))
    ours = helpers[position.cfg] if helpers else ()
    members = (*(ranks[index] for index in position.ulysses_group), *ours)

    def of(purpose: str, group: Sequence[int]) -> Channel:
        return open_channel(purpose, [ranks[index] for index in group])

    return Mesh(
        config=config,
        members=members,
        helpers=len(ours),
        branch=position.cfg,
        first=position.ring * config.ulysses_degree,
        place=position.ring * config.ulysses_degree + position.ulysses,
        lines=_lines(members, workspace, open_channel),
        ring=of("ring", position.ring_group),
        rows=of("rows", position.sequence_group),
        branches=of("branches", position.cfg_group),
    )


def _helpers_mesh(
    config: ParallelConfig,
    helpers: Helpers,
    *,
    ranks: Sequence[int],
    rank: int,
    workspace: Workspace,
    open_channel: Open,
) -> Mesh:
    (branch,) = (branch for branch, group in enumerate(helpers) if rank in group)  # it helps one group
    members = (*(ranks[index] for index in mesh_groups(config).ulysses[branch]), *helpers[branch])
    return Mesh(
        config=config,
        members=members,
        helpers=len(helpers[branch]),
        branch=branch,
        first=0,
        place=None,
        lines=_lines(members, workspace, open_channel),
        ring=Channel(),
        rows=Channel(),
        branches=Channel(),
    )


def _lines(members: Sequence[int], workspace: Workspace, open_channel: Open) -> Lines:
    inward = open_channel("inward", members)
    return Lines(inward=inward, outward=open_channel("outward", members), workspace=workspace)
