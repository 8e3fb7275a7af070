"""One long video in a process of its own: settings in, JSON out."""

import json
import sys

from pipedit.bench.long_video import measure
from pipedit.core.request import VideoRequest
from pipedit.engine.engine import Engine

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    with Engine(**given["engine"]) as engine:
        print(json.dumps(measure(engine, VideoRequest(**given["request"]))))
