"""A delivered model that predicts; of an ONNX graph, without a second of torch's import."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umbel.core.errors import ConfigError
from umbel.core.files import sha256
from umbel.deliver.onnx_graph import OnnxPredictor
from umbel.deliver.parcel import contents, is_parcel, read_parcel
from umbel.deliver.signature import Signature

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Predictor:
    """A model in use.

    Attributes:
        path: of the folder that it was opened from.
        version: the first digits of its file's SHA-256.
        signature: what it takes and gives.
        predict: inputs of shape (n, ...) to outputs of shape (n, size).
    """

    path: Path
    version: str
    signature: Signature
    predict: Callable[[Array], Array]

    @property
    def name(self) -> str:
        """Which model, and which version of it."""
        return f"{self.signature.name}@{self.version}"


def open_delivered(folder: Path, threads: int = 0) -> Predictor:
    """The model of a folder that `umbel export` or `umbel compress` made.

    Args:
        folder: of the model.
        threads: of one prediction; 0 is as many as there are cores.

    Raises:
        ConfigError: it is no such folder, its files are not those that were delivered, or its
            format does not predict.
    """
    delivery = read_parcel(folder)
    found = contents(folder)
    changed = [name for name in (delivery["file"], "signature.json") if name in delivery["files"]]
    for name in changed:
        if found.get(name) != delivery["files"][name]:
            raise ConfigError(
                f"{folder / name} is not the file that was delivered; see: umbel verify {folder}"
            )
    signature = Signature.read(folder)
    file, form = folder / delivery["file"], delivery["form"]
    predict: Callable[[Array], Array]
    if form == "onnx":
        predict = OnnxPredictor(file, threads)
    elif form == "torch-export":
        predict = _program(file)
    else:
        raise ConfigError(
            f"{folder} holds a model in the form {form}, which has no graph to predict with; "
            "export it with --to onnx"
        )
    return Predictor(folder, sha256(file)[:8], signature, predict)


def exported_of(run: Path) -> Path | None:
    """The folder of a run's own ONNX export, if it is of the model that the run has now."""
    folder, model = run / "deliver" / "onnx", run / "model.safetensors"
    if not (is_parcel(folder) and model.is_file()):
        return None
    return folder if read_parcel(folder)["model"] == sha256(model) else None


def _program(file: Path) -> Callable[[Array], Array]:
    import torch

    from umbel.deliver.trained import outputs_of

    module = torch.export.load(file).module()
    return lambda x: outputs_of(module, x)
