"""Names of output files: patterns, names made from prompts, and what is wrong with where they lead.

-o out.mp4               one prompt; with several: out-1.mp4, out-2.mp4, ...
-o "{index}_{seed}.mp4"  placeholders: the number of the prompt, counted from 1, and its seed
nothing                  a-red-ball-moves-right.mp4 in the current folder, with a number if that exists
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pipedit.core.request import VideoRequest
from pipedit.core.staging import target_problems
from pipedit.media import check_output
from pipedit.media.lossless import FrameNames

Number = TypeVar("Number", int, float)
_PLACEHOLDER = re.compile(r"\{(index|seed)\}")
_MAX_SLUG = 60  # characters
_DEFAULT_ENDING = ".mp4"


def name_outputs(
    pattern: str | None, requests: Sequence[VideoRequest], own: Sequence[str | None], *, overwrite: bool
) -> list[str]:
    """One name for each request: its own where it has one, else from the pattern, else from its prompt."""
    names: list[str] = []
    for index, (request, given) in enumerate(zip(requests, own, strict=True), start=1):
        if given is not None:
            names.append(given)
        elif pattern is not None:
            names.append(_fill(pattern, index, request.seed, is_only=len(requests) == 1))
        else:
            names.append(_free_name(request.prompt, taken=names, overwrite=overwrite))
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
    return [*dict.fromkeys(problems), *_existing_problems(writable, overwrite=overwrite), *_collisions(names)]


def file_problems(path: str, *, overwrite: bool, outputs: Sequence[str] = ()) -> list[str]:
    """Why no other file, such as a trace, can be written."""
    if any(Path(path) == Path(output) for output in outputs):
        return [f"{path} is already the name of a video; choose another one"]
    return target_problems(Path(path)) or _existing_problems([path], overwrite=overwrite)


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
    if pattern.endswith("/"):
        return f"{pattern.rstrip('/')}-{index}/"
    stem, ending = os.path.splitext(pattern)
    return f"{stem}-{index}{ending}"


def _free_name(prompt: str, *, taken: Sequence[str], overwrite: bool) -> str:
    stem, number = slug(prompt), 1
    name = stem + _DEFAULT_ENDING
    while name in taken or (not overwrite and os.path.lexists(name)):
        number += 1
        name = f"{stem}-{number}{_DEFAULT_ENDING}"
    return name


def _known(value: Number | None) -> Number | None:
    """A size, as far as it makes sense; that it does not is another check's business."""
    return value if isinstance(value, int | float) and value > 0 else None


def _existing_problems(names: Sequence[str], *, overwrite: bool) -> list[str]:
    found = [] if overwrite else [existing for name in names if (existing := _existing(name)) is not None]
    if not found:
        return []
    if len(found) == 1:
        return [f"{found[0]} exists; choose another name, or add --overwrite to replace it"]
    first = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return [f"{first} exist; choose other names, or add --overwrite to replace them"]


def _existing(name: str) -> str | None:
    """A file that writing to `name` would replace."""
    if name.endswith("/") or name.lower().endswith(".png"):
        names = FrameNames.of(name)
        present = names.present()
        return str(names.folder / names.name(present[0])) if present else None
    return name if os.path.lexists(name) else None


def _collisions(names: Sequence[str]) -> list[str]:
    places: dict[Path, list[int]] = {}
    for number, name in enumerate(names, start=1):
        places.setdefault(Path(os.path.abspath(name)), []).append(number)
    return [
        f"prompts {' and '.join(map(str, numbers))} would be written to the same file {names[numbers[0] - 1]}; "
        "put {index} into the name"
        for numbers in places.values()
        if len(numbers) > 1
    ]
