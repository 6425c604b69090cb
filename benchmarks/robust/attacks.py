"""What liars send. They know each other and see the honest updates of their own nodes only, unless
they are omniscient: then they see those of all nodes.

sign-flip             their update the other way, `FLIPPED` times as long
gaussian              noise as long as `NOISY` honest updates (Blanchard et al. 2017, section 5)
replacement           the mean the other way, so long that it takes the place of the average
                      (Bagdasaryan et al. 2020, section 4)
little-is-enough      as far from the mean as chance could be (Baruch et al. 2019, algorithm 3)
inner-product         the mean the other way, a little (Xie et al. 2020, section 4)
min-max               as far as no farther from any than any two are (Shejwalkar and Houmansadr
                      2021, section 4)
nan, huge             what is no update at all
backdoor-replacement  their update so long that it takes the place of the average (Bagdasaryan et
                      al. 2020, section 4.2), after training on patched examples

Lies in what liars train on are in `umbel.benchmarks.robust.poison`. In a secure sum a liar sends
its lie from its node, masked like any other update, and knows its own update only.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, cast

import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from torch import Tensor

from umbel.core.contents import take_record
from umbel.core.names import UPDATE
from umbel.core.records import from_array, to_array
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.exchange import Exchange, Gather, Sealing, Seals, read_vector
from umbel.strategies.secure.wire import plain_of

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
        seen: the honest updates that they see, shape (seen, size); None is their own only.
    """

    nodes: int
    liars: int
    generator: torch.Generator
    seen: Tensor | None = None

    def known(self, own: Tensor) -> Tensor:
        """What they see, where their own updates are `own`."""
        return own if self.seen is None else self.seen


Lie = Callable[[Tensor, Scene], Tensor]
"""From the liars' honest updates, shape (liars, size), to what they send, of the same shape."""


def sign_flip(own: Tensor, _: Scene) -> Tensor:
    return -FLIPPED * own


def gaussian(own: Tensor, scene: Scene) -> Tensor:
    noise = torch.randn(own.shape, generator=scene.generator, dtype=own.dtype)
    longer: Tensor = noise * (NOISY * own.norm(dim=1, keepdim=True) / math.sqrt(own.shape[1]))
    return longer


def replacement(own: Tensor, scene: Scene) -> Tensor:
    return (-scene.nodes / scene.liars * scene.known(own).mean(0)).expand_as(own)


def little_is_enough(own: Tensor, scene: Scene) -> Tensor:
    honest = scene.nodes - scene.liars
    supporters = scene.nodes // 2 + 1 - scene.liars
    part = min(max((honest - supporters) / honest, 0.5), 0.999)
    seen = scene.known(own)
    return (seen.mean(0) - NormalDist().inv_cdf(part) * _spread(seen)).expand_as(own)


def inner_product(own: Tensor, scene: Scene) -> Tensor:
    return (-INNER * scene.known(own).mean(0)).expand_as(own)


def min_max(own: Tensor, scene: Scene) -> Tensor:
    seen = scene.known(own)
    mean, away = seen.mean(0), -_spread(seen)
    farthest = torch.cdist(seen, seen).max()
    low, high = 0.0, 1.0
    while (seen - (mean + high * away)).norm(dim=1).max() <= farthest and high < 1e6:
        high *= 2
    for _step in range(STEPS):
        middle = (low + high) / 2
        near = (seen - (mean + middle * away)).norm(dim=1).max() <= farthest
        low, high = (middle, high) if near else (low, middle)
    return (mean + low * away).expand_as(own)


def boosted(own: Tensor, scene: Scene) -> Tensor:
    return scene.nodes / scene.liars * own


def nan(own: Tensor, _: Scene) -> Tensor:
    return torch.full_like(own, math.nan)


def huge(own: Tensor, _: Scene) -> Tensor:
    return torch.full_like(own, 1e30)


def _spread(own: Tensor) -> Tensor:
    """Standard deviation of each coordinate; of one liar, the size of its own."""
    return own.std(0) if len(own) > 1 else own[0].abs()


LIES: Mapping[str, Lie] = {
    "backdoor-replacement": boosted,
    "sign-flip": sign_flip,
    "gaussian": gaussian,
    "replacement": replacement,
    "little-is-enough": little_is_enough,
    "inner-product": inner_product,
    "min-max": min_max,
    "nan": nan,
    "huge": huge,
}


def lying(
    exchange: Exchange,
    liars: Sequence[int],
    lie: Lie,
    seed: int,
    *,
    nodes: int = 0,
    omniscient: bool = False,
) -> Exchange:
    """The same exchange, whose liars' replies are lies by the time that the server reads them.

    It is a shallow copy with one method replaced on the instance, so that it keeps its class.

    Args:
        exchange: of the stack; where its nodes seal updates, liars lie before they do.
        liars: ids of the nodes.
        lie: what they send.
        seed: of what is random.
        nodes: of a round, as liars of a secure sum take them to be; others count those asked.
        omniscient: they see the honest updates of all nodes.
    """
    if isinstance(exchange, Seals):
        return _sealing(exchange, frozenset(liars), lie, seed, nodes)
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
                replies = _lied((yield sent), among, lie, scene, round_.size, omniscient)
                sent = trip.send(replies)
        except StopIteration as end:
            result: Aggregate = end.value
            return result

    object.__setattr__(changed, "gather", gather)
    return changed


def _lied(
    arriving: Iterator[Message],
    liars: set[int],
    lie: Lie,
    scene: Scene,
    size: int,
    omniscient: bool,
) -> Iterator[Message]:
    own: dict[int, Message] = {}
    others: list[Message] = []
    for message in arriving:
        if message.has_error():
            yield message
        elif message.metadata.src_node_id in liars:
            own[message.metadata.src_node_id] = message
        elif omniscient:
            others.append(message)
        else:
            yield message
    if own:
        updates = torch.stack([read_vector(own[node], UPDATE, size) for node in sorted(own)])
        if others:
            honest = [read_vector(message, UPDATE, size) for message in others]
            scene = replace(scene, seen=torch.cat([updates, torch.stack(honest)]))
        for node, vector in zip(sorted(own), lie(updates, scene), strict=True):
            message = own[node]
            message.content = _with_update(message.content, vector)
            yield message
    yield from others


def _with_update(content: RecordDict, vector: Tensor) -> RecordDict:
    return RecordDict({**content, UPDATE: ArrayRecord({UPDATE: to_array(vector.clone())})})


def _sealing(
    exchange: Exchange, liars: frozenset[int], lie: Lie, seed: int, nodes: int
) -> Exchange:
    """The same exchange, whose liars seal a lie; each of them knows its own update only."""
    changed = cast(Any, copy.copy(exchange))
    honest = changed.seal

    def seal(content: RecordDict, request: Message, context: Context, own: Sealing) -> RecordDict:
        if context.node_id in liars:
            asked = plain_of(request.content)
            step, bits = math.ldexp(1.0, int(asked["step"])), int(asked["bits"])
            update = from_array(take_record(content, UPDATE, ArrayRecord)[UPDATE])
            generator = torch.Generator().manual_seed(seed * 1_000_003 + context.node_id)
            scene = Scene(nodes, len(liars), generator)
            told = lie(update[None], scene)[0].double()
            most = math.ldexp(step, bits - 2)  # whatever the masks have room for
            content = _with_update(content, (told / step).round().mul(step).clamp(-most, most))
        made: RecordDict = honest(content, request, context, own)
        return made

    object.__setattr__(changed, "seal", seal)
    return cast(Exchange, changed)
