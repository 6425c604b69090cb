"""Writes `command-line.md` from the commands themselves: python docs/write_command_line.py"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import click
import typer
from typer.core import TyperArgument

from umbel.commands import cli
from umbel.commands.groups import Commands

PAGE = Path(__file__).resolve().parent / "command-line.md"
HEAD = """# Command line

Written by `python docs/write_command_line.py`; `umbel COMMAND --help` says the same. Exit status: 0
done; 1 the run failed; 2 bad usage or configuration; 3 a check failed; 130 stopped by Ctrl-C.
Results go to stdout, everything else to stderr.
"""


def whole() -> click.Command:
    """The command `umbel` with all its groups."""
    root = Commands(name="umbel", help="Federated learning on Flower.", no_args_is_help=True)
    root.registered_commands = list(cli.app.registered_commands)
    root.registered_callback = cli.app.registered_callback
    root.registered_groups = [g for g in cli.app.registered_groups if g.name not in cli._GROUPS]
    for name, text in cli._GROUPS.items():
        root.add_typer(importlib.import_module(f"umbel.commands.{name}").app, name=name, help=text)
    return typer.main.get_command(root)


def commands(command: click.Command, words: str) -> Iterator[tuple[str, click.Command]]:
    """A command and all below it, with the words that call each."""
    yield words, command
    for name, below in sorted(getattr(command, "commands", {}).items()):
        if not below.hidden:
            yield from commands(below, f"{words} {name}")


def section(words: str, command: click.Command) -> Iterator[str]:
    """One command: how it is called, what it does, and its parameters."""
    context = click.Context(command, info_name=words)
    yield f"## `{words}`"
    yield "```text\n" + " ".join([words, *command.collect_usage_pieces(context)]) + "\n```"
    yield inspect.cleandoc(command.help or "").split("\f")[0]
    rows = [row(each, context) for each in command.params if not getattr(each, "hidden", False)]
    if rows:
        yield "\n".join(["| parameter | meaning |", "|---|---|", *rows])


def row(parameter: click.Parameter, context: click.Context) -> str:
    """A parameter as a line of a table."""
    if isinstance(parameter, TyperArgument):
        name, text = parameter.make_metavar(context), parameter.help or ""
    else:
        assert isinstance(parameter, click.Option)
        name, text = ", ".join([*parameter.opts, *parameter.secondary_opts]), parameter.help or ""
        if not parameter.is_flag:
            name += " " + parameter.make_metavar(context)
            default = parameter.default
            if isinstance(default, str | int | float) and default != "" and "efault" not in text:
                text += f" Default: {default}."
    cells = (name.replace("|", ", "), text.replace("|", ", "))
    return f"| `{cells[0]}` | {cells[1].strip()} |"


def page() -> str:
    """The page in Markdown."""
    found = [part for words, each in commands(whole(), "umbel") for part in section(words, each)]
    text = "\n\n".join([HEAD.rstrip(), *found]) + "\n"
    return text.replace("\\", "")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
