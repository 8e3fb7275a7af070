"""Ours, spoken to like the peer: python pipedit_engine.py FOLDER SETTINGS, then a line on stdin for each run."""

import json
import sys
import time
from typing import Any

from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine


def serve(folder: str, settings: dict[str, Any]) -> None:
    device, dtype = settings.pop("device"), settings.pop("dtype")
    compiled, _ = settings.pop("compile"), settings.pop("precision")
    with Engine(folder, device=device, dtype=dtype, compile_layers=compiled) as engine:
        engine.start()
        print(json.dumps({"ready": True}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            (video,) = engine.generate(VideoRequest(**settings))
            seconds = time.perf_counter() - start
            print(json.dumps({"seconds": seconds, "frames": len(video.frames), "stages": video.seconds}), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
