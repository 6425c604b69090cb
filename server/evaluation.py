"""Federated evaluation: the model on the nodes' own test examples."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Message

from umbel.server.roster import NodeRef
from umbel.strategies.collect import COUNTED, EXAMPLES, LARGEST_METRIC, Rejected, numbers

FALLING = {"loss", "error", "rmse", "mse", "mae", "perplexity", "ppl", "nll"}
GROWING = {"accuracy", "acc", "auc", "f1", "r2", "precision", "recall", "dice"}
LARGEST_WEIGHT = 2.0**53
"""Examples that a node may claim, as in training."""


def words_of(name: str) -> set[str]:
    """The words of a metric's name: `test_loss` has `test` and `loss`."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def direction(name: str) -> int:
    """1 where more of a metric is better, -1 where less is, 0 where its name does not tell."""
    words = words_of(name)
    if words & FALLING:
        return -1
    return int(bool(words & GROWING))


@dataclass(frozen=True)
class FederatedEvaluation:
    """What the nodes reported.

    Attributes:
        rows: a dict a node: `node`, `examples` and its metrics, by name.
        counted: for each row, of how many examples those metrics are that not all have.
        failed: nodes that sent an error.
    """

    rows: Sequence[Mapping[str, Any]] = ()
    failed: Sequence[Rejected] = field(default_factory=tuple)
    counted: Sequence[Mapping[str, float]] = ()

    def summary(self) -> dict[str, dict[str, float]]:
        """For each metric: `mean` (weighted by the examples that have it), `spread` (standard
        deviation over nodes), `worst_decile` (mean of the worst tenth of nodes), `nodes`.
        """
        names = sorted({name for row in self.rows for name in row} - {"node", "examples"})
        result: dict[str, dict[str, float]] = {}
        for name in names:
            known = [
                (row[name], self._weight(place, name))
                for place, row in enumerate(self.rows)
                if abs(row.get(name, math.nan)) <= LARGEST_METRIC and self._weight(place, name)
            ]
            if known:
                values, weights = np.array(known, dtype=np.float64).T
                result[name] = _spread(name, values, weights)
        return result

    def means(self) -> dict[str, float]:
        """For each metric, the mean over all examples that have it."""
        return {name: values["mean"] for name, values in self.summary().items()}

    def _weight(self, place: int, name: str) -> float:
        """Of how many examples of one node this metric is."""
        examples = float(self.rows[place]["examples"])
        counted = self.counted[place] if self.counted else {}
        return min(examples, max(0.0, counted.get(name, examples)))


def _spread(
    name: str, values: np.ndarray[Any, Any], weights: np.ndarray[Any, Any]
) -> dict[str, float]:
    worst_first = np.sort(values)
    if direction(name) < 0:
        worst_first = worst_first[::-1]
    tenth = max(1, len(values) // 10)
    return {
        "mean": float(np.average(values, weights=weights)),
        "spread": float(values.std()),
        "worst_decile": float(worst_first[:tenth].mean()),
        "nodes": len(values),
    }


def gather(replies: Iterable[Message], nodes: Sequence[NodeRef]) -> FederatedEvaluation:
    """Collect the nodes' replies to requests to evaluate."""
    names = {node.node_id: node.name for node in nodes}
    order = {node.node_id: i for i, node in enumerate(nodes)}
    rows: dict[int, dict[str, Any]] = {}
    failed: list[Rejected] = []
    counted: dict[int, dict[str, float]] = {}
    for reply in replies:
        node_id = reply.metadata.src_node_id
        if reply.has_error():
            failed.append(Rejected(node_id, reply.error.reason or f"error {reply.error.code}"))
            continue
        metrics = numbers(reply)
        examples = metrics.pop(EXAMPLES, 0.0)
        if node_id in order and 0 < examples < LARGEST_WEIGHT:
            own = {"node": names[node_id], "examples": int(examples)}  # whatever metrics are called
            rows[order[node_id]] = {**own, **metrics, **own}
            counted[order[node_id]] = numbers(reply, COUNTED)
    return FederatedEvaluation(
        [rows[i] for i in sorted(rows)], tuple(failed), [counted[i] for i in sorted(rows)]
    )
