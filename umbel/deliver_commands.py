"""`umbel export`, `compress`, `predict`, `tune` and `registry`: from a trained model to its use."""

from pathlib import Path
from typing import Annotated

import typer

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line on stdout.")]
AppFolder = Annotated[
    Path | None, typer.Option("--app", help="The app's folder, if it was moved since the run.")
]


def export(
    run: Run,
    form: Annotated[
        str, typer.Option("--to", help="onnx, torch-export, safetensors or keras.")
    ] = "onnx",
    out: Annotated[
        Path | None, typer.Option(help="Folder to make. Default: RUN/deliver/FORMAT.")
    ] = None,
    app: AppFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's model in a format that others load, with its card and its claims."""
    from umbel.deliver.export import export as write
    from umbel.delivering import trained_model
    from umbel.server.output import strict

    model = trained_model(run, app)
    made = write(model, form, out or run / "deliver" / form)
    if as_json:
        typer.echo(strict.dumps(made.to_json()))
        return
    if made.difference is not None:
        typer.echo(f"largest difference {made.difference:.2g}, {made.checked}")
    for name, value in sorted(made.metrics.items()):
        typer.echo(f"{name} {value:.4g}")
    typer.echo(f"{made.bytes:,} bytes: {made.path}")
