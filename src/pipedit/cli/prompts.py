"""What is asked for: prompts on the command line, prompt files, and files to be like. Knows no engine.

Later sources win: the file given with --like, then a line of a prompt file, then flags on the command line.
"""

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipedit.core.errors import InvalidRequestError
from pipedit.core.request import VideoRequest
from pipedit.engine.intake import unknown_settings
from pipedit.media import VideoMetadata, read_metadata

STDIN = "-"
_JSON_LINES = (".jsonl", ".ndjson")
_TEXT_FIELDS = ("prompt", "output")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wish:
    """One video as somebody asked for it. `source` says where, such as "prompts.txt:3"; "" on the command line."""

    prompt: str
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    output: str | None = None
    source: str = ""

    def request(self, like: dict[str, Any], flags: dict[str, Any]) -> VideoRequest:
        return VideoRequest(prompt=self.prompt, **{**like, **self.settings, **flags})


def gather_wishes(
    prompts: Sequence[str], prompt_file: str | None, like: VideoMetadata | None
) -> tuple[list[Wish], list[str]]:
    """All wishes in order, and what is wrong with their sources. Without any prompt, the one of `like` counts."""
    wishes, problems = [Wish(prompt=prompt) for prompt in prompts], []
    if prompt_file is not None:
        try:
            lines = _read_lines(prompt_file)
        except OSError as error:
            problems.append(f"the prompt file {prompt_file} cannot be read: {error.strerror}")
        except UnicodeDecodeError:
            problems.append(f"the prompt file {prompt_file} is not UTF-8 text")
        else:
            found, problems = _read_wishes(lines, prompt_file)
            wishes += found
    elif not wishes and like is not None:
        wishes = [Wish(prompt=like.prompt)]
    return wishes, problems


def labels_of(wishes: Sequence[Wish]) -> list[str]:
    """How to name each wish in a problem: its source, or its number where there are several."""
    if len(wishes) == 1 and not wishes[0].source:
        return [""]
    return [wish.source or f"prompt {number}" for number, wish in enumerate(wishes, start=1)]


def read_like(path: str) -> VideoMetadata:
    """The settings of a file that pipedit made. Raises InvalidRequestError, also for settings of newer versions."""
    metadata = read_metadata(path)
    try:
        metadata.request()
    except InvalidRequestError as error:
        raise InvalidRequestError([f"{path}: {problem}" for problem in error.problems]) from error
    return metadata


def dtype_of(metadata: VideoMetadata) -> str:
    """The value of --dtype that makes the file again: the data type of all parts, or "auto" if they differ, which
    only "auto" does."""
    parts = metadata.extra.get("dtype")
    found = {str(value) for value in parts.values()} if isinstance(parts, dict) else set()
    return found.pop() if len(found) == 1 else "auto"


def _read_lines(prompt_file: str) -> list[str]:
    if prompt_file == STDIN:
        if sys.stdin is None:
            raise OSError(errno.EBADF, "stdin is closed")
        return sys.stdin.read().splitlines()
    # Not str.splitlines on the whole: JSON may hold line separators of Unicode inside a string.
    return Path(prompt_file).read_text(encoding="utf-8-sig").split("\n")


def _read_wishes(lines: Iterable[str], prompt_file: str) -> tuple[list[Wish], list[str]]:
    """Blank lines are passed over; the file must hold something else."""
    wishes, problems = [], []
    name = "stdin" if prompt_file == STDIN else prompt_file
    ending = os.path.splitext(prompt_file)[1].lower()
    if ending == ".json":
        return [], [f"{name}: write one JSON object a line, and end the name in .jsonl"]
    is_json = ending in _JSON_LINES
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        source = f"{name}:{number}"
        wish = _parse(line, source) if is_json else Wish(prompt=line.strip(), source=source)
        if isinstance(wish, Wish):
            wishes.append(wish)
        else:
            problems += [f"{source}: {problem}" for problem in wish]
    if not wishes and not problems:
        problems = [f"the prompt file {name} holds no prompt"]
    return wishes, problems


def _parse(line: str, source: str) -> Wish | list[str]:
    """One line of JSON, or what is wrong with it."""
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return [f"not JSON: {error.msg} at column {error.colno}"]
    except ValueError:  # the other one: Python limits the digits of a number
        return ["it holds a number of thousands of digits; write a smaller one"]
    except RecursionError:
        return ['lists or objects are nested too deeply; write one object such as {"prompt": "a red ball"}']
    if not isinstance(values, dict):
        return ['each line must be a JSON object, such as {"prompt": "a red ball moves right", "seed": 1}']
    settings = {name: value for name, value in values.items() if name not in _TEXT_FIELDS}
    problems = [] if "prompt" in values else ['there is no "prompt"']
    problems += [f'"{n}" must be text' for n in _TEXT_FIELDS if n in values and not isinstance(values[n], str)]
    problems += unknown_settings(settings)
    if problems:
        return problems
    return Wish(prompt=values["prompt"], settings=settings, output=values.get("output"), source=source)
