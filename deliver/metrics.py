"""How good outputs are on held-out examples: the same numbers for every form of a model."""

from typing import Any

import numpy as np

from umbel.deliver.signature import OF_CLASSES, Signature

Array = np.ndarray[Any, Any]


def scores(signature: Signature, outputs: Array, targets: Array) -> dict[str, float]:
    """Accuracy of classes, or rmse of values; empty where only the app knows.

    Args:
        signature: says what the outputs are.
        outputs: shape (n, size) or (n,).
        targets: shape (n,); others are not judged here.
    """
    if targets.ndim == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if len(outputs) == 0 or targets.ndim != 1 or outputs.ndim > 2:
        return {}
    if signature.output in OF_CLASSES:
        return {"accuracy": float((signature.classes(outputs) == targets).mean())}
    if signature.output == "number" and signature.size == 1:
        return {"rmse": float(np.sqrt(((outputs.reshape(-1) - targets) ** 2).mean()))}
    return {}
