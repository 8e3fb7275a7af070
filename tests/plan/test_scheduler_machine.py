"""Random lives of a scheduler, larger than what can be enumerated: any placement, policy, mix and trouble."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.parallel import ParallelConfig
from pipedit.core.placement import Placement, Role
from pipedit.plan.aco_gate import AcoMode
from pipedit.plan.jobs import ENDS, Job, Phase, Work
from pipedit.plan.scheduler import Policy, RequestScheduler
from tests.plan.scheduled_ranks import (
    PLACEMENTS,
    REQUEST,
    ScheduledRanks,
    check_bounds,
    check_rest,
    seconds,
    size_of,
)

MAX_REQUESTS = 12

disaggregated = st.builds(
    Placement.disaggregated,
    denoise=st.integers(1, 4),
    decode=st.integers(1, 4),
    encoder=st.sampled_from([Role.DENOISER, Role.DECODER]),
)
placements = st.one_of(disaggregated, st.sampled_from(sorted(PLACEMENTS.values(), key=str)))
policies = st.builds(
    Policy,
    aco=st.sampled_from(AcoMode),
    encoded_ahead=st.integers(1, 3),
    latents_waiting=st.integers(1, 3),
    spread_decode=st.booleans(),
    patience=st.integers(1, 4),
    attempts=st.integers(1, 3),
    grain=st.integers(0, 2),
    least_command_s=st.sampled_from([0.0, 0.05, 3.0]),
)


def sharings(num_denoisers: int) -> list[ParallelConfig]:
    """Every way in which so many ranks can share a step."""
    degrees = [number for number in range(1, num_denoisers + 1) if num_denoisers % number == 0]
    return [
        ParallelConfig(cfg_degree=cfg, ring_degree=ring, ulysses_degree=num_denoisers // (cfg * ring))
        for cfg in degrees
        for ring in degrees
        if cfg <= 2 and num_denoisers % (cfg * ring) == 0
    ]


def works(placement: Placement) -> st.SearchStrategy[Work]:
    return st.builds(
        Work,
        num_steps=st.integers(1, 5),
        num_chunks=st.integers(1, 4),
        num_chunks_spread=st.sampled_from([None, 1, 3]),
        parallel=st.sampled_from(sharings(len(placement.denoisers))),
        heads=st.sampled_from([0, 4, 7, 24]),
        shape=st.sampled_from(["small", "large"]),
        priority=st.integers(0, 2),
    )


class Lives(RuleBasedStateMachine):
    @initialize(placement=placements, policy=policies, troubles=st.integers(0, 6))
    def begin(self, placement: Placement, policy: Policy, troubles: int) -> None:
        self.placement, self.policy, self.troubles = placement, policy, troubles
        self.scheduler = RequestScheduler(placement, policy)
        self.works: dict[str, Work] = {}
        self.ranks = ScheduledRanks(placement, self.works)
        self.ended: dict[str, Phase] = {}

    @property
    def jobs(self) -> list[Job]:
        return [self.scheduler.job(request_id) for request_id in self.works]

    # -- what may happen ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.works) < MAX_REQUESTS)
    @rule(data=st.data())
    def submit(self, data: st.DataObject) -> None:
        for work in data.draw(st.lists(works(self.placement), min_size=1, max_size=3)):
            request_id = f"r{len(self.works)}"
            self.works[request_id] = work
            self.scheduler.submit(request_id, REQUEST, work)

    @rule()
    def ask(self) -> None:
        before = {job.request_id: (job.order(), job.phase) for job in self.jobs if job.is_ready}
        commands = self.scheduler.next_commands()
        for command in commands:
            self.ranks.take(command)
        assert self.scheduler.next_commands() == [], "not everything was given out at once"
        check_rest(self.scheduler, self.ranks)
        self.check_nobody_waits_in_vain()
        self.check_turns(before, commands)
        self.check_sizes(commands)

    @precondition(lambda self: self.ranks.in_flight)
    @rule(data=st.data(), duration_s=st.floats(0, 10))
    def finish(self, data: st.DataObject, duration_s: float) -> None:
        rank = data.draw(st.sampled_from(sorted(self.ranks.in_flight)))
        spans = seconds(self.ranks.in_flight[rank], rank, duration_s)
        self.scheduler.receive(self.ranks.finish(rank, spans))

    @rule(times=st.integers(1, 4), unit_s=st.floats(0, 10))
    def go_on(self, times: int, unit_s: float) -> None:
        for _ in range(times):
            self.ask()
            self.finish_everything(unit_s)

    @precondition(lambda self: self.troubles and self.ranks.in_flight)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        self.troubles -= 1
        rank = data.draw(st.sampled_from(sorted(self.ranks.in_flight)))
        if not isinstance(self.ranks.in_flight[rank], messages.Release):
            self.scheduler.receive(self.ranks.fail(rank))

    @precondition(lambda self: self.troubles and self.works)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.troubles -= 1
        self.scheduler.cancel(data.draw(st.sampled_from(sorted(self.works))))

    @precondition(lambda self: self.troubles and self.works)
    @rule(data=st.data())
    def lose_workers(self, data: st.DataObject) -> None:
        self.troubles -= 1
        rank = data.draw(st.sampled_from(self.placement.world))
        begun = {job.request_id: job.attempts for job in self.jobs if not job.is_over and job.phase is not Phase.QUEUED}
        guilty = self.ranks.busy.get(rank)
        failing = {job.request_id for job in self.jobs if job.cancel_wanted or job.failure is not None}
        self.scheduler.lose_workers(WorkerDiedError("killed", rank=rank, doing="working"))
        self.ranks.lose()
        for request_id, attempts in begun.items():
            has_another = attempts < self.policy.attempts and request_id != guilty and request_id not in failing
            assert (self.scheduler.job(request_id).phase is Phase.QUEUED) == has_another

    @precondition(lambda self: self.troubles and len(self.works) >= MAX_REQUESTS)
    @rule()
    def abandon(self) -> None:
        self.troubles -= 1
        self.scheduler.abandon()
        self.ranks.lose()
        assert self.scheduler.is_idle

    # -- what must always hold ----------------------------------------------------------------------------------

    @invariant()
    def is_sound(self) -> None:
        check_bounds(self.jobs, self.placement, self.policy)
        for job in self.jobs:
            assert self.ended.get(job.request_id, job.phase) is job.phase, "an end is an end"
            assert job.attempts <= self.policy.attempts, job
            assert (job.phase is Phase.FAILED) == (job.is_over and job.failure is not None), job
            if job.is_over:
                self.ended[job.request_id] = job.phase

    def finish_everything(self, unit_s: float = 0.0) -> None:
        for rank, command in list(self.ranks.in_flight.items()):
            self.scheduler.receive(self.ranks.finish(rank, seconds(command, rank, unit_s * size_of(command))))

    def check_nobody_waits_in_vain(self) -> None:
        """After everything was given out: whoever waits, waits for ranks or for room."""
        placement, policy = self.placement, self.policy
        free = set(placement.world) - self.ranks.busy.keys()
        phases = [job.phase for job in self.jobs]
        has_room = not placement.is_disaggregated or (
            phases.count(Phase.DENOISING) + phases.count(Phase.DENOISED)
            < policy.latents_waiting * len(placement.decoders)
        )
        can_denoise = set(placement.denoisers) <= free
        assert not (can_denoise and any(job.is_ready and job.phase is Phase.DENOISING for job in self.jobs))
        assert not (can_denoise and has_room and any(job.is_ready and job.phase is Phase.ENCODED for job in self.jobs))
        begun = {rank for job in self.jobs if job.phase is Phase.DECODING for rank in job.decoders}
        is_alone = sum(phase not in ENDS for phase in phases) == 1 and policy.spread_decode
        needed = placement.decoders if is_alone or not placement.is_disaggregated else ()
        idle = [rank for rank in placement.decoders if rank in free and rank not in begun]
        can_decode = set(needed) <= set(idle) if needed else bool(idle)
        assert not (can_decode and any(job.is_ready and job.phase is Phase.DENOISED for job in self.jobs))
        encoders = [rank for rank in placement.encoders if rank in free]
        can_encode = len(encoders) == len(placement.encoders) if placement.encodes_locally else bool(encoders)
        ahead = phases.count(Phase.ENCODING) + phases.count(Phase.ENCODED)
        assert not (can_encode and ahead < policy.encoded_ahead and Phase.QUEUED in phases)

    def check_turns(self, before: dict[str, tuple[tuple[bool, int, int], Phase]], sent: list[messages.Command]) -> None:
        """Whoever was given the denoisers had waited for them first; and so for a decoder."""
        left = {job.request_id for job in self.jobs if job.is_ready and job.request_id in before}
        for command in sent:
            if command.request_id not in before or isinstance(command, messages.Release):
                continue
            order, phase = before[command.request_id]
            passed = [other for other in left if before[other][0] < order]
            if isinstance(command, messages.Denoise):
                assert not any(before[other][1] is Phase.DENOISING for other in passed), command
                assert not any(before[other][1] is phase for other in passed), command
            elif phase is Phase.DENOISED and self.placement.is_disaggregated:
                assert not any(before[other][1] is phase for other in passed), command

    def check_sizes(self, sent: list[messages.Command]) -> None:
        """A command covers the grain, and beyond it only what is over soon: without its last unit it would be too
        short. None is shorter, unless it is the last."""
        for command in sent:
            if not isinstance(command, messages.Exchanging):
                continue
            job, grain, least_s = self.scheduler.job(command.request_id), self.policy.grain, self.policy.least_command_s
            total = job.work.num_steps if isinstance(command, messages.Denoise) else job.work.chunks(len(job.decoders))
            size, left = size_of(command), total - job.done
            if grain == 0:
                assert size == left, command
                continue
            assert size <= grain or (size - 1) * job.unit_s < least_s, (command, job.unit_s)
            assert size == left or (size >= grain and (not job.unit_s or size * job.unit_s >= least_s - 1e-9)), command

    def teardown(self) -> None:
        """Nothing more goes wrong: then every request comes to its end."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(5_000):
            self.ask()
            if not self.ranks.in_flight:
                assert all(job.is_over for job in self.jobs)
                return
            self.finish_everything()
            self.is_sound()
        raise AssertionError("the scheduler does not come to an end")


Lives.TestCase.settings = settings(max_examples=100, stateful_step_count=60, deadline=None)
TestLives = Lives.TestCase
