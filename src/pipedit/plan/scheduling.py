"""What drivers ask of a scheduler, whichever way it makes videos. See scheduler.py and block_scheduler.py."""

import dataclasses
from typing import Protocol

from pipedit.core import messages
from pipedit.core.errors import WorkerDiedError
from pipedit.core.request import VideoRequest
from pipedit.plan.jobs import Job, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advance:
    """How far a request has come by an event: `done` of `total` units of a stage ("encode", "denoise", "decode"; None:
    nobody knows how many there will be), `what` the spans of such a unit are called."""

    stage: str
    what: str
    done: int
    total: int | None


class Scheduler(Protocol):
    """Events in, commands out."""

    def submit(self, request_id: str, request: VideoRequest, work: Work) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def receive(self, event: messages.Event) -> None: ...
    def lose_workers(self, error: WorkerDiedError) -> None: ...
    def abandon(self) -> None: ...
    def job(self, request_id: str) -> Job: ...
    def forget(self, request_id: str) -> None: ...
    def is_held(self, request_id: str) -> bool: ...
    def next_commands(self) -> list[messages.Command]: ...

    @property
    def is_idle(self) -> bool: ...

    def speaks(self, event: messages.Event) -> bool:
        """Whether the event, which was not received yet, tells how long the work took that several ranks did: one of
        them does."""

    def advance(self, event: messages.Event) -> Advance | None:
        """What an event that was just received says of its request's progress."""
