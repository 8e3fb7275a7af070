"""`python -m pipedit` is the command `pipedit`."""

import sys

from pipedit.cli import main

sys.exit(main())
