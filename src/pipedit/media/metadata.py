"""How a video was made, carried inside its file: enough to make it again. Knows JSON, but no file format."""

import dataclasses
import datetime
import json
from typing import Any

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import FIELD_NAMES, VideoRequest
from pipedit.core.version import __version__

_MARK, _MARK_VALUE = "made_by", "pipedit"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoMetadata:
    """What made a video. `settings` are the request's fields besides the prompt (see `VideoRequest.settings`).

    `version` is pipedit's; `created` is UTC in ISO 8601. `extra` says how it ran: device, dtype, strategy. All values
    must be plain JSON values.
    """

    prompt: str
    model: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    version: str = __version__
    created: str = dataclasses.field(default_factory=_now)
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, request: VideoRequest, *, model: str, extra: dict[str, Any] | None = None) -> "VideoMetadata":
        """Metadata of a request that is made now. Give the completed request, so that defaults are kept too."""
        return cls(prompt=request.prompt, model=model, settings=request.settings(), extra=extra or {})

    def request(self) -> VideoRequest:
        """The request that makes the video again. Raises InvalidRequestError for settings unknown to this version."""
        unknown = sorted(set(self.settings) - (set(FIELD_NAMES) - {"prompt"}))
        if unknown:
            names = ", ".join(unknown)
            raise InvalidRequestError([f"the video was made with settings that this pipedit does not know: {names}"])
        return VideoRequest(prompt=self.prompt, **self.settings)

    def to_json(self, *, indent: int | None = None) -> str:
        """Pure ASCII, so that it survives every container: GIF comments are ASCII, MP4 tags must be valid UTF-8."""
        return json.dumps({_MARK: _MARK_VALUE, **dataclasses.asdict(self)}, indent=indent, allow_nan=False)

    @property
    def title(self) -> str:
        """The prompt as a container tag takes it: valid Unicode without NUL characters."""
        return self.prompt.encode("utf-8", "replace").decode("utf-8").replace("\0", " ")


def parse_metadata(text: str | None, *, source: str) -> VideoMetadata:
    """The opposite of `to_json`. Raises InvalidRequestError, naming `source`, where the text is absent or foreign."""
    problem = f"{source} holds no pipedit settings: it was not made by pipedit, or another program has removed them"
    try:
        values = json.loads(text or "")
    except (ValueError, RecursionError):  # no JSON, or none of ours: a number of thousands of digits, endless nesting
        raise InvalidRequestError([problem]) from None
    if not isinstance(values, dict) or values.pop(_MARK, None) != _MARK_VALUE:
        raise InvalidRequestError([problem])
    kinds = {"prompt": str, "model": str, "settings": dict, "version": str, "created": str, "extra": dict}
    broken = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
    if broken:
        raise InvalidRequestError([f"the pipedit settings in {source} are damaged: no valid {', '.join(broken)}"])
    return VideoMetadata(**{name: values[name] for name in kinds})
