"""Prompts for stretches of time: how they are read, and which frames belong to which."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipedit.core.prompt_schedule import PromptSchedule, Stretch


def schedule(text: str | None, fps: float = 16.0) -> list[tuple[int, str]]:
    return [(s.first_frame, s.prompt) for s in PromptSchedule.of("start", text, fps).stretches]


def test_frames_and_seconds() -> None:
    assert schedule(None) == [(0, "start")]
    assert schedule('30s:"later"') == [(0, "start"), (480, "later")]
    assert schedule('0:"a",100:"b", 10.5s : "c, d: \\"e\\"",') == [(0, "a"), (100, "b"), (168, 'c, d: "e"')]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("30s:later", "cannot be read"),
        ('30:"a"40:"b"', "cannot be read"),
        ('1.5:"a"', "for seconds write 1.5s"),
        ('5s:"a",80:"b"', "does not come after"),
        ('5s:" "', "is empty"),
        (f'{10**400}s:"a"', "no number of frames"),
    ],
)
def test_what_cannot_be_read_is_told(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        schedule(text)


@given(cuts=st.sets(st.integers(1, 40), max_size=5), first=st.integers(0, 45), length=st.integers(1, 20))
def test_shares_count_frames(cuts: set[int], first: int, length: int) -> None:
    starts = [0, *sorted(cuts)]
    made = PromptSchedule(stretches=tuple(Stretch(first_frame=start, prompt="x") for start in starts))
    belongs = [max(n for n, start in enumerate(starts) if start <= frame) for frame in range(first, first + length)]
    expected = tuple((n, Fraction(belongs.count(n), length)) for n in sorted(set(belongs)))
    assert made.shares(first, first + length) == expected
