"""`umbel backup`, `restore`, `prune` and `doctor`: what keeps an installation in order."""

from pathlib import Path
from typing import Annotated

import typer

StateFolder = Annotated[Path, typer.Option("--state", help="Folder that holds what lasts.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]


def backup(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The copy: a tar file.")],
    state: StateFolder,
    as_json: AsJson = False,
) -> None:
    """Copy a coordinator's state into one file, also while it runs."""
    from umbel import __version__
    from umbel.server.output import strict
    from umbel.server.upkeep.backup import back_up

    made = back_up(state, file, version=__version__)
    if as_json:
        typer.echo(strict.dumps({"file": str(file), "files": len(made.files), "made": made.made}))
        return
    typer.echo(f"{file}: {len(made.files)} files, {file.stat().st_size / 1e6:.1f} MB")
    typer.echo("it holds the federation's keys: keep it where only you can read it")


def restore(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="What umbel backup made.")],
    state: StateFolder,
    nothing_since: Annotated[
        bool,
        typer.Option(
            "--nothing-since", help="You state that no run released anything after the copy."
        ),
    ] = False,
) -> None:
    """Put a copy of a coordinator's state back into a new folder."""
    from umbel.server.upkeep.backup import restore as put_back

    made, doubtful = put_back(file, state, nothing_since=nothing_since)
    typer.echo(f"{state} is as it was on {made.made} ({len(made.files)} files)")
    for population in doubtful:
        typer.echo(
            f"what was released about the population {population!r} after the copy is unknown: "
            "its epsilon is infinite from now on (--nothing-since states that it was nothing)"
        )


def prune(
    runs: Annotated[Path, typer.Argument(metavar="RUNS", help="The folder with runs.")] = Path(
        "runs"
    ),
    keep: Annotated[int, typer.Option(help="How many of the newest stay.", min=0)] = 10,
    older_than: Annotated[
        float, typer.Option(metavar="DAYS", help="Younger ones stay.", min=0)
    ] = 0.0,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints", help="Remove their checkpoints only.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove; without it, only say what.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove finished runs; unfinished ones and what ledgers know always stay."""
    from umbel.server.output import strict
    from umbel.server.upkeep.prune import candidates, remove

    found = candidates(runs, keep=keep, older_than_days=older_than, checkpoints=checkpoints)
    total = sum(candidate.bytes for candidate in found)
    if yes:
        remove(found, checkpoints=checkpoints)
    if as_json:
        names = [str(candidate.path) for candidate in found]
        typer.echo(strict.dumps({"runs": names, "bytes": total, "removed": yes}))
        return
    for candidate in found:
        typer.echo(f"{candidate.path}  {candidate.bytes / 1e6:.1f} MB")
    what = "removed" if yes else "would be removed (--yes removes them, for good)"
    typer.echo(f"{len(found)} runs, {total / 1e6:.1f} MB {what}")


def doctor(
    state: Annotated[
        Path | None, typer.Option("--state", help="Of a coordinator or of a node.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what is wrong: machine, certificates, databases, the way to the coordinator."""
    import dataclasses

    from umbel.doctor import examine
    from umbel.server.output import strict

    findings = examine(state)
    faults = sum(finding.state == "fault" for finding in findings)
    if as_json:
        rows = [dataclasses.asdict(finding) for finding in findings]
        typer.echo(strict.dumps({"findings": rows, "faults": faults}))
    else:
        width = max(len(finding.what) for finding in findings)
        for finding in findings:
            cure = f"; {finding.cure}" if finding.cure else ""
            typer.echo(f"{finding.state:8} {finding.what:{width}} {finding.said}{cure}")
    if faults:
        raise typer.Exit(3)
