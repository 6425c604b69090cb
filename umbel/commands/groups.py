"""What all groups of commands share: `-h`, help of arguments, and brackets without backslashes.

Typer 0.20 under Click 8.5 loses the help of arguments and escapes brackets for a markup that
Umbel does not use; Flower allows no newer Typer.
"""

import re
import typing
from collections.abc import Callable
from typing import Any

import click
import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup
from typer.models import ArgumentInfo


class PlainCommand(TyperCommand):
    """A command whose help reads as it was written."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        hints = typing.get_type_hints(self.callback, include_extras=True) if self.callback else {}
        for parameter in self.params:
            if isinstance(parameter, TyperArgument) and not parameter.help:
                parameter.help = _written(hints.get(parameter.name or ""))

    def get_help(self, ctx: click.Context) -> str:
        """The help page."""
        return _readable(super().get_help(ctx))


class PlainGroup(TyperGroup):
    """A group whose help reads as it was written."""

    def get_help(self, ctx: click.Context) -> str:
        """The help page."""
        return _readable(super().get_help(ctx))


class Commands(typer.Typer):
    """A group of commands of `umbel`."""

    def __init__(self, **settings: Any) -> None:
        settings.setdefault("cls", PlainGroup)
        settings.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        settings.setdefault("rich_markup_mode", None)
        super().__init__(**settings)

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a command; the settings are those of `typer.Typer.command`."""
        settings.setdefault("cls", PlainCommand)
        settings.setdefault("context_settings", {"help_option_names": ["-h", "--help"]})
        return super().command(name, **settings)


def _readable(page: str) -> str:
    """A help page without escapes, and with its arguments once: Click and Typer both list them."""
    page = page.replace("\\[", "[")
    once = (
        re.sub(r"(?ms)^Arguments:\n.*?\n\n", "", page) if "Positional arguments:" in page else page
    )
    return once.replace("Positional arguments:", "Arguments:")


def _written(hint: Any) -> str | None:
    """The help in `Annotated[..., typer.Argument(help=...)]`."""
    for extra in getattr(hint, "__metadata__", ()):
        if isinstance(extra, ArgumentInfo):
            return extra.help
    return None
