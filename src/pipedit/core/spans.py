"""One stretch of work on one rank. Workers and the simulator emit the same spans; one reader understands both."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Span:
    """What a rank did from `start_s` to `end_s` (seconds on the run's clock).

    `what` names the kind of work: "load", "encode", "step", "decode", "write", ...; `index` counts within it (step,
    chunk). `payload_bytes` is what was moved, for communication. `role` is the role that the rank played.
    """

    request_id: str
    rank: int
    role: str
    what: str
    start_s: float
    end_s: float
    index: int | None = None
    block: int | None = None
    payload_bytes: int = 0

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s
