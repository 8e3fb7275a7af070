"""Random lives of a block scheduler, larger than what can be enumerated: any placement, policy, mix and trouble."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan, Prefix
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.core.snapshots import Saving, Snapshot
from pipedit.plan.block_scheduler import BlockJob, BlockPolicy, BlockScheduler
from pipedit.plan.jobs import Phase
from tests.plan.block_checks import check_rest, check_sound
from tests.plan.block_ranks import REQUEST, BlockRanks, order_of, plan_of

MAX_REQUESTS = 8

plans = st.builds(plan_of, st.one_of(st.none(), st.integers(1, 7)), st.integers(1, 6), st.sampled_from(Prefix))
policies = st.builds(
    BlockPolicy,
    blocks_waiting=st.integers(1, 4),
    patience=st.integers(1, 3),
    piece=st.one_of(st.none(), st.integers(1, 12)),
)


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """Up to six stages; the decoder is one of them or another rank, and so is the encoder; or all stages encode."""
    count = draw(st.integers(1, 6))
    stages = tuple(range(count))
    decoder = draw(st.integers(0, count))
    encoder = draw(st.integers(0, count + 1))
    encoders = stages if encoder == count + 1 and draw(st.booleans()) else (encoder,)
    return Placement(encoders=encoders, denoisers=stages, decoders=(decoder,))


@st.composite
def cuts(draw: st.DrawFn, plan: BlockPlan) -> Snapshot | None:
    """A snapshot with which the video can begin, if it is long enough."""
    total = 30 if plan.num_operations is None else plan.num_operations
    if total == 1:
        return None
    at = draw(st.integers(1, total - 1))
    return Snapshot(folder="before", at=at, decoded=draw(st.integers(0, order_of(plan).finished(at))))


class Lives(RuleBasedStateMachine):
    @initialize(
        placement=placements(),
        policy=policies,
        troubles=st.integers(0, 6),
        ahead=st.integers(1, 4),
        lag=st.integers(0, 8),
    )
    def begin(self, placement: Placement, policy: BlockPolicy, troubles: int, ahead: int, lag: int) -> None:
        self.placement, self.troubles = placement, troubles
        self.scheduler = BlockScheduler(placement, policy)
        self.plans: dict[str, BlockPlan] = {}
        self.ranks = BlockRanks(placement, self.plans, policy, ahead=ahead, lag=lag)
        self.ended: dict[str, Phase] = {}

    @property
    def jobs(self) -> list[BlockJob]:
        return [self.scheduler.job(request_id) for request_id in self.plans]

    @property
    def able(self) -> list[int]:
        return [rank for rank in sorted(self.ranks.in_flight) if self.ranks.can_finish(rank)]

    # -- what may happen ----------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.plans) < MAX_REQUESTS)
    @rule(
        plan=plans,
        priority=st.integers(0, 2),
        saving=st.one_of(st.none(), st.integers(1, 3)),
        started=st.booleans(),
        data=st.data(),
    )
    def submit(self, plan: BlockPlan, priority: int, saving: int | None, started: bool, data: st.DataObject) -> None:
        request_id = f"r{len(self.plans)}"
        self.plans[request_id] = plan
        if saving is not None:
            self.ranks.saving[request_id] = Saving(folder="run", every=saving)
        if started and (start := data.draw(cuts(plan))) is not None:
            self.ranks.resume[request_id] = start
        self.scheduler.submit(request_id, REQUEST, self.ranks.work(request_id, priority))

    @rule(data=st.data())
    def ask(self, data: st.DataObject) -> None:
        """Some rank may be going to fail at what it is given."""
        sent = self.send()
        if self.troubles and sent and data.draw(st.booleans()):
            self.troubles -= 1
            command = data.draw(st.sampled_from(sent))
            most = command.count if isinstance(command, messages.DenoiseBlocks) else 0
            self.ranks.doom(command.ranks[0], data.draw(st.integers(0, most)))
        check_rest(self.scheduler, self.ranks)

    @precondition(lambda self: self.able)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.scheduler.receive(self.ranks.finish(data.draw(st.sampled_from(self.able))))

    @rule(times=st.integers(1, 12), backwards=st.booleans())
    def go_on(self, times: int, backwards: bool) -> None:
        for _ in range(times):
            self.turn(backwards=backwards)

    @precondition(lambda self: any(map(self.ranks.can_be_disturbed, self.ranks.in_flight)))
    @rule(data=st.data())
    def disturb(self, data: st.DataObject) -> None:
        disturbed = [rank for rank in sorted(self.ranks.in_flight) if self.ranks.can_be_disturbed(rank)]
        self.scheduler.receive(self.ranks.fail(data.draw(st.sampled_from(disturbed))))

    @precondition(lambda self: self.troubles and self.plans)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.troubles -= 1
        self.stop(data.draw(st.sampled_from(sorted(self.plans))))

    @precondition(lambda self: self.troubles and self.plans)
    @rule()
    def lose_workers(self) -> None:
        self.troubles -= 1
        queued = [job for job in self.jobs if job.phase is Phase.QUEUED]
        begun = [job for job in self.jobs if job.phase is not Phase.QUEUED]
        self.scheduler.lose_workers(WorkerDiedError("killed", rank=0, doing="working"))
        self.ranks.lose()
        assert all(job.phase is Phase.QUEUED for job in queued)
        assert all(job.is_over for job in begun)

    @precondition(lambda self: self.troubles and len(self.plans) >= MAX_REQUESTS)
    @rule()
    def abandon(self) -> None:
        self.troubles -= 1
        self.scheduler.abandon()
        self.ranks.lose()
        assert self.scheduler.is_idle

    # -- what must always hold ----------------------------------------------------------------------------------

    @invariant()
    def is_sound(self) -> None:
        check_sound(self.scheduler, self.ranks)
        for job in self.jobs:
            assert self.ended.get(job.request_id, job.phase) is job.phase, "an end is an end"
            if job.is_over:
                self.ended[job.request_id] = job.phase

    def send(self) -> list[messages.Command]:
        waiting = {job.request_id: job.order() for job in self.jobs if job.phase is Phase.QUEUED}
        commands = self.scheduler.next_commands()
        for command in commands:
            self.ranks.take(command)
            if isinstance(command, messages.Encode):
                assert waiting[command.request_id] == min(waiting.values()), f"not the turn of {command}"
        assert self.scheduler.next_commands() == [], "not everything was given out at once"
        return commands

    def stop(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)
        if request_id in self.ranks.videos:
            self.ranks.videos[request_id].cancelled = True

    def turn(self, *, backwards: bool) -> None:
        """Whoever can answer does."""
        self.send()
        check_rest(self.scheduler, self.ranks)
        for rank in reversed(self.able) if backwards else self.able:
            self.scheduler.receive(self.ranks.finish(rank))

    def teardown(self) -> None:
        """Nothing more goes wrong: then every request comes to its end, endless ones when they are cancelled."""
        if not hasattr(self, "scheduler"):
            return
        for job in self.jobs:
            if job.plan.num_blocks is None:
                self.stop(job.request_id)
        for turn in range(3_000):
            self.turn(backwards=turn % 2 == 0)
            self.is_sound()
            if not self.ranks.in_flight and self.scheduler.is_idle:
                assert all(job.is_over for job in self.jobs)
                return
        raise AssertionError("the scheduler does not come to an end")


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLives = Lives.TestCase
