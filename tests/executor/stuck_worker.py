"""A worker process without a model. In step 1, rank 1 waits for rank 0 inside torch, and rank 0 fails or hangs."""

import sys
import time

import torch

from pipedit.core import messages
from pipedit.core.spans import Span
from pipedit.parallel.groups import channel_opener
from pipedit.worker.group import join_group
from pipedit.worker.process import run_process
from pipedit.worker.service import WorkerSpec


class StuckWorker:
    def __init__(self, spec: WorkerSpec) -> None:
        self._rank = spec.rank
        self._prompt = ""
        assert spec.rendezvous is not None
        store = join_group(spec.rendezvous, device="cpu")
        self._channel = channel_opener(store, rank=spec.rank, device="cpu")("stuck", (0, 1))

    def load(self) -> tuple[Span, ...]:
        return ()

    def handle(self, command: messages.Command) -> messages.Event:
        if isinstance(command, messages.Encode):
            self._prompt = command.request.prompt
            return messages.Encoded(request_id=command.request_id, rank=self._rank)
        assert isinstance(command, messages.Denoise)
        if command.step == 1:
            if self._rank == 1:
                self._channel.swap([None, None], [torch.empty(1), None]).wait()
            if self._prompt == "0 hang":
                time.sleep(60.0)
            raise RuntimeError("no luck")
        return messages.StepDone(request_id=command.request_id, rank=self._rank, step=command.step)

    def recover(self) -> None: ...

    def close(self) -> None: ...


if __name__ == "__main__":
    run_process(sys.argv[1:], StuckWorker)
