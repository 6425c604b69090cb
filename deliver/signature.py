"""What a delivered model takes and gives, as `signature.json` beside its file.

    {"name": "fashion",
     "input":  {"name": "x", "shape": [1, 28, 28], "dtype": "float32"},
     "preprocessing": {"kind": "image", "height": 28, ...},
     "output": {"name": "y", "size": 10, "meaning": "logits"},
     "labels": ["T-shirt/top", ...]}

Nothing here needs torch, so that a server of a model starts quickly.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from umbel.clients.data.inputs import Inputs, from_json, to_json
from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]
FILE = "signature.json"
INPUT, OUTPUT = "x", "y"
"""What the one input and the one output are called in a graph."""
OF_CLASSES = ("logits", "logit", "probabilities", "scores")


@dataclass(frozen=True)
class Signature:
    """A model's inputs and outputs.

    Attributes:
        name: of the model.
        inputs: how what people have becomes what it takes.
        output: what it gives, as in `umbel.clients.trainers.exported.Output`.
        size: how many numbers it gives for an example.
        labels: names of the classes; () where they have none.
    """

    name: str
    inputs: Inputs
    output: str
    size: int
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        classes = 2 if self.output == "logit" else self.size
        if self.labels and self.output in OF_CLASSES and len(self.labels) != classes:
            raise ConfigError(
                f"the model tells {classes} classes apart, but {len(self.labels)} labels are "
                "given; give one for each class, in the order of their numbers"
            )

    def to_json(self) -> dict[str, Any]:
        """As it stands in the file."""
        return {
            "name": self.name,
            "input": {
                "name": INPUT,
                "shape": list(self.inputs.shape),
                "dtype": self.inputs.model_dtype,
            },
            "preprocessing": to_json(self.inputs),
            "output": {"name": OUTPUT, "size": self.size, "meaning": self.output},
            "labels": list(self.labels),
        }

    def write(self, folder: Path) -> None:
        """Write the file into a folder."""
        text = json.dumps(self.to_json(), indent=2) + "\n"
        (folder / FILE).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "Signature":
        """The signature of a delivered model.

        Raises:
            ConfigError: the folder has none, or it is damaged.
        """
        path = folder / FILE
        if not path.is_file():
            raise ConfigError(
                f"{folder} has a model without a signature ({FILE} is missing), so nobody knows "
                "what it takes; make the folder again with: umbel export RUN"
            )
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} cannot be read as a signature ({error!r}); make the folder again with: "
                "umbel export RUN"
            ) from error

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Signature":
        """What `to_json` gave."""
        return cls(
            str(value["name"]),
            from_json(value["preprocessing"]),
            str(value["output"]["meaning"]),
            int(value["output"]["size"]),
            tuple(map(str, value["labels"])),
        )

    def answers(self, outputs: Array) -> list[dict[str, Any]]:
        """What people read of a model's outputs, of shape (n, size) or (n,).

        Classes: `class`, `label` where there are names, `score` (a share where the model has
        shares, else the number itself). Values: `value`, or `values` where there are several.
        """
        rows = outputs.reshape(len(outputs), -1)
        if self.output not in OF_CLASSES or outputs.ndim > 2:
            return [
                {"value": float(row[0])} if row.size == 1 else {"values": row.tolist()}
                for row in rows
            ]
        shares = self._shares(rows.astype(np.float64))
        best = shares.argmax(1)
        scores = shares[np.arange(len(shares)), best]
        found: list[dict[str, Any]] = []
        for place, score in zip(best.tolist(), scores.tolist(), strict=True):
            named = {"label": self.labels[place]} if self.labels else {}
            found.append({"class": place, **named, "score": score})
        return found

    def classes(self, outputs: Array) -> Array:
        """The class of each example, shape (n,)."""
        found: Array = self._shares(outputs.reshape(len(outputs), -1)).argmax(1)
        return found

    def _shares(self, rows: Array) -> Array:
        if self.output == "logit":
            one = 1 / (1 + np.exp(-rows[:, :1]))
            return np.concatenate([1 - one, one], 1)
        if self.output != "logits":
            return rows
        powers = np.exp(rows - rows.max(1, keepdims=True))
        shares: Array = powers / powers.sum(1, keepdims=True)
        return shares
