"""`umbel client`: be a node; `umbel client policy`: what its owner lets it do; `umbel client
budget`: what its data have paid."""

from pathlib import Path
from typing import Any

import click
import typer

from umbel.clients.ledger.names import STATE
from umbel.commands import server as server_commands
from umbel.commands.groups import Commands, PlainGroup


class _OrStart(PlainGroup):
    """A group whose own command is `start`: what is no other command's name is an argument of it.

    An app in a folder that is called like a command is named by its path, such as `./policy`.
    """

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in self.commands:
            args = ["start", *args]
        return super().parse_args(ctx, args)


app = Commands(name="client", cls=_OrStart, help="Be a node of a federation.")
app.command(
    "start",
    hidden=True,
    epilog="Also: umbel client policy --state DIR shows what this node's owner lets it do, and "
    "umbel client budget --state DIR what its data have paid.",
)(server_commands.client)


@app.command("policy")
def policy(state: server_commands.State, as_json: server_commands.AsJson = False) -> None:
    """Show this node's policy: its file with comments, and what is in force."""
    from umbel.clients.process.membership import NodeSettings, settings_in
    from umbel.clients.process.policy_file import policy_file
    from umbel.core.app_folder import open_app
    from umbel.core.errors import ConfigError
    from umbel.server.output import strict
    from umbel.strategies.policy.reading import load_policy

    if not state.is_dir():
        raise ConfigError(f"there is no folder {state}; a node makes it when it is first started")
    settings = settings_in(state) or NodeSettings("")
    file = policy_file(state, settings)
    force = load_policy(file).in_force()
    app_path = Path(settings.app) if settings.app else None
    digest = open_app(app_path).digest() if app_path is not None and app_path.is_dir() else ""
    if as_json:
        typer.echo(strict.dumps({"file": str(file), "app": digest or None, "policy": force}))
        return
    typer.echo(file.read_text().rstrip())
    typer.echo(f"\n# In force, from {file}:")
    for key, value in force.items():
        typer.echo(f"#   {key:16} {_shown(value)}")
    if digest:
        typer.echo(f"# This node's app ({app_path}) is {digest}")


@app.command("budget")
def budget(state: server_commands.State, as_json: server_commands.AsJson = False) -> None:
    """Show what this node's data have paid, in all runs: from its own ledger."""
    from umbel.clients.ledger.file import LedgerFile
    from umbel.clients.ledger.node_ledger import Limits
    from umbel.clients.process.membership import NodeSettings, settings_in
    from umbel.clients.process.policy_file import policy_file
    from umbel.core.errors import ConfigError
    from umbel.server.output import strict
    from umbel.strategies.policy.reading import load_policy

    if not state.is_dir():
        raise ConfigError(f"there is no folder {state}; a node makes it when it is first started")
    settings = settings_in(state) or NodeSettings("")
    policy = load_policy(policy_file(state, settings))
    limits = Limits(policy.participations, policy.epsilon, policy.record_epsilon)
    ledger = LedgerFile(Path(str(settings.node_config.get(STATE) or state)), limits)
    rows = ledger.budget()
    if as_json:
        typer.echo(strict.dumps({"ledger": str(ledger.path), "budget": rows}))
        return
    if not rows:
        typer.echo("nothing that is counted has left this node")
    for row in rows:
        for line in _budget_lines(row):
            typer.echo(line)


def _budget_lines(row: dict[str, Any]) -> list[str]:
    """One count of a ledger, for people."""
    whom = "each of its records" if row["unit"] == "record" else "the node as a whole"
    spent = "without bound" if row["epsilon"] is None else f"{row['epsilon']:.4g}"
    limit = row["epsilon_limit"]
    allowed = "no limit" if limit is None else f"of {limit:.4g}"
    allowed += f", by {row['limit_from']}"
    most = row["participations_limit"]
    times = f"{row['participations']}" + (f" of {most}" if most is not None else "")
    return [
        f"{row['scope']} {row['name']}: {whom}",
        f"  epsilon         {spent} ({allowed}), at delta {row['delta']:g}, {row['relation']}",
        f"  participations  {times}",
        f"  last            {row['last_time']}, run {row['last_run']}"
        + (f", coordinator {row['last_coordinator']}" if row["last_coordinator"] else ""),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} = {rule}" for name, rule in value.items()) or "any values"
    return str(value).lower() if isinstance(value, bool) else str(value)
