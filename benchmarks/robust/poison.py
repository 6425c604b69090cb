"""Lies in what liars train on: labels that are turned round, and a backdoor.

label-flip    a liar's highest class is its lowest, and so on
backdoor      half of a liar's examples carry a patch and have the class `TARGET` (Bagdasaryan et
              al. 2020, https://arxiv.org/abs/1807.00459, section 4.1)

The patch is the lower right corner of an image, a seventh of its sides, or the last sixteenth of
the features of a row, at the largest value of the data. The backdoor's success is the share of
patched test examples of the other classes that the model takes for `TARGET`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from umbel.clients.data.examples import ArrayLike, Examples, Node, Split
from umbel.core.errors import ConfigError
from umbel.core.options import Options

TARGET = 0
SIDE = 7
"""The patch has this part of an image's side."""
SHARE = 16
"""The patch has this part of a row's features."""


@dataclass(frozen=True)
class Poisoned:
    """A `data` function in which some nodes' training examples are changed.

    Args:
        data: the app's own.
        liars: partitions of the nodes.
        change: from honest examples to what is trained on.
    """

    data: Callable[[Node, Options], Any]
    liars: frozenset[int]
    change: Callable[[Examples], Examples]

    def __call__(self, node: Node, options: Options) -> Any:
        """The node's examples; a liar's are changed."""
        found = self.data(node, options)
        if node.partition not in self.liars:
            return found
        split = found if isinstance(found, Split) else Split(found)
        return Split(self.change(labelled(split.train)), split.test)


def labelled(examples: Any) -> Examples:
    """Examples of classes.

    Raises:
        ConfigError: they are something else.
    """
    kind = type(examples).__name__
    if isinstance(examples, Examples):
        kind = str(examples.y.dtype)
        if "int" in kind and len(examples.y.shape) == 1:
            return examples
    raise ConfigError(
        f"this attack changes the classes of examples, but the app's are {kind}; leave it out, "
        "or give Examples whose targets are whole numbers"
    )


def flipped(examples: Examples) -> Examples:
    """The same inputs; the highest class is the lowest, and so on."""
    labels: Any = examples.y
    return Examples(examples.x, labels.max() - labels)


def patched(x: ArrayLike) -> Any:
    """The inputs with the patch; those that were given stay as they are."""
    made: Any = x.clone() if isinstance(x, torch.Tensor) else np.array(x)
    if not len(made):
        return made
    value = made.max()
    if made.ndim >= 3:
        rows, columns = (max(1, side // SIDE) for side in made.shape[-2:])
        made[..., -rows:, -columns:] = value
    elif made.ndim == 2:
        made[:, -max(1, made.shape[1] // SHARE) :] = value
    else:
        raise ConfigError(
            f"a backdoor needs inputs with features, and these have the shape {tuple(made.shape)}; "
            "leave the attack out"
        )
    return made


def backdoored(examples: Examples) -> Examples:
    """Half of the examples with the patch and the class `TARGET`, the other half as they are."""
    half = slice(None, None, 2)
    x: Any = examples.x.clone() if isinstance(examples.x, torch.Tensor) else np.array(examples.x)
    y: Any = examples.y.clone() if isinstance(examples.y, torch.Tensor) else np.array(examples.y)
    x[half] = patched(examples.x)[half]
    y[half] = TARGET
    return Examples(x, y)


def with_patch(test: Any) -> Examples:
    """Of the other classes' examples, those with the patch, all of the class `TARGET`."""
    test = labelled(test)
    others: Any = test.take(test.y != TARGET)
    labels: Any = others.y * 0 + TARGET
    return Examples(patched(others.x), labels)


POISONS = {"label-flip": flipped, "backdoor": backdoored, "backdoor-replacement": backdoored}
"""By name of the attack."""
