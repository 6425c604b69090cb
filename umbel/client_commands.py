"""`umbel client`: be a node; and `umbel client policy`: what its owner lets it do."""

import json
from pathlib import Path
from typing import Any

import click
import typer
from typer.core import TyperGroup

from umbel import server_commands


class _OrStart(TyperGroup):
    """A group whose own command is `start`: what is no other command's name is an argument of it.

    An app in a folder that is called like a command is named by its path, such as `./policy`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["start", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(name="client", cls=_OrStart, help="Be a node of a federation.")
app.command(
    "start",
    hidden=True,
    epilog="Also: umbel client policy --state DIR shows what this node's owner lets it do.",
)(server_commands.client)


@app.command("policy")
def policy(state: server_commands.State, as_json: server_commands.AsJson = False) -> None:
    """Show this node's policy: its file with comments, and what is in force."""
    from umbel.clients.process.membership import NodeSettings, settings_in
    from umbel.clients.process.policy_file import policy_file
    from umbel.strategies.app import open_app
    from umbel.strategies.errors import ConfigError
    from umbel.strategies.node_policy import NodePolicy

    if not state.is_dir():
        raise ConfigError(f"there is no folder {state}; a node makes it when it is first started")
    settings = settings_in(state) or NodeSettings("")
    file = policy_file(state, settings)
    force = NodePolicy.load(file).in_force()
    app_path = Path(settings.app) if settings.app else None
    digest = open_app(app_path).digest() if app_path is not None and app_path.is_dir() else ""
    if as_json:
        typer.echo(json.dumps({"file": str(file), "app": digest or None, "policy": force}))
        return
    typer.echo(file.read_text().rstrip())
    typer.echo(f"\n# In force, from {file}:")
    for key, value in force.items():
        typer.echo(f"#   {key:16} {_shown(value)}")
    if digest:
        typer.echo(f"# This node's app ({app_path}) is {digest}")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} = {rule}" for name, rule in value.items()) or "any values"
    return str(value).lower() if isinstance(value, bool) else str(value)
