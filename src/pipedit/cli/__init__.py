"""Talks to people at a terminal, and to scripts: commands, progress, exit codes. Knows no model and no strategy.

stdout carries data (paths, tables that were asked for, one JSON document), stderr everything else.
"""

import sys

from pipedit.cli import garbage


def main() -> int:
    """The command `pipedit`; returns the exit code."""
    garbage.postpone()
    from pipedit.cli.app import run

    try:
        return run(sys.argv[1:])
    finally:
        garbage.leave_to_the_system()
