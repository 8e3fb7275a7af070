"""Is a request legal for a model? Every problem at once, in the user's words, before anything heavy is imported."""

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipedit.core.request import MAX_SEED, VideoRequest
from pipedit.models.adapter import ModelAdapter

_COUNTS = ("num_inference_steps", "max_sequence_length")
_SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")


def check_request(request: VideoRequest, adapter: ModelAdapter) -> list[str]:
    """Problems of a completed request (see `VideoRequest.complete`); an empty list means that it can run."""
    sound = _without(request, _wrong_types(request))
    return [
        *check_values(request),
        *_size_problems(sound, adapter),
        *_length_problems(sound, adapter),
        *adapter.extra_problems(sound),
    ]


def check_values(request: VideoRequest) -> list[str]:
    """The problems that can be seen without knowing the model. Fields may be open."""
    wrong = _wrong_types(request)
    problems = [*wrong.values(), *_number_problems(_without(request, wrong))]
    if isinstance(request.prompt, str) and not request.prompt.strip():
        problems.append("the prompt is empty; say what the video should show")
    return problems


def _wrong_types(request: VideoRequest) -> dict[str, str]:
    """Fields whose value is of another type, and the sentence about it."""
    problems = {}
    for field in dataclasses.fields(VideoRequest):
        value = getattr(request, field.name)
        kinds: tuple[type, ...] = (int, float) if "float" in str(field.type) else (int,)
        if "str" in str(field.type):
            kinds = (str,)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            problems[field.name] = f"{field.name}={value!r} should be {wanted}"
    return problems


def _without(request: VideoRequest, fields: Iterable[str]) -> VideoRequest:
    """The request with these fields open, so that one mistake is not told twice."""
    opened: dict[str, Any] = dict.fromkeys(fields)
    return dataclasses.replace(request, **opened)


def _size_problems(request: VideoRequest, adapter: ModelAdapter) -> list[str]:
    rules, problems = adapter.size_rules, []
    frames, step = request.num_frames, rules.frame_step
    if frames is not None and (frames < 1 or (frames - 1) % step):
        near = _nearest_text(frames - 1, step, 0, 1)
        problems.append(f"num_frames={frames} is not {step}n+1; the nearest are {near}")
    for name in ("height", "width"):
        size = getattr(request, name)
        if size is not None and (size < 1 or size % rules.size_multiple):
            near = _nearest_text(size, rules.size_multiple, rules.size_multiple, 0)
            problems.append(f"{name}={size} is not a multiple of {rules.size_multiple}; the nearest are {near}")
    return problems


def _nearest_text(value: int, step: int, least: int, offset: int) -> str:
    below = max(value // step * step, least)
    above = max(below + step, least)
    return f"{below + offset} and {above + offset}"


def _number_problems(request: VideoRequest) -> list[str]:
    problems = []
    for name in _COUNTS:
        value = getattr(request, name)
        if value is not None and value < 1:
            problems.append(f"{name}={value} must be at least 1")
    for name in _SCALES:
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            problems.append(f"{name}={value} must be a number of at least 0")
    for name in ("fps", "flow_shift"):
        value = getattr(request, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            problems.append(f"{name}={value} must be above 0")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        problems.append(f"seed={request.seed} must lie between 0 and 2^63 - 1")
    return problems


def _length_problems(request: VideoRequest, adapter: ModelAdapter) -> list[str]:
    problems = []
    for name in ("prompt", "negative_prompt"):
        text = getattr(request, name)
        limit = request.max_sequence_length
        if isinstance(text, str) and isinstance(limit, int) and limit > 0 and (rest := _cut_off(adapter, text, limit)):
            problems.append(
                f"the {name.replace('_', ' ')} is longer than {limit} tokens; this would be cut: {_shorten(rest)}"
            )
    return problems


def _cut_off(adapter: ModelAdapter, text: str, limit: int) -> str:
    """The end of the text that does not fit into `limit` tokens, "" if all of it does."""
    # Every token covers at least one byte, so that most prompts need no tokenizer (real ones take a second to load).
    if len(text.encode()) + 2 <= limit:
        return ""
    tokenizer = _load_tokenizer(adapter.checkpoint.path("tokenizer"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    frame, prompt = adapter.prompt_frame, adapter.clean_prompt(text)
    encoding = tokenizer.encode(frame.before + prompt + frame.after)
    # Truncation keeps the tokens that the tokenizer itself adds at the ends, and cuts the text before them.
    offsets = [o for o, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special]
    kept = frame.cropped_tokens + limit - (len(encoding.ids) - len(offsets))
    if len(offsets) <= kept:
        return ""
    return prompt[max(offsets[kept][0] - len(frame.before), 0) :]  # "" where only the frame's end is cut


def _load_tokenizer(folder: Path) -> Any:
    if (folder / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(folder / "tokenizer.json"))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder).backend_tokenizer


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= 80 else f'"{text[:77]}..."'
