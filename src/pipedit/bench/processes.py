"""Child processes of a benchmark: started, spoken to in JSON lines, and ended; every wait has a limit."""

import contextlib
import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipedit.core.errors import PipeditError

PEERS = Path(__file__).parent / "peers"
_LAST_LINES = 12  # of a process that failed: the end of a traceback


class Peer:
    """A program under `peers/` that says {"ready": true} and then answers each line with one JSON line. It ends when
    its stdin does, so it outlives a killed parent by one run at most."""

    def __init__(
        self,
        program: str,
        arguments: Sequence[str],
        *,
        timeout_s: float,
        enter: Sequence[str] = (),
        variables: Mapping[str, str] | None = None,
        wait_ready: bool = True,
    ) -> None:
        """`enter` is put before the command line, `variables` are added to the environment. Without `wait_ready` the
        first answer is that it is ready."""
        self._name, self._timeout_s = program, timeout_s
        self._process = subprocess.Popen(
            [*enter, sys.executable, str(PEERS / program), *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **(variables or {})},
            start_new_session=True,  # Ctrl-C is for this process, which ends the program
        )  # fmt: skip
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if wait_ready:
            self._answer()

    def run(self) -> dict[str, Any]:
        """One run; its answer holds at least "seconds"."""
        self.ask("go")
        return self._answer()

    def ask(self, line: str) -> None:
        """Sends a line; `poll` brings the answer."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: the answer will tell
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def poll(self, wait_s: float) -> dict[str, Any] | None:
        """The answer, or None if there is none within this time. Raises RuntimeError if the program ended."""
        try:
            line = self._lines.get(timeout=wait_s)
        except queue.Empty:
            return None
        if not line:
            code = self._process.wait(timeout=10)
            self.close()
            raise RuntimeError(f"{self._name} ended with exit code {code}; its messages are above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def kill(self) -> None:
        """The first half of `close`, for programs that have to end together."""
        self._process.kill()

    def close(self) -> None:
        """Ends the program. Can be called twice."""
        self.kill()
        self._process.wait(timeout=10)
        self._reader.join(timeout=10)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):  # of a line that it did not read any more
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")  # the program ended

    def _answer(self) -> dict[str, Any]:
        answer = self.poll(self._timeout_s)
        if answer is None:
            self.close()
            raise TimeoutError(f"{self._name} did not answer within {self._timeout_s:.0f} s")
        return answer


def time_command(command: Sequence[str], *, timeout_s: float) -> float:
    """Wall seconds of a whole process, imports included. Raises PipeditError, with its last words, if it fails."""
    start = time.perf_counter()
    _run(command, timeout_s=timeout_s)
    return time.perf_counter() - start


def peak_memory_bytes(command: Sequence[str], *, timeout_s: float) -> int:
    """Peak resident memory of a whole process (Linux and macOS), from the operating system's own account. Raises
    PipeditError, with its last words, if it fails."""
    script = (
        "import resource, subprocess, sys; "
        "done = subprocess.run(sys.argv[2:], timeout=float(sys.argv[1]), stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(done.returncode != 0)"
    )
    said = _run([sys.executable, "-c", script, str(timeout_s), *command], timeout_s=timeout_s + 10)
    return int(said) * (1 if sys.platform == "darwin" else 1024)


def answer_of(command: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """The JSON document that a whole process prints. Raises PipeditError, with its last words, if it fails."""
    answer: dict[str, Any] = json.loads(_run(command, timeout_s=timeout_s))
    return answer


def _run(command: Sequence[str], *, timeout_s: float) -> str:
    """What the process wrote to stdout."""
    try:
        done = subprocess.run(command, timeout=timeout_s, check=True, capture_output=True, text=True, errors="replace")
    except subprocess.TimeoutExpired:
        raise PipeditError(f"a measured process took more than {timeout_s:.0f} s: {shlex.join(command)}") from None
    except subprocess.CalledProcessError as error:
        words = error.stderr.strip().splitlines()[-_LAST_LINES:]
        said = [f"a measured process ended with exit code {error.returncode}: {shlex.join(command)}", *words]
        raise PipeditError("\n".join(said)) from None
    return done.stdout
