"""The running statistics that a model is delivered with, where each node keeps its own.

    server -> node  query.umbel_statistics      to the nodes that trained in the round
    node -> server  its running statistics      and the examples that they were gathered on

Batch norm measures what passes through it, so a model with the first model's statistics is
wrong whatever its parameters are. Nodes go on with their own (`buffers=local`); the model that
the coordinator judges and delivers has those of all nodes' examples together: means of means,
and variances that count how far the nodes' means lie apart (the law of total variance).
"""

from collections.abc import Sequence

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from umbel.core.records import Manifest, Tree, from_array
from umbel.server.drive import stream
from umbel.server.roster import NodeRef
from umbel.strategies.collect import BUFFERS, EXAMPLES, numbers
from umbel.strategies.layout import CONFIG, STATISTICS
from umbel.strategies.ordered_sum import OrderedSum

MEAN, VARIANCE = "running_mean", "running_var"


def ask_statistics(
    grid: Grid, nodes: Sequence[NodeRef], manifest: Manifest, number: int, timeout: float | None
) -> Tree | None:
    """The statistics of all examples that these nodes trained on; None where no node has any.

    Args:
        grid: the engine.
        nodes: who trained.
        manifest: names and shapes of the statistics.
        number: of the round.
        timeout: seconds to wait for the answers.
    """
    config = ConfigRecord({"round": number})
    kind, group = f"query.{STATISTICS}", str(number)
    requests = [
        Message(RecordDict({CONFIG: config}), node.node_id, kind, group_id=group) for node in nodes
    ]
    places = {node.node_id: place for place, node in enumerate(nodes)}
    fold, total = OrderedSum(2 * manifest.size, torch.float64), 0.0
    weights: dict[int, float] = {}
    for reply in stream(grid, requests, timeout):
        place = places.pop(reply.metadata.src_node_id, None)
        if place is None:
            continue
        values, weight = _read(reply, manifest)
        if values is None:
            fold.skip(place)
            continue
        fold.offer(place, torch.cat([values, values.square()]), weight)
        weights[place] = weight
    for place in places.values():
        fold.skip(place)
    total = sum(weights[place] for place in sorted(weights))
    if not total:
        return None
    found = fold.finish() / total
    return _pooled(manifest, found[: manifest.size], found[manifest.size :])


def _read(reply: Message, manifest: Manifest) -> tuple[Tensor | None, float]:
    """One node's statistics as a vector in float64; None where it has none that can be used."""
    record = reply.content.get(BUFFERS) if reply.has_content() else None
    weight = numbers(reply).get(EXAMPLES, 0.0)
    if not isinstance(record, ArrayRecord) or not 0 < weight < 2**53:
        return None, 0.0
    parts = []
    for name, shape in zip(manifest.names, manifest.shapes, strict=True):
        try:
            value = from_array(record[name])
        except (KeyError, ValueError):
            return None, 0.0
        real = value.is_floating_point() and tuple(value.shape) == shape
        if not real or not bool(torch.isfinite(value).all()):
            return None, 0.0
        parts.append(value.double().flatten())
    return torch.cat(parts), weight


def _pooled(manifest: Manifest, mean: Tensor, square: Tensor) -> Tree:
    """Means over all examples; a variance with the variance of the nodes' means added."""
    wide = Manifest(manifest.names, manifest.shapes, (torch.float64,) * len(manifest.names))
    means, squares = wide.unflatten(mean), wide.unflatten(square)
    result = {}
    for name, dtype in zip(manifest.names, manifest.dtypes, strict=True):
        value = means[name]
        beside = name.removesuffix(VARIANCE) + MEAN
        if name.endswith(VARIANCE) and beside in means:
            value = value + (squares[beside] - means[beside].square()).clamp(min=0)
        result[name] = value.to(dtype)
    return result
