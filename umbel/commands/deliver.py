"""`umbel export`, `compress`, `predict` and `tune`: from a trained model to its use."""

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


def predict(
    model: Annotated[
        str,
        typer.Argument(metavar="RUN", help="A run, a folder of umbel export, or MODEL@TAG."),
    ],
    given: Annotated[
        Path | None,
        typer.Argument(metavar="[INPUT]", help="A file, or a folder of files."),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="What is printed: table, json or csv.")
    ] = "table",
    listen: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Serve the model over HTTP.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="With --listen: a second model for a share of requests."),
    ] = None,
    share: Annotated[float, typer.Option(help="Of the requests that --against answers.")] = 0.5,
    certificate: Annotated[
        Path | None, typer.Option(metavar="PEM", help="With --listen: for HTTPS.")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="PEM", help="Of the certificate.")] = None,
    max_bytes: Annotated[int, typer.Option(help="Of one request's body.", min=1)] = 10_000_000,
    max_rows: Annotated[int, typer.Option(help="Inputs in one request.", min=1)] = 1024,
    timeout: Annotated[float, typer.Option(help="Seconds until a request is given up.")] = 30.0,
    threads: Annotated[int, typer.Option(help="Of one prediction; 0: all cores.", min=0)] = 0,
    app: AppFolder = None,
    as_json: AsJson = False,
) -> None:
    """Use a model: on files, or as a service for others."""
    from umbel.core.errors import ConfigError
    from umbel.predicting import open_model, predictions, serve_model, show

    if (given is None) == (listen is None):
        raise ConfigError("give an INPUT to predict for, or --listen HOST:PORT to serve; one of it")
    if listen is None:
        for name, value in (("--against", against), ("--certificate", certificate), ("--key", key)):
            if value is not None:
                raise ConfigError(f"{name} is for serving; give --listen HOST:PORT with it")
        assert given is not None
        rows = predictions(open_model(model, app, threads), given)
        show(rows, "json" if as_json else form)
        return
    from umbel.deliver.serving.service import Limits

    serve_model(
        model,
        listen=listen,
        against=against,
        share=share,
        limits=Limits(max_bytes, max_rows, timeout),
        certificate=certificate,
        key=key,
        threads=threads,
        app=app,
    )


def compress(
    run: Run,
    int8: Annotated[
        bool, typer.Option("--int8", help="Round to 8 bits, with scales from examples (static).")
    ] = False,
    int8_dynamic: Annotated[
        bool, typer.Option("--int8-dynamic", help="Round to 8 bits without examples.")
    ] = False,
    prune: Annotated[float, typer.Option(help="Share of weights that become zero.")] = 0.0,
    units: Annotated[float, typer.Option(help="Share of hidden units that go.")] = 0.0,
    low_rank: Annotated[float, typer.Option(help="Share of rank that matrices keep.")] = 0.0,
    student: Annotated[
        str | None,
        typer.Option(metavar="'K=V ...'", help="Options of a smaller model of the app."),
    ] = None,
    target: Annotated[
        str, typer.Option(help="What to reach, such as 'size<1MB accuracy>0.84'.")
    ] = "",
    data: Annotated[
        str,
        typer.Option(help="What training sees: held-out, synthetic, federated, or FILE.npz."),
    ] = "held-out",
    epochs: Annotated[int, typer.Option(help="Of training further.", min=0)] = 10,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Of federated rounds."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to make. Default: RUN/deliver/compressed.")
    ] = None,
    app: AppFolder = None,
    as_json: AsJson = False,
) -> None:
    """Make a model small: prune, factor, distil, round; with a table of what each way costs."""
    from umbel.compressing import compress as make
    from umbel.core.errors import ConfigError
    from umbel.core.options import parse
    from umbel.deliver.compression.compress import Recipe
    from umbel.server.output import strict

    if int8 and int8_dynamic:
        raise ConfigError("--int8 and --int8-dynamic are two ways of rounding; give one of them")
    recipe = Recipe(
        prune,
        units,
        low_rank,
        parse([student]) if student else {},
        "static" if int8 else "dynamic" if int8_dynamic else "none",
    )
    found = make(
        run,
        recipe=None if recipe == Recipe() else recipe,
        target=target,
        data=data,
        epochs=epochs,
        options=parse(config or []),
        out=out,
        app=app,
        say=lambda line: typer.echo(line, err=as_json),
    )
    if as_json:
        typer.echo(strict.dumps(found.to_json()))
        return
    typer.echo(f"{found.chosen.recipe}: {found.delivered.bytes:,} bytes: {found.delivered.path}")


def tune(
    path: Annotated[Path, typer.Argument(metavar="APP", help="An app's folder.")],
    space: Annotated[
        str,
        typer.Option(help="Such as 'learning-rate=log(0.001,1) batch-size=[16,32]'."),
    ],
    trials: Annotated[int, typer.Option(help="How many; with --charge, expected.")] = 30,
    metric: Annotated[str | None, typer.Option(help="Accuracy, else loss, if left out.")] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("-c", "--run-config", metavar="'K=V ...'", help="Of every trial."),
    ] = None,
    nodes: Annotated[int | None, typer.Option(help="Virtual nodes.", min=1)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder; a search in it goes on. Default: tune/APP.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Trials side by side.", min=1)] = 1,
    charge: Annotated[
        str | None,
        typer.Option(
            help="Under privacy: charge the search; poisson, geometric or logarithmic trials."
        ),
    ] = None,
    public: Annotated[
        Path | None, typer.Option(metavar="FILE.npz", help="Search on public examples instead.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choices.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Search for better options, judged on examples that the result never sees."""
    from umbel.core.options import parse
    from umbel.opening import opened

    changes = parse(config or [])
    opened(path, changes).server_app()  # its faults are told before anything else is imported

    from umbel.server.output import strict
    from umbel.tuning import tune as search

    found = search(
        path,
        space=space,
        trials=trials,
        metric=metric,
        options=changes,
        nodes=nodes,
        out=out,
        workers=workers,
        charge=charge,
        public=public,
        seed=seed,
        say=lambda line: typer.echo(line, err=as_json),
    )
    if as_json:
        typer.echo(strict.dumps(found))
        return
    if found["best"] is None:
        typer.echo("no trial was drawn, so nothing is better than the defaults")
        return
    for name in ("best", "default"):
        if name in found:
            row = found[name]
            said = " ".join(f"{key}={value}" for key, value in row["options"].items())
            metrics = ", ".join(f"{key} {value:.4g}" for key, value in row["metrics"].items())
            typer.echo(f"{name}: {said}  (test half: {metrics})")
    for name, value in found["importance"].items():
        typer.echo(f"importance of {name}: {value:.0%}")
