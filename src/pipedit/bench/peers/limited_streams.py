"""Streams of prompts in a process of its own, so that it can run where links are slow: settings in, JSON out."""

import json
import sys

from pipedit.bench.disaggregation import DisaggregationBench, run

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    bench = DisaggregationBench(**{**given, "only": tuple(given["only"])})
    print(json.dumps({"mixes": run(bench)["mixes"]}))
