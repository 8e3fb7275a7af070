"""What must hold for the block scheduler and its ranks, whatever happens."""

import functools

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.plan.block_scheduler import BlockJob, BlockScheduler
from pipedit.plan.jobs import ENDS, Phase
from tests.plan.block_ranks import BlockRanks, Video, order_of


def check_sound(scheduler: BlockScheduler, ranks: BlockRanks) -> None:
    """At any time, whether commands were asked for or not."""
    jobs = scheduler._jobs.values()
    is_over = all(job.is_over for job in jobs)
    assert scheduler.is_idle == (is_over and not ranks.in_flight and not ranks.kept)
    assert sum(job.phase is not Phase.QUEUED and not job.is_over for job in jobs) <= 1
    for job in jobs:
        keeping = {rank for rank, request_id in ranks.kept if request_id == job.request_id}
        video = ranks.videos.get(job.request_id)
        if job.is_over:
            assert scheduler.is_held(job.request_id) == bool(keeping), (job.request_id, keeping)
            assert (job.phase is Phase.FAILED) == (job.failure is not None), job
        if video is not None and job.phase is Phase.DONE:
            assert video.decoded == job.plan.num_blocks, f"not complete: {video}"
        if video is not None and not job.is_stopping:
            _check_waiting(job, video, ranks)


def check_rest(scheduler: BlockScheduler, ranks: BlockRanks) -> None:
    """After everything that can be sent was sent: somebody comes to an end, or all is over and forgotten; and nobody
    waits for the scheduler."""
    free = set(ranks.placement.world) - ranks.in_flight.keys()
    for rank, request_id in ranks.kept:
        job = scheduler._jobs.get(request_id)
        if job is None or job.is_over or job.failure is not None:
            assert rank not in free, f"{rank} was not told to forget {request_id}"
    assert not ranks.in_flight or any(map(ranks.can_finish, list(ranks.in_flight))), f"stuck in {ranks.in_flight}"
    if not ranks.in_flight:
        assert scheduler.is_idle, "nobody has anything to do, and yet requests wait"
        assert not ranks.kept, f"never forgotten: {ranks.kept}"
    live = [job for job in scheduler._jobs.values() if job.phase not in ENDS]
    for job in live:
        if job.phase is Phase.DENOISING and job.failure is None:
            _check_work(ranks.videos[job.request_id], job.plan, ranks, free)
    if live and all(job.phase is Phase.QUEUED for job in live):
        encoders = ranks.placement.encoders
        needed = encoders if ranks.placement.encodes_locally else encoders[:1]
        assert not free.issuperset(needed), "the next one can begin"


def _check_work(video: Video, plan: BlockPlan, ranks: BlockRanks, free: set[int]) -> None:
    """Every rank that could go on has a command."""
    stages, waiting = ranks.stages, video.told - video.decoded
    behind = [rank for rank, given in zip(stages, video.given, strict=True) if rank in free and given < video.given[0]]
    assert not behind, f"{behind} can follow: {video}"
    if not video.cancelled:
        can_begin = video.given[0] > video.start or free.issuperset(stages)
        was_given_all = video.given[0] == plan.num_operations
        is_at_cut = video.given[0] == video.cut
        is_level = free.issuperset(stages) and video.given == [video.given[0]] * len(stages)
        may_go_on = can_begin and not was_given_all and not is_at_cut and waiting < ranks.policy.blocks_waiting
        assert stages[0] not in free or not may_go_on, f"the first stage can go on: {video}"
        if is_at_cut and is_level:
            assert ranks.decoder not in free, f"the video can be saved: {video}"
        elif not is_at_cut or not _are_saving(ranks):
            assert ranks.decoder not in free or waiting == 0, f"blocks wait for the decoder: {video}"


def _are_saving(ranks: BlockRanks) -> bool:
    return any(isinstance(command, messages.SaveBlocks) for command in ranks.in_flight.values())


def _check_waiting(job: BlockJob, video: Video, ranks: BlockRanks) -> None:
    """Finished blocks wait: below the limit when the first stage was told to go on, and those of one command. A
    snapshot may hold some, too: the first stage tells of them when it has done its first command."""
    finished, results = order_of(job.plan).finished, ranks.policy.operations(job.plan) + ranks.lag + 1
    found = 0 if video.resume is None else finished(video.start) - video.resume.decoded
    most = found + ranks.policy.blocks_waiting - 1 + _most_finished(job.plan, results)
    assert finished(video.results) - video.decoded <= most, f"more than {most} blocks wait: {video}"


@functools.cache
def _most_finished(plan: BlockPlan, results: int) -> int:
    """Blocks that can become finished by so many results in a row."""
    total = results + 2 * plan.num_steps**2 if plan.num_operations is None else plan.num_operations
    finished, starts = order_of(plan).finished, range(max(total - results, 0) + 1)
    return max(finished(min(start + results, total)) - finished(start) for start in starts)
