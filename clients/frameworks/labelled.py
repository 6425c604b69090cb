"""Rows for models of Hugging Face: the model's arguments by name, the labels among them."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from umbel.clients.data.examples import Examples
from umbel.clients.frameworks.adapters import inner
from umbel.clients.pytorch.rows import TARGETS, is_hugging_face
from umbel.core.errors import ConfigError

IGNORED = -100
"""The label that does not count, as in all of transformers."""


@dataclass(frozen=True)
class LabelledRows:
    """A data set whose rows are (arguments of the model, labels).

    Attributes:
        rows: the node's own.
        names: of the model's arguments.
        target: the column of the labels; empty is `labels` or `label`.
        pad: the token that fills up rows; None if the model has none.
        causal: whether rows without labels are to be continued, token by token.
    """

    rows: Any
    names: frozenset[str]
    target: str
    pad: int | None
    causal: bool

    @classmethod
    def of(cls, examples: Any, module: nn.Module, target: str) -> "LabelledRows":
        """A node's examples, for a model of transformers or adapters on one."""
        base = inner(module)
        if isinstance(examples, tuple) and len(examples) == 2:
            examples = Examples(*examples)
        if is_hugging_face(examples):
            examples = examples.with_format("numpy")
        elif isinstance(examples, Examples):
            examples = _Pairs(examples.x, examples.y)
        if not (hasattr(examples, "__getitem__") and hasattr(examples, "__len__")):
            raise ConfigError(
                f"a node's examples are a {type(examples).__name__}; give a datasets.Dataset, "
                "rows that are dicts, or Examples(token ids, labels)"
            )
        names = frozenset(inspect.signature(base.forward).parameters)
        causal = type(base).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        return cls(examples, names, target, getattr(base.config, "pad_token_id", None), causal)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[dict[str, Any], Any]:
        """One row.

        Raises:
            ConfigError: it has no labels, or nothing that the model takes.
        """
        row = self.rows[number]
        if isinstance(row, tuple | list) and len(row) == 2:
            x, labels = row
            row = {**(x if isinstance(x, Mapping) else {"input_ids": x}), "labels": labels}
            target = "labels"
        else:
            target = self.target or next((name for name in TARGETS if name in row), "")
        inputs = {n: _whole(v) for n, v in row.items() if n in self.names and n != target}
        if not inputs:
            raise ConfigError(
                f"row {number} of a node's data set has the columns {', '.join(map(str, row))}, "
                "of which the model takes none; it needs input_ids: tokenize the texts"
            )
        ids = inputs.get("input_ids")
        if ids is not None and self.pad is not None and "attention_mask" in self.names:
            inputs.setdefault("attention_mask", (ids != self.pad).astype(np.int64))
        labels = self._labels(number, row, target, inputs)
        return {**inputs, "labels": labels}, labels

    def _labels(self, number: int, row: Any, target: str, inputs: dict[str, Any]) -> Any:
        if target in row:
            return _whole(row[target])
        if target or not self.causal or "input_ids" not in inputs:
            raise ConfigError(
                f"row {number} of a node's data set has no {target or 'labels'!r}; its columns are "
                f"{', '.join(map(str, row))}: name the labels, as in target='label'"
            )
        mask = inputs.get("attention_mask")
        ids = inputs["input_ids"]
        return ids if mask is None else np.where(np.asarray(mask) != 0, ids, IGNORED)


@dataclass(frozen=True)
class _Pairs:
    x: Any
    y: Any

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, number: int) -> tuple[Any, Any]:
        return self.x[number], self.y[number]


def _whole(value: Any) -> Any:
    """A value as an array; whole numbers of every type as int64, for they are tokens or classes."""
    if isinstance(value, str | bytes):
        return value
    array = np.asarray(value)
    return array.astype(np.int64) if array.dtype.kind in "biu" else array


def scores(output: Any, labels: Tensor) -> dict[str, Tensor]:
    """Accuracy over the labels that count, where they are classes or tokens; else nothing.

    Args:
        output: of a model of transformers, with `logits` (B, C) or (B, T, C).
        labels: (B,) or (B, T); a causal model's outputs are about the token after.
    """
    logits = getattr(output, "logits", None)
    if logits is None or labels.is_floating_point() or logits.ndim != labels.ndim + 1:
        return {}
    if type(output).__name__.startswith("CausalLM"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    known = labels != IGNORED
    return {"accuracy": (logits.argmax(-1) == labels)[known].float().mean()}
