"""How flags are declared: the panels of the help, and the flags that several commands share."""

from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption


def option(*names: str, metavar: str, help: str, panel: str | None = None) -> Any:
    """A flag with a value."""
    return typer.Option(*names, help=help, rich_help_panel=panel, metavar=metavar, show_default=False)


def switch(*names: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """A flag without a value."""
    return typer.Option(*names, help=help, rich_help_panel=panel, show_default=False, **more)


def default(value: str) -> str:
    """For the end of a help text, where the default is not the declared one."""
    return f"[dim](default: {value})[/dim]"


JsonFlag = Annotated[bool, switch("--json", help="Print one JSON document.")]
QuietFlag = Annotated[bool, switch("--quiet", "-q", help="Nothing on stderr but errors.")]


class Command(TyperCommand):
    """A command with a tidy help."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _tidy(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands with a tidy help."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _tidy(super().get_params(ctx))


def _tidy(params: list[Any]) -> list[Any]:
    """No type behind flags that take no value, and --help in the panel of the flag before it."""
    for param in params:
        if isinstance(param, TyperOption) and param.is_flag:
            param.metavar = ""
    if len(params) > 1:
        params[-1].rich_help_panel = getattr(params[-2], "rich_help_panel", None)
    return params
