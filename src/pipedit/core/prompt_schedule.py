"""Different prompts for different stretches of a long video, as people write them and as shares of a run of frames.

As text: `0:"a red ball",30s:"a blue ball",1500:"nothing"`. A time is a number of frames, or of seconds with an s; each
prompt holds from there to the next one.
"""

import dataclasses
import itertools
import math
import re
from fractions import Fraction

_ENTRY = re.compile(
    r'\s*(?P<time>\d+(?:\.\d+)?)(?P<unit>s?)\s*:\s*"(?P<prompt>(?:[^"\\]|\\.)*)"\s*(?P<end>,|$)', re.DOTALL
)
_EXAMPLE = '0:"a red ball",30s:"a blue ball"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """From frame `first_frame` on."""

    first_frame: int
    prompt: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptSchedule:
    """Stretches in order of time; the first one begins with the video."""

    stretches: tuple[Stretch, ...]

    @classmethod
    def of(cls, prompt: str, prompts_at: str | None, fps: float) -> "PromptSchedule":
        """`prompt` until `prompts_at` names another one. Raises ValueError with a sentence for what makes no sense."""
        entries = [] if prompts_at is None else _entries(prompts_at, fps)
        if not entries or entries[0].first_frame > 0:
            entries.insert(0, Stretch(first_frame=0, prompt=prompt))
        return cls(stretches=tuple(entries))

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(stretch.prompt for stretch in self.stretches)

    def shares(self, first: int, stop: int) -> tuple[tuple[int, Fraction], ...]:
        """Of the frames from `first` to before `stop`: which stretches they belong to, by number, and with which part
        of them."""
        assert stop > first >= 0, (first, stop)
        ends = [*(stretch.first_frame for stretch in self.stretches[1:]), stop]
        found = []
        for number, (stretch, end) in enumerate(zip(self.stretches, ends, strict=True)):
            frames = min(end if number + 1 < len(ends) else stop, stop) - max(stretch.first_frame, first)
            if frames > 0:
                found.append((number, Fraction(frames, stop - first)))
        return tuple(found)


def _entries(text: str, fps: float) -> list[Stretch]:
    found: list[Stretch] = []
    place = 0
    while place < len(text):
        entry = _ENTRY.match(text, place)
        if entry is None:
            raise ValueError(f"prompts_at cannot be read from {_shown(text[place:])} on; write it like {_EXAMPLE}")
        found.append(_stretch(entry, fps))
        place = entry.end()
    if not found:
        raise ValueError(f"prompts_at is empty; write it like {_EXAMPLE}")
    for before, after in itertools.pairwise(found):
        if after.first_frame <= before.first_frame:
            raise ValueError(f"prompts_at: {_shown(after.prompt)} does not come after {_shown(before.prompt)}")
    return found


def _stretch(entry: "re.Match[str]", fps: float) -> Stretch:
    time = float(entry["time"])
    frame = time * fps if entry["unit"] else time
    if not math.isfinite(frame) or (not entry["unit"] and not time.is_integer()):
        raise ValueError(f"prompts_at: {entry['time']} is no number of frames; for seconds write {entry['time']}s")
    prompt = re.sub(r"\\(.)", r"\1", entry["prompt"])
    if not prompt.strip():
        raise ValueError(f"prompts_at: the prompt at {entry['time']}{entry['unit']} is empty")
    return Stretch(first_frame=round(frame), prompt=prompt)


def _shown(text: str) -> str:
    return f'"{text if len(text) <= 40 else text[:37] + "..."}"'
