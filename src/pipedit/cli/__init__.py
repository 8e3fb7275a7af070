"""Talks to people at a terminal, and to scripts: commands, progress, exit codes. Knows no model and no strategy.

stdout carries data (paths, tables that were asked for, one JSON document), stderr everything else.
"""

import sys


def main() -> int:
    """The command `pipedit`; returns the exit code."""
    from pipedit.cli.app import run

    return run(sys.argv[1:])
