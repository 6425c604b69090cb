"""The options of compression, and the layers that they ask for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.limits import check_limits, one_of, option, up_to_one
from umbel.core.options import OptionGroup
from umbel.strategies.compression.half import Half
from umbel.strategies.compression.qsgd import Qsgd
from umbel.strategies.compression.random_k import RandomK
from umbel.strategies.compression.sign import Sign
from umbel.strategies.compression.top_k import TopK
from umbel.strategies.declared import shapes
from umbel.strategies.exchange import compares
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Transform

NONE = "none"
AND = "+"
"""Between the name of what makes an update shorter and that of what rounds it."""

_SHORTER: Mapping[str, Callable[[float, int], Transform[Any]]] = {
    "random-k": RandomK,
    "top-k": lambda fraction, _: TopK(fraction),
    "sign": lambda *_: Sign(),
}
"""What makes an update shorter, from the fraction and the run's seed."""
_OF_A_FRACTION = ("random-k", "top-k")
_ROUNDED: Mapping[str, Transform[Any]] = {
    "qsgd-8": Qsgd(8),
    "qsgd-4": Qsgd(4),
    "qsgd-2": Qsgd(2),
    "half": Half(),
}
"""How each coordinate is rounded."""
_LEVELS = {"qsgd-8": 32, "qsgd-4": 2, "qsgd-2": 1}
"""In a secure sum, the steps of a coordinate of typical size: so that almost every coordinate of
one update, which has a bell curve after the rotation, is a whole number of so many bits."""
NAMES = (
    NONE,
    *_SHORTER,
    *_ROUNDED,
    *(f"random-k{AND}{rounded}" for rounded in _ROUNDED),
)


@dataclass(frozen=True)
class CompressionOptions(OptionGroup):
    """What of an update is sent; the option names are these with dashes for underscores.

    Attributes:
        compression: `none`: all of it; `random-k`: a few coordinates, which the round chooses, the
            same on all nodes; `top-k`: the largest of each node's; `sign`: their signs; `qsgd-8`,
            `qsgd-4`, `qsgd-2`: each rounded at random to so many bits; `half`: to 16; or
            `random-k+qsgd-4` and the like. What random-k, top-k and sign do not send, a node adds
            to its next update.
        compression_fraction: with `random-k` and `top-k`, the fraction of the coordinates that is
            sent.
    """

    compression: str = option(NONE, one_of(*NAMES))
    compression_fraction: float = option(0.05, up_to_one(without_zero=True))

    def __post_init__(self) -> None:
        check_limits(self)
        given = self.compression_fraction
        if given == CompressionOptions.compression_fraction:
            return
        if not any(name in self._names for name in _OF_A_FRACTION):
            said = (
                "nothing is compressed"
                if self.compression == NONE
                else (f"compression={self.compression} sends every coordinate")
            )
            raise ConfigError(
                f"compression-fraction is {given:g}, but {said}; give compression=random-k or "
                "top-k, or leave it out"
            )

    @property
    def _names(self) -> list[str]:
        return self.compression.split(AND)

    def around(self, stack: Stack, seed: int, secret: bool) -> Stack:
        """The stack with the layers that compress, first of all.

        Args:
            stack: without what privacy and secure sums add.
            seed: of the run.
            secret: whether updates will be summed in secret: they are then rounded where whole
                numbers are made of them, at the bottom.

        Raises:
            ConfigError: compression and stack do not go together, with the cure.
        """
        if self.compression == NONE:
            return stack
        first = [
            _SHORTER[name](self.compression_fraction, seed)
            for name in self._names
            if name in _SHORTER
        ]
        last: list[Transform[Any]] = []
        for name in self._names:
            if name in _ROUNDED and secret:
                last = self._in_whole_numbers(stack, name)
            elif name in _ROUNDED:
                first.append(_ROUNDED[name])
        made = replace(stack, layers=(*first, *stack.layers, *last))
        if secret and made.packs:
            raise ConfigError(
                f"compression={self.compression} sends other coordinates of each node, or none "
                "that can be added up, and secure=true adds them up in secret; take random-k or "
                "qsgd-8, which do, or leave out one of them"
            )
        if made.packs and compares(stack.collect):
            raise ConfigError(
                f"compression={self.compression} makes of updates something else than the "
                f"coordinator's own, with which {stack.collect.name} compares them; take "
                "compression=random-k, or another aggregator"
            )
        return made

    def _in_whole_numbers(self, stack: Stack, name: str) -> list[Transform[Any]]:
        if name not in _LEVELS:
            raise ConfigError(
                f"compression={self.compression} rounds to numbers of 16 bits, and secure=true "
                "adds up whole numbers; take qsgd-8, which says how fine those are"
            )
        if any(shapes(layer) for layer in stack.layers):
            raise ConfigError(
                f"compression={self.compression} says how fine whole numbers of updates are, and "
                "the app's own stack has layers that do; leave out one of them"
            )
        return [Rotate(), Quantize(_LEVELS[name], "stochastic")]
