"""How a model takes a node's inputs: integers as they are, or as real numbers.

Token ids and categories are integers that a model looks up; 16-bit images and counts are
integers that it computes with. The arrays do not tell which, but the model does: it is shown two
rows, once, and takes them in one way or the other.
"""

from typing import Any

import torch

from umbel.clients.pytorch.batches import (
    RealSource,
    Source,
    as_real,
    holds_integers,
    open_source,
    to_model,
)
from umbel.clients.pytorch.loop import call
from umbel.clients.pytorch.module import ModuleState
from umbel.clients.seeding import seeded
from umbel.core.errors import UmbelError


def opened(piece: ModuleState, examples: Any, target: str = "") -> Source:
    """A node's examples as this model takes them; call it before `piece.load`.

    Args:
        piece: the module, on the device where the batches are needed.
        examples: what the node's `data` function gave.
        target: the key of the target in rows that are dicts.

    Raises:
        ConfigError: they are no examples.
    """
    source = open_source(examples, piece.device, target, piece.names)
    if piece.integers == "index":
        return source
    with seeded(0, piece.device):
        x, _ = source.batch(torch.arange(min(2, source.size)))
        if not holds_integers(x):
            return source
        if piece.integers is None:
            piece.integers = "index" if _takes(piece, x) or not _takes(piece, x, True) else "real"
    return RealSource(source, piece.real) if piece.integers == "real" else source


def _takes(piece: ModuleState, x: Any, real: bool = False) -> bool:
    """Whether the module computes something of these inputs."""
    piece.module.eval()
    try:
        with torch.no_grad():
            inputs = as_real(x, piece.real) if real else x
            call(piece.module, to_model(inputs, piece.device, piece.real))
    except UmbelError:  # too large to be exact: the sentence comes when they are trained on
        return True
    except Exception:  # whatever a module raises, it does not take these
        return False
    return True
