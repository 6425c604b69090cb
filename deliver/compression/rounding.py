"""An ONNX graph in 8 bits, by ONNX Runtime.

    dynamic   weights are rounded once, activations as they come; no data are needed
    static    both, with scales of the activations measured on examples (QDQ, one scale a channel)

Only the scales and zero points of activations depend on the examples: two numbers an activation.
"""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from umbel.core.errors import ConfigError, described
from umbel.deliver.extras import needed
from umbel.deliver.signature import INPUT

Array = np.ndarray[Any, Any]
CALIBRATED = 512
"""Examples that static rounding looks at."""


def to_int8(graph: Path, out: Path, x: Array | None) -> None:
    """Round a graph.

    Args:
        graph: the file that is read.
        out: the file that is written.
        x: inputs that the scales of activations are measured on; None rounds dynamically.

    Raises:
        ConfigError: the package is missing, or the graph cannot be rounded.
    """
    quantization = needed("onnxruntime.quantization", "rounding to 8 bits")
    prepared = needed("onnxruntime.quantization.shape_inference", "rounding to 8 bits")
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with TemporaryDirectory() as folder:
            clean = Path(folder) / "clean.onnx"
            try:
                prepared.quant_pre_process(str(graph), str(clean), skip_symbolic_shape=True)
            except Exception:
                clean.write_bytes(graph.read_bytes())
            if x is None:
                quantization.quantize_dynamic(
                    str(clean), str(out), op_types_to_quantize=["MatMul", "Gemm"], per_channel=True
                )
            else:
                quantization.quantize_static(
                    str(clean),
                    str(out),
                    _reader(quantization, x),
                    quant_format=quantization.QuantFormat.QDQ,
                    per_channel=True,
                )
    except Exception as error:
        out.unlink(missing_ok=True)
        raise ConfigError(
            f"the model cannot be rounded to 8 bits: {described(error, '', longest=200)}; leave "
            "--int8 out"
        ) from error
    finally:
        logger.setLevel(level)


def _reader(quantization: Any, x: Array) -> Any:
    """The examples as ONNX Runtime asks for them: batch by batch, then None."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # an optional package
        def __init__(self) -> None:
            self._rest: Iterator[Mapping[str, Array]] = (
                {INPUT: x[start : start + 64]} for start in range(0, len(x), 64)
            )

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self._rest, None)

    return Reader()
