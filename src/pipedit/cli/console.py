"""Where words go: data to stdout, everything else to stderr, and what every command gets handed.

With --json the one document that a command makes is printed at its very end, whether it went well or not.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.text import Text

if TYPE_CHECKING:
    from pipedit.engine.engine import Engine
    from pipedit.engine.settings import EngineSettings

_WIDE = 200  # columns, where nobody looks at a terminal: tables are not cut for a width that is only guessed


class Terminal:
    """Both streams. Plain lines are never wrapped or coloured by content, so that they can be searched and piped."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.err = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.out = Console(highlight=False, markup=False, emoji=False)
        for console, stream in ((self.err, sys.stderr), (self.out, sys.stdout)):
            if not stream.isatty() and "COLUMNS" not in os.environ:
                console.width = _WIDE

    @property
    def is_live(self) -> bool:
        """Whether bars can be redrawn: a real terminal reads stderr. Colours may be forced on pipes, bars not."""
        return self.err.is_interactive and sys.stderr.isatty()

    @property
    def shows_data(self) -> bool:
        """Whether who reads stderr sees stdout too."""
        return sys.stdout.isatty()

    def data(self, text: str) -> None:
        """One line of data. Bytes, because a path need not be valid text."""
        typer.echo(os.fsencode(text))

    def table(self, renderable: RenderableType) -> None:
        """Data laid out for people."""
        if self.out.is_terminal:
            self.out.print(renderable)
            return
        with self.out.capture() as capture:
            self.out.print(renderable)
        typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))

    def document(self, value: Any) -> None:
        typer.echo(json.dumps(value, indent=2))

    def say(self, text: RenderableType, *, style: str | None = None) -> None:
        """Anything that --quiet silences."""
        if not self.quiet:
            self.err.print(text, style=style, soft_wrap=isinstance(text, str | Text))

    def note(self, text: str) -> None:
        self.say(Text.assemble(("note: ", "bold cyan"), text))

    def error(self, text: str) -> None:
        self.err.print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)

    def hint(self, text: str) -> None:
        self.err.print(Text.assemble(("hint: ", "bold cyan"), text), soft_wrap=True)


def replace_closed_streams() -> None:
    """What a shell has closed (`>&-`) becomes the null device: nobody reads it, and no file gets its number."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # each gets the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - lives as long as the process


@dataclasses.dataclass(kw_only=True)
class Session:
    """What a command works with. `report` becomes the JSON document: commands fill it as they go.

    `open_engine` makes the engine, so that tests can bring one without a model.
    """

    open_engine: "Callable[[EngineSettings], Engine]"
    terminal: Terminal = dataclasses.field(default_factory=Terminal)
    as_json: bool = False
    debug: bool = False
    report: dict[str, Any] = dataclasses.field(default_factory=dict)


def session_of(context: typer.Context) -> Session:
    session = context.obj
    assert isinstance(session, Session)
    return session
