"""`python -m pipedit.worker` is one worker process. Executors start it; it is of no use by hand."""

import sys

from pipedit.worker.process import run_process

run_process(sys.argv[1:])
