"""Makes the pictures of the README with the embedded model: python docs/make_pictures.py"""

from pathlib import Path

import numpy as np

import pipedit
from pipedit.media import contact_sheet, evenly, save_picture
from pipedit.plan.timeline import Timeline

IMAGES = Path(__file__).parent / "images"
PROMPTS = (
    "a red ball moves right",
    "a blue square grows on a white background",
    "a green triangle bounces up and down on a navy background",
    "an orange circle falls, gray background",
    "a pink triangle shrinks on a maroon background",
)
COLUMNS = 9


def main() -> None:
    with pipedit.Engine(device="cpu") as engine:
        clips = [video.frames for video in engine.generate(PROMPTS, seed=0)]
        timeline = engine.timeline()
    frames = np.concatenate([evenly(clip, COLUMNS) for clip in clips])
    sheet = contact_sheet(frames, columns=COLUMNS, scale=2, row_titles=PROMPTS)
    sheet.save(IMAGES / "clips.png", optimize=True)
    named = Timeline(spans=timeline.spans, metadata={**timeline.metadata, "title": "five prompts on one worker"})
    save_picture(named, str(IMAGES / "timeline.svg"))


if __name__ == "__main__":
    main()
