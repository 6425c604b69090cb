"""The numbers inside a delivered file, and whether they are those of the run's model.

A graph names its tensors as it likes, and may turn a matrix around. So each tensor is looked for
by its values: as it is, turned, or, where it was rounded to 8 bits, within half a step of it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umbel.deliver.extras import needed

Array = np.ndarray[Any, Any]
SCALE, ZERO, ROUNDED = "_scale", "_zero_point", "_quantized"
"""Endings by which ONNX Runtime names what a rounded tensor is made of."""


@dataclass(frozen=True)
class Held:
    """A tensor of a delivered file.

    Attributes:
        name: in the file.
        values: as real numbers.
        step: of the rounding, broadcast to the values; 0 where there was none.
    """

    name: str
    values: Array
    step: Array | float = 0.0

    def is_from(self, original: Array, *, zeros: bool) -> bool:
        """Whether these are the numbers of `original`.

        Args:
            original: real numbers.
            zeros: whether some may have become zero.
        """
        for turned in (original, original.T):
            if turned.shape != self.values.shape:
                continue
            near = np.abs(self.values - turned) <= np.asarray(self.step) * 0.501
            if zeros:
                near |= self.values == 0
            if bool(near.all()):
                return True
        return False


def tensors_in(file: Path, form: str) -> list[Held]:
    """The real tensors of a delivered file.

    Args:
        file: the model's.
        form: a format of `umbel.deliver.export`.

    Raises:
        ConfigError: the package that reads it is missing.
    """
    if form == "onnx":
        onnx = needed("onnx", "a model in the form onnx")
        graph = onnx.load(str(file)).graph
        found = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
        return list(_of_graph(found))
    if form == "safetensors":
        from safetensors.numpy import load_file

        return [Held(name, value) for name, value in load_file(file).items() if _real(value)]
    if form == "torch-export":
        import torch

        state = torch.export.load(file).state_dict
        arrays = {name: value.detach().numpy() for name, value in state.items()}
        return [Held(name, value) for name, value in arrays.items() if _real(value)]
    return []


def _of_graph(found: Mapping[str, Array]) -> Iterator[Held]:
    for name, value in found.items():
        base = name.removesuffix(ROUNDED)
        if base != name and base + SCALE in found:
            scale, zero = found[base + SCALE], found.get(base + ZERO, np.zeros(1, value.dtype))
            whole = value.astype(np.float64)
            for axis in range(whole.ndim if scale.size > 1 else 1):
                if scale.size > 1 and whole.shape[axis] != scale.size:
                    continue
                shape = [1] * whole.ndim
                if whole.ndim:
                    shape[axis] = scale.size
                step = scale.astype(np.float64).reshape(shape)
                yield Held(base, (whole - zero.astype(np.float64).reshape(shape)) * step, step)
        elif _real(value) and not name.endswith((SCALE, ZERO)):
            yield Held(name, value)


def _real(value: Array) -> bool:
    return bool(value.dtype.kind == "f")


@dataclass(frozen=True)
class Origin:
    """What was found of a run's model in a delivered file.

    Attributes:
        missing: names of its tensors that are not in the file.
        parts: how many of its tensors there are.
    """

    missing: tuple[str, ...]
    parts: int


def origin_of(file: Path, form: str, original: Path, *, zeros: bool) -> Origin:
    """Look for the tensors of a run's model in a delivered file.

    Args:
        file: the delivered model.
        form: its format.
        original: the run's `model.safetensors`.
        zeros: whether numbers may have become zero on the way (pruning).
    """
    from safetensors.numpy import load_file

    held = tensors_in(file, form)
    wanted = {
        name: value.astype(np.float32 if form != "safetensors" else value.dtype)
        for name, value in load_file(original).items()
        if _real(value)
    }
    missing = [
        name
        for name, value in wanted.items()
        if not any(one.is_from(value, zeros=zeros) for one in held)
    ]
    return Origin(tuple(missing), len(wanted))
