"""A worker process without a model or torch, which misbehaves when asked to.

The model's name says what happens at the start, the prompt what happens at step 1, or when it shall fetch something:
"RANK DEED", or nothing at all.
"""

import os
import signal
import sys
import time
from typing import NoReturn

import numpy as np

from pipedit.core import messages
from pipedit.core.errors import PipeditError
from pipedit.core.spans import Span
from pipedit.worker.process import run_process
from pipedit.worker.service import WorkerSpec

HANG_S = 60.0
WORK_S = 0.002  # that each command takes


class UnportableError(PipeditError):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("has a lambda")
        self.cause = lambda: None


class FakeWorker:
    def __init__(self, spec: WorkerSpec) -> None:
        self._rank = spec.rank
        self._prompts: dict[str, str] = {}
        self._misbehave(spec.model)

    def load(self) -> tuple[Span, ...]:
        return (self._span("", "load", None),)

    def handle(self, command: messages.Command) -> messages.Event:
        rank, request_id = self._rank, command.request_id
        time.sleep(WORK_S)
        match command:
            case messages.Encode():
                self._prompts[request_id] = command.request.prompt
                return messages.Encoded(request_id=request_id, rank=rank)
            case messages.Denoise():
                if command.step == 1:
                    self._misbehave(self._prompts.get(request_id, ""))
                span = self._span(request_id, "step", command.step)
                return messages.StepDone(request_id=request_id, rank=rank, step=command.step, spans=(span,))
            case messages.Decode():
                if command.latents_at is not None:
                    self._misbehave(self._prompts.get(request_id, ""))
                frames = np.full((4, 16, 16, 3), command.chunk, np.uint8) if rank == command.ranks[0] else None
                return messages.ChunkDecoded(request_id=request_id, rank=rank, chunk=command.chunk, frames=frames)
        self._prompts.pop(request_id, None)
        return messages.Released(request_id=request_id, rank=rank)

    def recover(self) -> None: ...

    def close(self) -> None: ...

    def _span(self, request_id: str, what: str, index: int | None) -> Span:
        now_s = time.perf_counter()
        return Span(
            request_id=request_id, rank=self._rank, role="denoiser", what=what, start_s=now_s, end_s=now_s, index=index
        )

    def _misbehave(self, wish: str) -> None:
        rank, _, deed = wish.partition(" ")
        if deed == "fail while others hang" and rank != str(self._rank):
            time.sleep(HANG_S)
        if rank == str(self._rank):
            _do(deed)


def _do(deed: str) -> None:
    match deed:
        case "exit":
            sys.stderr.write("something is wrong\n")
            os._exit(7)
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(HANG_S)
        case "print":
            sys.stdout.write("not for stdout\n")
            sys.stdout.flush()
        case "fail" | "fail while others hang":
            _fail()
        case "fail unportably":
            raise UnportableError
        case _ if deed.startswith("kill "):
            os.kill(int(deed.removeprefix("kill ")), signal.SIGKILL)
            _fail()


def _fail() -> NoReturn:
    raise RuntimeError("no luck")


if __name__ == "__main__":
    run_process(sys.argv[1:], FakeWorker)
