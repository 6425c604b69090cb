"""`umbel report`, `verify` and `key`: what one does with a run that is there."""

from pathlib import Path
from typing import Annotated

import typer

CHECK_FAILED = 3

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]


def report(run: Run) -> None:
    """Draw a run: report.html and PNG plots, in its directory."""
    from umbel.server.output.report import write_report
    from umbel.server.output.rundir import RunDirectory
    from umbel.server.private.seal import seal

    page = write_report(run)
    directory = RunDirectory.open(run)
    if directory.certificate_path.is_file() and not seal(directory):
        typer.echo(
            "note: this page is not signed, because this is not the coordinator that certified the "
            "run, or its files are not those that were certified; see: umbel verify",
            err=True,
        )
    typer.echo(page)


def verify(
    run: Run,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="The coordinator's public key: what `umbel key` printed there."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check a certificate: who signed it, and every number again.

    Of a run, from its ledger; of a folder of `umbel export` or `umbel compress`, from what is
    public, and whether the file in it is made of the certified model.
    """
    from umbel.deliver.parcel import is_parcel
    from umbel.server.output import strict
    from umbel.server.private.coordinator_key import published_key
    from umbel.server.private.verify import Checked, check

    public = None if key is None else published_key(key)
    if is_parcel(run):
        from umbel.deliver.checking import Delivered, check_delivery

        checked: Checked | Delivered = check_delivery(run, key=public)
    else:
        checked = check(run, key=public)
    problems = checked.problems
    if as_json:
        typer.echo(strict.dumps(checked.to_json()))
    else:
        for line in checked.lines():
            typer.echo(line)
        for problem in problems:
            typer.echo(f"problem: {problem}")
        what = "the delivery" if is_parcel(run) else "the certificate"
        typer.echo(f"{what} does not hold" if problems else f"{what} holds")
    if problems:
        raise typer.Exit(CHECK_FAILED)


def certified(run: Path) -> bool:
    """Whether a run has a certificate."""
    return (run / "certificate.json").is_file()


def key(
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="A run that this coordinator made.")
    ] = None,
    state: Annotated[
        Path | None, typer.Option("--state", help="A coordinator's state folder.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Print the coordinator's public key, to publish it: who verifies a run compares with it."""
    from umbel.core.errors import ConfigError
    from umbel.server.output import strict
    from umbel.server.output.rundir import RunDirectory
    from umbel.server.private.coordinator_key import coordinator_key, fingerprint, public_text
    from umbel.server.private.population import state_of

    if run is not None and state is not None:
        raise ConfigError("give a run or --state, not both: each says whose key is meant")
    if state is not None and not state.is_dir():
        raise ConfigError(f"there is no state folder {state}; start one with: umbel server")
    if run is not None:
        state = state_of(RunDirectory.open(run))
    text = public_text(coordinator_key(state))
    if run is not None:
        signer = strict.loads((run / "certificate.json").read_bytes()) if certified(run) else {}
        if not isinstance(signer, dict) or signer.get("key") != text:
            raise ConfigError(
                f"{run} was not certified by this coordinator, whose key is {text}; ask the one "
                "that made it for its key, since nobody can take it from the run itself"
            )
    said = {"key": text, "fingerprint": fingerprint(text)}
    typer.echo(strict.dumps(said) if as_json else text)
