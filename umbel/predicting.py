"""What `umbel predict` opens: a delivered folder, a run, or a model of the registry.

ONNX Runtime predicts where the model was exported, its trainer otherwise.
"""

import csv
import json
import sys
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from umbel.core.errors import ConfigError
from umbel.core.files import sha256
from umbel.deliver.parcel import FILE, is_parcel
from umbel.deliver.predictor import Predictor, exported_of, open_delivered
from umbel.deliver.registry import resolved
from umbel.deliver.serving.reading import read_inputs
from umbel.deliver.signature import FILE as SIGNATURE


def open_model(name: Path | str, app: Path | None = None, threads: int = 0) -> Predictor:
    """The model of a name, ready to predict.

    Args:
        name: a delivered folder, a run's directory, or `MODEL@TAG` of the registry.
        app: where the app's folder is now, if it was moved.
        threads: of one prediction; 0 is as many as there are cores.

    Raises:
        ConfigError: there is no such model, or it cannot predict.
    """
    path = place_of_model(name)
    if is_parcel(path):
        return open_delivered(path, threads)
    exported = exported_of(path)
    if exported is not None:
        return open_delivered(exported, threads)
    return _of_trainer(path, app)


def place_of_model(name: Path | str) -> Path:
    """Where a model is, links followed.

    Raises:
        ConfigError: there is no such folder and no such model in the registry.
    """
    path = Path(name)
    if path.is_dir():
        return path.resolve()
    if "@" in str(name):
        return resolved(str(name))
    raise ConfigError(
        f"there is no folder {path}; give a run, a folder of umbel export, or MODEL@TAG of "
        "umbel registry list"
    )


def _of_trainer(run: Path, app: Path | None) -> Predictor:
    from umbel.deliver.trained import outputs_of
    from umbel.delivering import trained_model

    model = trained_model(run, app)
    made = model.exported()
    signature = model.described(made.module, made.output)
    version = sha256(model.run.model_path)[:8]
    return Predictor(run, version, signature, lambda x: outputs_of(made.module, x))


FORMATS = ("table", "json", "csv")
ANSWERS = ("class", "label", "score", "value", "values")


def predictions(model: Predictor, given: Path) -> Iterator[dict[str, Any]]:
    """One mapping an input: its name, and the answer.

    Raises:
        ConfigError: something in a file does not fit the model.
    """
    for piece in read_inputs(given, model.signature.inputs):
        answers = model.signature.answers(model.predict(piece.x))
        for name, answer in zip(piece.names, answers, strict=True):
            yield {"input": name, **answer}


def show(rows: Iterator[Mapping[str, Any]], form: str) -> None:
    """Print predictions as they are made; JSON is one object at the end.

    Raises:
        ConfigError: an unknown format.
    """
    if form not in FORMATS:
        raise ConfigError(f"--format is {form!r}; it can be {', '.join(FORMATS)}")
    if form == "json":
        typer.echo(json.dumps({"predictions": list(rows)}))
        return
    writer = csv.writer(sys.stdout, lineterminator="\n")
    for place, row in enumerate(rows):
        if form == "csv":
            if place == 0:
                writer.writerow(row)
            writer.writerow(row.values())
            continue
        name = row["input"]
        said = "  ".join(_said(key, row[key]) for key in ANSWERS if key in row)
        typer.echo(f"{name}  {said}")


def _said(key: str, value: Any) -> str:
    if key in ("score", "value"):
        return f"{value:.4g}"
    return f"class {value}" if key == "class" else str(value)


def serve_model(
    name: str,
    *,
    listen: str,
    against: str | None,
    share: float,
    limits: Any,
    certificate: Path | None,
    key: Path | None,
    threads: int,
    app: Path | None,
) -> None:
    """Serve a model until a signal ends it; see `umbel.deliver.serving.listening`.

    Raises:
        ConfigError: an argument cannot be used.
    """
    from umbel.deliver.serving.listening import address, serve
    from umbel.deliver.serving.routes import Routes

    if not 0 <= share <= 1:
        raise ConfigError(f"--share is {share}; give a part of the requests, from 0 to 1")
    if not limits.seconds > 0:
        raise ConfigError(f"--timeout is {limits.seconds}; give seconds above 0")
    address(listen)
    second = None if against is None else open_model(against, None, threads)
    routes = Routes(open_model(name, app, threads), second, share=share, room=limits.waiting)
    serve(
        routes,
        listen=listen,
        limits=limits,
        reload=lambda: open_model(name, app, threads),
        current=lambda: _meaning(name),
        say=lambda line: typer.echo(line, err=True),
        certificate=certificate,
        key=key,
    )


def _meaning(name: str) -> Hashable:
    """What a name means now: the folder, and when its model was written."""
    path = place_of_model(name)
    folder = path if is_parcel(path) else exported_of(path) or path
    watched = folder / (FILE if is_parcel(folder) else "model.safetensors")
    status = watched.stat()
    return str(folder), status.st_mtime_ns, status.st_ino, (folder / SIGNATURE).is_file()
