"""Neighbouring spans that are too narrow to see become one box, so that a picture has no more boxes than its width."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

from pipedit.core.spans import Span

Key = TypeVar("Key", bound=Hashable)
_NARROW, _GAP = 1.5, 1.0  # pixels: what cannot be told from its neighbour, what cannot be seen between two


@dataclasses.dataclass(frozen=True, kw_only=True)
class Box(Generic[Key]):
    """Spans drawn as one, from `left` to `right` in pixels. Most of their time belongs to `key`."""

    left: float
    right: float
    key: Key
    spans: tuple[Span, ...]

    @property
    def width(self) -> float:
        return self.right - self.left


def merge_narrow(
    spans: Iterable[Span],
    edges: Callable[[Span], tuple[float, float]],
    key: Callable[[Span], Key],
    *,
    join_same: bool = False,
) -> list[Box[Key]]:
    """Boxes from left to right. `edges` gives a span's left and right end in pixels, `key` what it is drawn as.

    Narrow spans join a neighbour that they touch if it is of the same key or narrow too. With `join_same`, all that
    follow each other with the same key become one box, however far apart. At most two boxes a pixel come out.
    """
    boxes: list[_OpenBox[Key]] = []
    for span in sorted(spans, key=lambda span: span.start_s):
        left, right = edges(span)
        if not boxes or not boxes[-1].takes(left, right, key(span), join_same):
            boxes.append(_OpenBox(left=left, right=right))
        boxes[-1].add(span, right, key(span))
    return [box.closed() for box in boxes]


@dataclasses.dataclass(kw_only=True)
class _OpenBox(Generic[Key]):
    """A box that may still grow."""

    left: float
    right: float
    spans: list[Span] = dataclasses.field(default_factory=list)
    seconds: dict[Key, float] = dataclasses.field(default_factory=dict)
    key: Key | None = None

    def takes(self, left: float, right: float, key: Key, join_same: bool) -> bool:
        if key == self.key and join_same:
            return True
        is_narrow, was_narrow = right - left < _NARROW, self.right - self.left < _NARROW
        return left - self.right < _GAP and is_narrow and (key == self.key or was_narrow)

    def add(self, span: Span, right: float, key: Key) -> None:
        self.right = max(self.right, right)
        self.spans.append(span)
        self.seconds[key] = self.seconds.get(key, 0.0) + span.duration_s
        if self.key is None or self.seconds[key] > self.seconds[self.key]:
            self.key = key

    def closed(self) -> Box[Key]:
        assert self.key is not None, "a box was made without a span"
        return Box(left=self.left, right=self.right, key=self.key, spans=tuple(self.spans))
