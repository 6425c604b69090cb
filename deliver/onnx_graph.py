"""A module as an ONNX file, and that file as something that predicts."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from umbel.core.errors import ConfigError, described
from umbel.deliver.extras import needed
from umbel.deliver.signature import INPUT, OUTPUT

Array = np.ndarray[Any, Any]
LARGEST_BATCH = 4096


def write_onnx(module: Any, example: Array, path: Path) -> None:
    """Write a module as an ONNX graph with a free first axis.

    Args:
        module: a `torch.nn.Module` of one tensor, in eval mode.
        example: inputs of shape (2, ...).
        path: of the file.

    Raises:
        ConfigError: the package is missing, or the graph has an operator that ONNX lacks.
    """
    import torch

    for package in ("onnx", "onnxscript"):
        needed(package, "export --to onnx")
    try:
        with _quietly():
            torch.onnx.export(
                module,
                (torch.from_numpy(example),),
                str(path),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=LARGEST_BATCH)},),
                external_data=False,
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:
        path.unlink(missing_ok=True)
        raise ConfigError(_why(error)) from error


def _why(error: BaseException) -> str:
    """One sentence with the operator, where the exporter names one."""
    said = ""
    cause: BaseException | None = error
    while cause is not None:
        said += f" {cause}"
        cause = cause.__cause__
    found = re.search(r"No ONNX function found for.*?(\w+\.\w+)", said)
    if found:
        what = f"ONNX has no operator for {found.group(1)}"
    else:
        what = f"the model cannot be written as ONNX ({described(error, '', longest=200)})"
    return (
        f"{what}, which this model uses; export it with --to torch-export or --to safetensors, or "
        "write that part of the model in other operators"
    )


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's own progress and advice, which is for its developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OnnxPredictor:
    """Predicts with ONNX Runtime.

    Attributes:
        path: of the graph.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        """Load a graph.

        Args:
            path: of the file.
            threads: of one prediction; 0 is as many as there are cores.

        Raises:
            ConfigError: the package is missing, or the file is no graph.
        """
        runtime = needed("onnxruntime", "a model in the form onnx")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self.path = path
        try:
            self._session = runtime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ConfigError(
                f"{path} cannot be loaded as an ONNX model: {described(error, '', longest=200)}; "
                "export it again"
            ) from error
        self._input = self._session.get_inputs()[0].name

    def __call__(self, x: Array) -> Array:
        """Outputs of shape (n, size) for inputs of shape (n, ...)."""
        parts = [
            self._session.run(None, {self._input: x[start : start + LARGEST_BATCH]})[0]
            for start in range(0, len(x), LARGEST_BATCH)
        ]
        found: Array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found
