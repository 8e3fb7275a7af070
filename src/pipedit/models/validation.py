"""Is a request legal for a model? Every problem at once, in the user's words, before anything heavy is imported."""

import dataclasses
import math
import numbers
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipedit.core.prompt_schedule import PromptSchedule
from pipedit.core.request import MAX_SEED, VideoRequest
from pipedit.models.adapter import ModelAdapter, SizeRules
from pipedit.models.noise_schedulers import ignores_flow_shift, most_steps

_COUNTS = ("num_inference_steps", "max_sequence_length")
_SCALES = ("guidance_scale", "guidance_scale_2", "true_cfg_scale")
_FPS = (0.01, 1000)
_TOO_LARGE = 10**9  # for anything but a seed; sums over such numbers would take long or overflow


def check_request(request: VideoRequest, adapter: ModelAdapter) -> list[str]:
    """Problems of a completed request (see `ModelAdapter.complete`); an empty list means that it can run."""
    sound = _without(request, _unusable(request))
    return [
        *check_values(request),
        *size_problems(sound, adapter.size_rules),
        *_schedule_problems(sound, adapter),
        *_length_problems(sound, adapter),
        *adapter.extra_problems(sound),
    ]


def check_values(request: VideoRequest) -> list[str]:
    """The problems that can be seen without knowing the model. Fields may be open."""
    wrong = _unusable(request)
    problems = [*wrong.values(), *_number_problems(_without(request, wrong))]
    if isinstance(request.prompt, str) and not request.prompt.strip():
        problems.append("the prompt is empty; say what the video should show")
    return [*problems, *_schedule_of_prompts_problems(_without(request, wrong))]


def _schedule_of_prompts_problems(request: VideoRequest) -> list[str]:
    try:
        PromptSchedule.of(request.prompt, request.prompts_at, request.fps or 1.0)
    except ValueError as error:
        return [str(error)]
    return []


def sound_request(request: VideoRequest, adapter: ModelAdapter) -> VideoRequest:
    """The completed request with the model's default in place of every value that cannot be computed with, for
    judging the rest. Its sizes may still be illegal."""
    return adapter.complete(_without(request, _unusable(request)))


def _unusable(request: VideoRequest) -> dict[str, str]:
    """Fields whose value is of another type or cannot be computed with, and the sentence about it."""
    problems = {}
    for field in dataclasses.fields(VideoRequest):
        name, value = field.name, getattr(request, field.name)
        if value is None:
            if name == "prompt":
                problems[name] = "prompt is missing; say what the video should show"
            continue
        if "str" in str(field.type):
            problem = _text_problem(name, value)
        else:
            problem = _kind_problem(name, value, is_whole="float" not in str(field.type))
        if problem is not None:
            problems[name] = problem
    return problems


def _text_problem(name: str, value: Any) -> str | None:
    if not isinstance(value, str):
        return f"{name}={value!r} should be str"
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return (
            f"the {name.replace('_', ' ')} holds half a character ({value[error.start]!a}) at position "
            f"{error.start + 1}; type that character again"
        )
    return None


def _kind_problem(name: str, value: Any, *, is_whole: bool) -> str | None:
    """Numbers of other libraries are numbers too; truth values are none."""
    kind: type = numbers.Integral if is_whole else numbers.Real
    if not isinstance(value, kind) or isinstance(value, bool):
        return f"{name}={value!r} should be {'int' if is_whole else 'int or float'}"
    if name != "seed" and isinstance(value, numbers.Integral) and abs(int(value)) > _TOO_LARGE:
        return f"{name} is too large; numbers above {_TOO_LARGE} make no sense here"
    return None


def _without(request: VideoRequest, fields: Iterable[str]) -> VideoRequest:
    """The request with these fields open, so that one mistake is not told twice."""
    opened: dict[str, Any] = dict.fromkeys(fields)
    return dataclasses.replace(request, **opened)


def size_problems(request: VideoRequest, rules: SizeRules) -> list[str]:
    """Sizes that the model cannot make, with the nearest that it can. Open fields are passed over."""
    problems = []
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
    shift, fps = request.flow_shift, request.fps
    if shift is not None and not (math.isfinite(shift) and shift > 0):
        problems.append(f"flow_shift={shift} must be above 0")
    if fps is not None and not _FPS[0] <= fps <= _FPS[1]:
        problems.append(f"fps={fps} must lie between {_FPS[0]} and {_FPS[1]}")
    if request.seed is not None and not 0 <= request.seed <= MAX_SEED:
        shown = f"seed={request.seed}" if abs(request.seed) < 10**30 else "seed"
        problems.append(f"{shown} must lie between 0 and 2^63 - 1")
    return problems


def _schedule_problems(request: VideoRequest, adapter: ModelAdapter) -> list[str]:
    """What the checkpoint's noise scheduler makes no use of."""
    checkpoint, problems = adapter.checkpoint, []
    name, config = checkpoint.component_class("scheduler"), checkpoint.config("scheduler")
    steps, most = request.num_inference_steps, most_steps(config)
    if steps is not None and steps > most:
        problems.append(f"num_inference_steps={steps} is more than this model has noise levels: {most}")
    shift = request.flow_shift
    if shift not in (None, adapter.defaults.flow_shift) and ignores_flow_shift(name, config):
        problems.append(f"flow_shift={shift} has no effect: this checkpoint's noise scheduler has none; leave it out")
    return problems


def _length_problems(request: VideoRequest, adapter: ModelAdapter) -> list[str]:
    problems = []
    texts = [("prompt", request.prompt), ("negative_prompt", request.negative_prompt)]
    if not _schedule_of_prompts_problems(request):
        schedule = PromptSchedule.of(request.prompt, request.prompts_at, request.fps or 1.0)
        texts += [("prompt", text) for text in schedule.prompts if text != request.prompt]
    for name, text in texts:
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
    tokenizer = _load_tokenizer(adapter.checkpoint.tokenizer_folder("tokenizer"))
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

    return AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer


def _shorten(text: str) -> str:
    text = " ".join(text.split())
    return f'"{text}"' if len(text) <= 80 else f'"{text[:77]}..."'
