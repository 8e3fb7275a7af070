"""Names of output files: patterns, names made from prompts, and what is wrong with where they lead.

-o out.mp4               one prompt; with several: out-1.mp4, out-2.mp4, ...
-o "{index}_{seed}.mp4"  placeholders: the number of the prompt, counted from 1, and its seed
nothing                  a-red-ball-moves-right.mp4 in the current folder, with a number if that exists

Files that exist are refused before the work, and never replaced after it (see `pipedit.media.open_writer`).
"""

import os
import re
import unicodedata
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TypeVar

from pipedit.core.request import VideoRequest
from pipedit.core.staging import target_problems, text_problems
from pipedit.media import check_output, existing_files, files_of, numbered

Number = TypeVar("Number", int, float)
_PLACEHOLDER = re.compile(r"\{(index|seed)\}")
_MAX_SLUG = 60  # characters
_DEFAULT_ENDING = ".mp4"
_SENSELESS = 1e12  # sizes, rates and counts from here on: refused for other reasons
_MOST_FRAMES = 10_000  # whose names are looked at: more are refused for other reasons


def name_outputs(
    pattern: str | None, requests: Sequence[VideoRequest], own: Sequence[str | None], *, overwrite: bool
) -> list[str]:
    """One name for each request: its own where it has one, else from the pattern, else from its prompt."""
    names: list[str] = []
    reserved = [name for name in own if name is not None]
    for index, (request, given) in enumerate(zip(requests, own, strict=True), start=1):
        if given is not None:
            names.append(given)
        elif pattern is not None:
            names.append(_fill(pattern, index, request.seed, is_only=len(requests) == 1))
        else:
            names.append(_free_name(name_of_prompt(request.prompt), taken=[*reserved, *names], overwrite=overwrite))
    return names


def output_problems(
    names: Sequence[str], requests: Sequence[VideoRequest], *, pattern: str | None, overwrite: bool
) -> list[str]:
    """Why the clips cannot be written, one sentence each. Requests should have their defaults filled in."""
    problems, writable = [], []
    for name, request in zip(names, requests, strict=True):
        found = check_output(
            name,
            width=_known(request.width),
            height=_known(request.height),
            fps=_known(request.fps),
            num_frames=_known(request.num_frames),
        )
        # What is wrong with a pattern is wrong with every name made of it: said once, of the pattern.
        problems += [text.replace(name, pattern) for text in found] if pattern is not None else found
        writable += [] if found else [name]
    existing = [str(file) for name in writable for file in existing_files(name)[:1]]
    collisions = _collisions(names, [output_files(*pair) for pair in zip(names, requests, strict=True)])
    return [*dict.fromkeys(problems), *_existing_problems(existing, overwrite=overwrite), *collisions]


def output_files(name: str, request: VideoRequest) -> list[str]:
    """Every file that the clip becomes, each in the one form that tells it from others. Empty for what is no name."""
    if not name or text_problems(name):
        return []
    files = files_of(name, min(_known(request.num_frames) or 1, _MOST_FRAMES))
    folder = os.path.realpath(files[0].parent)
    return [os.path.join(folder, file.name) for file in files]


def file_problems(path: str, *, overwrite: bool, taken: Collection[str] = ()) -> list[str]:
    """Why no other file, such as a trace, can be written. `taken` are the files of the videos (see `output_files`)."""
    if found := target_problems(Path(path)):
        return found
    if os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)) in taken:
        return [f"{path} is already the name of a video or of a part of one; choose another one"]
    return _existing_problems([path] if os.path.lexists(path) else [], overwrite=overwrite)


def name_of_prompt(prompt: str) -> str:
    """The file that a prompt gets where none is named."""
    return slug(prompt) + _DEFAULT_ENDING


def slug(prompt: str) -> str:
    """A file name of the prompt's words, in any script: "A red ball, moving!" -> "a-red-ball-moving"."""
    words = re.findall(r"\w+", unicodedata.normalize("NFKC", prompt).lower())
    text = ""
    for word in words:
        longer = f"{text}-{word}" if text else word
        if len(longer) > _MAX_SLUG:
            break
        text = longer
    return text or (words[0][:_MAX_SLUG] if words else "video")


def _fill(pattern: str, index: int, seed: int | None, *, is_only: bool) -> str:
    values = {"index": str(index), "seed": str(seed)}
    if is_only or _PLACEHOLDER.search(pattern):
        return _PLACEHOLDER.sub(lambda match: values[match[1]], pattern)
    return numbered(pattern, index)


def _free_name(series: str, *, taken: Sequence[str], overwrite: bool) -> str:
    name, number = series, 1
    while name in taken or (not overwrite and os.path.lexists(name)):
        number += 1
        name = numbered(series, number)
    return name


def _known(value: Number | None) -> Number | None:
    """A size, as far as it makes sense; that it does not is another check's business."""
    return value if isinstance(value, int | float) and 0 < value < _SENSELESS else None


def _existing_problems(found: Sequence[str], *, overwrite: bool) -> list[str]:
    if overwrite or not found:
        return []
    if len(found) == 1:
        return [f"{found[0]} exists; choose another name, or add --overwrite to replace it"]
    first = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"{first} exist; choose other names, or add --overwrite to replace them"]


def _collisions(names: Sequence[str], files: Sequence[Sequence[str]]) -> list[str]:
    """A sentence for each group of prompts that share a file, with the first one that they share."""
    writers: dict[str, list[int]] = {}
    for number, of_one in enumerate(files, start=1):
        for file in of_one:
            writers.setdefault(file, []).append(number)
    shared: dict[tuple[int, ...], str] = {}
    for file, numbers in writers.items():
        if len(numbers) > 1:
            same_name = len({names[number - 1] for number in numbers}) == 1
            shared.setdefault(tuple(numbers), names[numbers[0] - 1] if same_name else os.path.relpath(file))
    return [
        f"prompts {' and '.join(map(str, numbers))} would be written to the same file {file}; "
        "put {index} into the name"
        for numbers, file in shared.items()
    ]
