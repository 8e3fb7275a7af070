"""A block scheduler and its ranks, moved by hand, for tests that tell a story."""

from typing import Any

from pipedit.core import messages
from pipedit.core.blocks import BlockPlan
from pipedit.core.errors import WorkerDiedError
from pipedit.core.placement import Placement
from pipedit.plan.block_scheduler import BlockPolicy, BlockScheduler
from pipedit.plan.jobs import Phase
from tests.plan.block_checks import check_rest, check_sound
from tests.plan.block_ranks import REQUEST, BlockRanks

TWO_AND_ONE = Placement(encoders=(2,), denoisers=(0, 1), decoders=(2,))
LAST_DECODES = Placement(encoders=(0,), denoisers=(0, 1), decoders=(1,))
THREE_AND_ONE = Placement(encoders=(3,), denoisers=(0, 1, 2), decoders=(3,))
ENCODE_ELSEWHERE = Placement(encoders=(3,), denoisers=(0, 1), decoders=(2,))


class Rehearsal:
    """A scheduler and its ranks, moved by hand."""

    def __init__(self, placement: Placement, *, lag: int = 1, **policy: Any) -> None:
        self.plans: dict[str, BlockPlan] = {}
        self.policy = BlockPolicy(**policy)
        self.scheduler = BlockScheduler(placement, self.policy)
        self.ranks = BlockRanks(placement, self.plans, self.policy, lag=lag)

    def submit(self, plan: BlockPlan, *request_ids: str, priority: int = 0) -> None:
        for request_id in request_ids:
            self.plans[request_id] = plan
            self.scheduler.submit(request_id, REQUEST, self.ranks.work(request_id, priority))

    def cancel(self, request_id: str) -> None:
        self.scheduler.cancel(request_id)
        if request_id in self.ranks.videos:
            self.ranks.videos[request_id].cancelled = True

    def phase(self, request_id: str) -> Phase:
        return self.scheduler.job(request_id).phase

    def ask(self, *doomed: int) -> list[str]:
        """What is sent now, in words. The doomed ranks fail at it at once."""
        commands = self.scheduler.next_commands()
        for command in commands:
            self.ranks.take(command)
        for rank in doomed:
            self.ranks.doom(rank)
        check_sound(self.scheduler, self.ranks)
        check_rest(self.scheduler, self.ranks)
        return in_words(commands)

    def finish(self, *ranks: int) -> list[str]:
        """These ranks answer; returns what is sent then."""
        for rank in ranks:
            self.scheduler.receive(self.ranks.finish(rank))
        return self.ask()

    def finish_all(self) -> list[str]:
        return self.finish(*[rank for rank in list(self.ranks.in_flight) if self.ranks.can_finish(rank)])

    def fail(self, rank: int) -> list[str]:
        self.scheduler.receive(self.ranks.fail(rank))
        return self.ask()

    def die(self) -> None:
        self.scheduler.lose_workers(WorkerDiedError("killed", rank=0, doing="working"))
        self.ranks.lose()
        check_sound(self.scheduler, self.ranks)

    def go_until(self, *words: str, limit: int = 1000) -> None:
        """Whoever can answer does, again and again, until all these are in flight."""
        self.ask()
        for _ in range(limit):
            if set(words) <= set(in_words(list(self.ranks.in_flight.values()))):
                return
            assert self.ranks.in_flight, f"there never is {words}"
            self.finish_all()
        raise AssertionError("the scheduler does not come to an end")

    def go_to_the_end(self, limit: int = 1000) -> None:
        self.ask()
        for _ in range(limit):
            if not self.ranks.in_flight:
                return
            self.finish_all()
        raise AssertionError("the scheduler does not come to an end")


def in_words(commands: list[messages.Command]) -> list[str]:
    """Such as "1: run a 4-6" (rank 1 runs operations 4 and 5 of request a)."""
    return [f"{command.ranks[0]}: {_in_words(command)}" for command in commands]


def _in_words(command: messages.Command) -> str:
    match command:
        case messages.DenoiseBlocks():
            return f"run {command.request_id} {command.first}-{command.first + command.count}"
        case messages.DecodeBlock():
            return f"decode {command.request_id} {command.block}"
        case messages.SaveBlocks():
            return f"save {command.request_id} {command.at}"
        case messages.Release():
            return f"{'drop' if command.failed else 'forget'} {command.request_id}"
    return f"encode {command.request_id}"
