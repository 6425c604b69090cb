"""A run's model in a format that others load, checked against the original.

module ──▶ model.onnx ──▶ ONNX Runtime ┐
   └───────────────────▶ outputs       ┴─▶ largest difference on the held-out examples
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from umbel.clients.trainers.base import ReadyTrainer
from umbel.core.errors import CheckError, ConfigError
from umbel.core.errors import described as error_text
from umbel.deliver import claims, papers
from umbel.deliver.made_up import example_of
from umbel.deliver.metrics import scores
from umbel.deliver.onnx_graph import LARGEST_BATCH, OnnxPredictor, write_onnx
from umbel.deliver.parcel import CLAIMS, Step, described, fresh_folder
from umbel.deliver.signature import Signature
from umbel.deliver.trained import TrainedModel, outputs_of

Array = np.ndarray[Any, Any]
Predict = Callable[[Array], Array]
FORMS: Mapping[str, str] = {
    "onnx": "model.onnx",
    "torch-export": "model.pt2",
    "safetensors": "model.safetensors",
    "keras": "model.keras",
}
"""Names of formats, and of the file of each."""
CLOSE = 1e-3
"""How far an export may be from the original, over the largest output (or 1): beyond is a fault."""


@dataclass(frozen=True)
class Exported:
    """What `export` made.

    Attributes:
        path: the folder.
        bytes: of the model's file.
        metrics: of that file, on the held-out examples; empty where there are none.
        difference: the largest from the original's outputs; None for tensors alone, which are
            copied bit by bit.
        checked: on what that was measured.
    """

    path: Path
    bytes: int
    metrics: Mapping[str, float]
    difference: float | None
    checked: str

    def to_json(self) -> dict[str, Any]:
        """For `umbel export --json`."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "metrics": dict(self.metrics),
            "difference": self.difference,
        }


def export(model: TrainedModel, form: str, out: Path) -> Exported:
    """Write a run's model in a format.

    Args:
        model: the run's.
        form: a key of `FORMS`.
        out: the folder to make.

    Raises:
        ConfigError: the model cannot be written so; nothing is left of the folder then.
        CheckError: what was written gives other outputs than the original.
    """
    if form not in FORMS:
        raise ConfigError(f"--to is {form!r}; it can be {', '.join(FORMS)}")
    folder = fresh_folder(out)
    try:
        return _export(model, form, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _export(model: TrainedModel, form: str, folder: Path) -> Exported:
    file = folder / FORMS[form]
    signature: Signature | None = None
    difference, checked, metrics = None, "", dict[str, float]()
    if form == "safetensors":
        shutil.copy(model.run.model_path, file)
        metrics = _final_metrics(model)
        with contextlib.suppress(ConfigError):  # its tensors can be delivered without
            made = model.exported()
            signature = model.described(made.module, made.output)
            signature.write(folder)
    elif form == "keras":
        _keras(model, file)
    else:
        made = model.exported()
        signature = model.described(made.module, made.output)
        predict = write(made.module, form, file, signature)
        difference, checked, metrics = compare(model, made.module, predict, signature)
        signature.write(folder)
    return deliver(model, folder, form, [Step("export")], signature, metrics, difference, checked)


def deliver(
    model: TrainedModel,
    folder: Path,
    form: str,
    steps: list[Step],
    signature: Signature | None,
    metrics: Mapping[str, float],
    difference: float | None,
    checked: str,
) -> Exported:
    """Put everything beside a model's file that goes with it, and close the folder."""
    config, file = model.run.config(), folder / FORMS[form]
    certificate = claims.copy_claims(model.run, folder)
    card = folder / CLAIMS / "MODEL_CARD.md"
    original = card.read_text(encoding="utf-8") if card.is_file() else None
    told = claims.sentence(certificate, steps)
    text = papers.card(original, config, steps, metrics, told)
    (folder / "MODEL_CARD.md").write_text(text, encoding="utf-8")
    text = papers.readme(signature, form, file.name, difference, checked)
    (folder / "README.md").write_text(text, encoding="utf-8")
    body = described(
        name=model.name,
        form=form,
        file=file.name,
        steps=steps,
        config=config,
        run=model.run.path.resolve(),
        model=claims.model_hash(model.run),
        metrics=metrics,
        difference=difference,
    )
    claims.seal_delivery(folder, body, model.run)
    return Exported(folder, file.stat().st_size, metrics, difference, checked)


def write(module: nn.Module, form: str, file: Path, signature: Signature) -> Predict:
    """Write a module, and read it back as something that predicts.

    Raises:
        ConfigError: it cannot be written in this format.
    """
    example = example_of(signature.inputs)
    if form == "onnx":
        write_onnx(module, example, file)
        return OnnxPredictor(file)
    try:
        batch = torch.export.Dim("batch", min=1, max=LARGEST_BATCH)
        program = torch.export.export(
            module, (torch.from_numpy(example),), dynamic_shapes=({0: batch},)
        )
        torch.export.save(program, file)
    except Exception as error:
        raise ConfigError(
            f"torch.export cannot follow this model: {error_text(error, '', longest=200)}; "
            "export it with --to safetensors"
        ) from error
    loaded = torch.export.load(file).module()
    return lambda x: outputs_of(loaded, x)


def compare(
    model: TrainedModel, module: nn.Module, predict: Predict, signature: Signature
) -> tuple[float, str, dict[str, float]]:
    """The largest difference of outputs, on what it was measured, and the metrics of `predict`.

    Raises:
        CheckError: they differ by more than rounding.
    """
    held_out = model.held_out()
    x = example_of(signature.inputs, 64) if held_out is None else held_out.x
    wanted, found = outputs_of(module, x), predict(x)
    difference = float(np.abs(found - wanted).max())
    scale = max(1.0, float(np.abs(wanted).max()))
    if not difference <= CLOSE * scale:
        raise CheckError(
            f"the exported model gives other outputs than the trained one: they differ by up to "
            f"{difference:.3g}, where the largest is {scale:.3g}; nothing was kept of it"
        )
    if held_out is None:
        return difference, "on 64 made-up inputs, since the app has no held-out examples", {}
    where = f"on {len(held_out):,} held-out examples"
    return difference, where, scores(signature, found, held_out.y)


def _final_metrics(model: TrainedModel) -> dict[str, float]:
    found = model.run.result().get("metrics") or {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _keras(model: TrainedModel, file: Path) -> None:
    """Save a Keras model in Keras' own format.

    Raises:
        ConfigError: the trainer has no Keras model.
    """
    trainer = model.trainer
    made: Any = None
    if isinstance(trainer, ReadyTrainer):
        made = trainer.ready(model.weights, model.options)
    keras = any(kind.__module__.partition(".")[0] == "keras" for kind in type(made).__mro__)
    if made is None or not keras:
        raise ConfigError(
            f"the model was trained by {type(model.trainer).__name__}, which is no Keras model; "
            "export it with --to onnx, torch-export or safetensors"
        )
    made.save(file)
