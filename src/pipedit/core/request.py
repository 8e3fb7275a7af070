"""What a person asks for. A request says nothing of workers or strategies: those must not change the video."""

import dataclasses
from typing import Any

MAX_SEED = 2**63 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoRequest:
    """One video. A field left at None takes the model's default (see `complete`).

    Sizes are in pixels, `num_frames` counts pixel frames, `fps` only sets the speed of the written file.
    `guidance_scale_2` belongs to the low-noise expert of two-expert models (Wan 2.2 A14B); `true_cfg_scale` is
    HunyuanVideo's classifier-free guidance, off at 1. The same seed gives the same video on any number of workers.
    `prompts_at`: other prompts for later stretches of a long video (see core.prompt_schedule).
    """

    prompt: str
    negative_prompt: str | None = None
    prompts_at: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    flow_shift: float | None = None
    max_sequence_length: int | None = None
    seed: int | None = None

    def complete(self, defaults: "RequestDefaults") -> "VideoRequest":
        """The same request with every open field filled from the model's defaults. The seed stays as it is."""
        open_fields = {k: v for k, v in dataclasses.asdict(defaults).items() if getattr(self, k) is None}
        return dataclasses.replace(self, **open_fields)

    def settings(self) -> dict[str, Any]:
        """Every field but the prompt that is set, as plain values: what metadata and logs show."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "prompt" and v is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RequestDefaults:
    """What a model takes where the request is silent. None: the model has no such setting."""

    height: int
    width: int
    num_frames: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int
    negative_prompt: str | None = None
    guidance_scale_2: float | None = None
    true_cfg_scale: float | None = None
    flow_shift: float | None = None


FIELD_NAMES = tuple(field.name for field in dataclasses.fields(VideoRequest))
