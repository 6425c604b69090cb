"""What liars send. They know each other and see the honest updates of their own nodes only.

sign-flip             their update the other way, `FLIPPED` times as long
gaussian              noise as long as `NOISY` honest updates (Blanchard et al. 2017, section 5)
replacement           the mean the other way, so long that it takes the place of the average
                      (Bagdasaryan et al. 2020, section 4)
little-is-enough      as far from the mean as chance could be (Baruch et al. 2019, algorithm 3)
inner-product         the mean the other way, a little (Xie et al. 2020, section 4)
min-max               as far as no farther from any than any two are (Shejwalkar and Houmansadr
                      2021, section 4)
nan, huge             what is no update at all
label-flip            honest training on labels that are turned round
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from umbel.clients.data.examples import Examples, Node, Split
from umbel.core.names import UPDATE
from umbel.core.options import Options
from umbel.core.records import to_array
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.exchange import Exchange, Gather, read_vector

FLIPPED = 5.0
NOISY = 10.0
INNER = 0.5
STEPS = 40
"""Halvings in the search for the largest step of `min-max`."""


@dataclass(frozen=True)
class Scene:
    """What liars know of a round.

    Attributes:
        nodes: that take part.
        liars: of them.
        generator: for what is random.
    """

    nodes: int
    liars: int
    generator: torch.Generator


Lie = Callable[[Tensor, Scene], Tensor]
"""From the liars' honest updates, shape (liars, size), to what they send, of the same shape."""


def sign_flip(own: Tensor, _: Scene) -> Tensor:
    return -FLIPPED * own


def gaussian(own: Tensor, scene: Scene) -> Tensor:
    noise = torch.randn(own.shape, generator=scene.generator, dtype=own.dtype)
    longer: Tensor = noise * (NOISY * own.norm(dim=1, keepdim=True) / math.sqrt(own.shape[1]))
    return longer


def replacement(own: Tensor, scene: Scene) -> Tensor:
    return (-scene.nodes / scene.liars * own.mean(0)).expand_as(own)


def little_is_enough(own: Tensor, scene: Scene) -> Tensor:
    honest = scene.nodes - scene.liars
    supporters = scene.nodes // 2 + 1 - scene.liars
    part = min(max((honest - supporters) / honest, 0.5), 0.999)
    return (own.mean(0) - NormalDist().inv_cdf(part) * _spread(own)).expand_as(own)


def inner_product(own: Tensor, _: Scene) -> Tensor:
    return (-INNER * own.mean(0)).expand_as(own)


def min_max(own: Tensor, _: Scene) -> Tensor:
    mean, away = own.mean(0), -_spread(own)
    farthest = torch.cdist(own, own).max()
    low, high = 0.0, 1.0
    while (own - (mean + high * away)).norm(dim=1).max() <= farthest and high < 1e6:
        high *= 2
    for _step in range(STEPS):
        middle = (low + high) / 2
        near = (own - (mean + middle * away)).norm(dim=1).max() <= farthest
        low, high = (middle, high) if near else (low, middle)
    return (mean + low * away).expand_as(own)


def nan(own: Tensor, _: Scene) -> Tensor:
    return torch.full_like(own, math.nan)


def huge(own: Tensor, _: Scene) -> Tensor:
    return torch.full_like(own, 1e30)


def _spread(own: Tensor) -> Tensor:
    """Standard deviation of each coordinate; of one liar, the size of its own."""
    return own.std(0) if len(own) > 1 else own[0].abs()


LIES: Mapping[str, Lie] = {
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "replacement": replacement,
    "little-is-enough": little_is_enough,
    "inner-product": inner_product,
    "min-max": min_max,
    "nan": nan,
    "huge": huge,
}
ATTACKS = ("none", "label-flip", *LIES)
"""By name, in the order of the table."""


def lying(exchange: Exchange, liars: Sequence[int], lie: Lie, seed: int) -> Exchange:
    """The same exchange, whose liars' replies are lies by the time that the server reads them.

    It is a shallow copy with one method replaced on the instance, so that it keeps its class.

    Args:
        exchange: in the clear.
        liars: ids of the nodes.
        lie: what they send.
        seed: of what is random.
    """
    changed = copy.copy(exchange)

    def gather(requests: Sequence[Message], round_: RoundSpec) -> Gather:
        asked = {message.metadata.dst_node_id for message in requests}
        among = {node for node in liars if node in asked}
        generator = torch.Generator().manual_seed(seed * 1_000_003 + round_.number)
        scene = Scene(len(asked), len(among), generator)
        trip = exchange.gather(requests, round_)
        sent = next(trip)
        try:
            while True:
                sent = trip.send(_lied((yield sent), among, lie, scene, round_.size))
        except StopIteration as end:
            result: Aggregate = end.value
            return result

    object.__setattr__(changed, "gather", gather)
    return changed


def _lied(
    arriving: Iterator[Message], liars: set[int], lie: Lie, scene: Scene, size: int
) -> Iterator[Message]:
    own: dict[int, Message] = {}
    for message in arriving:
        node = message.metadata.src_node_id
        if node in liars and not message.has_error():
            own[node] = message
        else:
            yield message
    if own:
        updates = [read_vector(own[node], UPDATE, size) for node in sorted(own)]
        lies = lie(torch.stack(updates), scene)
        for node, vector in zip(sorted(own), lies, strict=True):
            message = own[node]
            record = ArrayRecord({UPDATE: to_array(vector.clone())})
            message.content = RecordDict({**message.content, UPDATE: record})
            yield message


@dataclass(frozen=True)
class FlippedLabels:
    """A `data` function in which some nodes have their labels turned round."""

    data: Callable[[Node, Options], Any]
    liars: frozenset[int]

    def __call__(self, node: Node, options: Options) -> Any:
        """The node's examples; a liar's highest class is its lowest, and so on."""
        found = self.data(node, options)
        if node.partition not in self.liars:
            return found
        split = found if isinstance(found, Split) else Split(found)
        labels = split.train.y
        return Split(Examples(split.train.x, labels.max() - labels), split.test)
