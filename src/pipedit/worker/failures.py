"""From an exception in the midst of a command to the event that reports it. Knows no models and no links."""

import pickle
import traceback

from pipedit.core import messages
from pipedit.core.errors import PipeditError, WorkerError
from pipedit.core.messages import Command, CommandFailed

_DOING = {
    messages.Encode: "encoding the prompt",
    messages.Denoise: "denoising",
    messages.DenoiseBlocks: "denoising",
    messages.Decode: "decoding",
    messages.DecodeBlock: "decoding",
    messages.SaveBlocks: "saving the run",
    messages.Release: "releasing a request",
}


def doing(command: Command) -> str:
    """What a worker is at with this command, in words."""
    return _DOING[type(command)]


def command_failed(command: Command, rank: int, error: Exception) -> CommandFailed:
    """The event for an error within this process. What was not raised on purpose becomes the cause of a WorkerError."""
    # Whoever keeps the error must not keep the tensors of the stage that failed.
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    if not isinstance(error, PipeditError):
        original, error = error, _unexpected(error, rank, doing(command))
        error.__cause__ = original
    return CommandFailed(request_id=command.request_id, rank=rank, doing=doing(command), error=error)


def portable(error: Exception, *, rank: int, doing: str) -> PipeditError:
    """The error as it can be sent to another process: raised on purpose, and with the traceback as a note."""
    text = "".join(traceback.format_exception(error)).rstrip()
    sent = error if isinstance(error, PipeditError) and _is_picklable(error) else _unexpected(error, rank, doing)
    sent.add_note(f"On worker {rank}:\n{text}")
    return sent


def _unexpected(error: Exception, rank: int, doing: str) -> WorkerError:
    return WorkerError(f"{type(error).__name__}: {error}", rank=rank, doing=doing)


def _is_picklable(error: PipeditError) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:  # noqa: BLE001 - whatever hinders it, it cannot be sent
        return False
