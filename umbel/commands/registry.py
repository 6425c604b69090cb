"""`umbel registry`: models by name, their versions, tags and lineage."""

from pathlib import Path
from typing import Annotated

import typer

from umbel.commands.deliver import AsJson
from umbel.commands.groups import Commands

app = Commands(name="registry", help="Models by name: versions, tags, and their lineage.")


@app.command("add")
def add_(
    path: Annotated[Path, typer.Argument(metavar="RUN", help="A run, or a delivered folder.")],
    name: Annotated[str | None, typer.Option(help="Of the model. Default: the app's.")] = None,
    tag: Annotated[str | None, typer.Option(help="That points to it, such as production.")] = None,
    as_json: AsJson = False,
) -> None:
    """Register a model as the next version of its name."""
    from umbel.deliver import registry as files
    from umbel.server.output import strict

    lineage = files.lineage_of(path)
    made = files.add(name or str(lineage["name"]), path.resolve(), lineage)
    if tag is not None:
        made = files.tag(made.model, made.number, tag)
        made = next(one for one in files.versions(made.model) if one.number == made.number)
    if as_json:
        typer.echo(strict.dumps(made.to_json()))
        return
    tagged = f", {', '.join(made.tags)}" if made.tags else ""
    typer.echo(f"{made.model}@{made.number}{tagged}: {made.path}")


@app.command("tag")
def tag_(
    model: Annotated[str, typer.Argument(metavar="MODEL@VERSION")],
    name: Annotated[str, typer.Argument(metavar="TAG", help="Such as production.")],
) -> None:
    """Let a tag point to a version; a server of MODEL@TAG rolls over to it."""
    from umbel.core.errors import ConfigError
    from umbel.deliver import registry as files

    of, _, number = model.partition("@")
    if not number.isdigit():
        raise ConfigError(f"{model!r} names no version; write for example {of}@3")
    files.tag(of, int(number), name)
    typer.echo(f"{of}@{name} is version {number}")


@app.command("list")
def list_(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]")] = None,
    as_json: AsJson = False,
) -> None:
    """List models, their versions and where each comes from."""
    from umbel.core.errors import ConfigError
    from umbel.deliver import registry as files
    from umbel.server.output import strict

    if model is not None and model not in files.models():
        raise ConfigError(
            f"the registry has no model {model!r}; it has {', '.join(files.models()) or 'none'}"
        )
    found = [one for name in ([model] if model else files.models()) for one in files.versions(name)]
    if as_json:
        typer.echo(strict.dumps({"models": [one.to_json() for one in found]}))
        return
    for one in found:
        tagged = f" [{', '.join(one.tags)}]" if one.tags else ""
        private = ", certified" if one.lineage.get("certificate") else ""
        typer.echo(
            f"{one.model}@{one.number}{tagged}  {one.lineage.get('form')} of run "
            f"{one.lineage.get('run')}{private}  {one.path}"
        )
