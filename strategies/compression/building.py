"""The layers that the option `compression` names, put around a stack."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from umbel.core.errors import ConfigError
from umbel.strategies.compression.half import Half
from umbel.strategies.compression.options import NONE, CompressionOptions
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

_SHORTER: Mapping[str, Callable[[float, int], Transform[Any]]] = {
    "random-k": RandomK,
    "top-k": lambda fraction, _: TopK(fraction),
    "sign": lambda *_: Sign(),
}
"""What makes an update shorter, from the fraction and the run's seed."""
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


def around(stack: Stack, options: CompressionOptions, seed: int, secret: bool) -> Stack:
    """The stack with the layers that compress, first of all.

    Args:
        stack: without what privacy and secure sums add.
        options: what is asked for.
        seed: of the run.
        secret: whether updates will be summed in secret: they are then rounded where whole
            numbers are made of them, at the bottom.

    Raises:
        ConfigError: compression and stack do not go together, with the cure.
    """
    if options.compression == NONE:
        return stack
    first = [
        _SHORTER[name](options.compression_fraction, seed)
        for name in options.names
        if name in _SHORTER
    ]
    last: list[Transform[Any]] = []
    for name in options.names:
        if name in _ROUNDED and secret:
            last = _in_whole_numbers(stack, options, name)
        elif name in _ROUNDED:
            first.append(_ROUNDED[name])
    made = replace(stack, layers=(*first, *stack.layers, *last))
    if secret and made.packs:
        raise ConfigError(
            f"compression={options.compression} sends other coordinates of each node, or none "
            "that can be added up, and secure=true adds them up in secret; take random-k or "
            "qsgd-8, which do, or leave out one of them"
        )
    if made.packs and compares(stack.collect):
        raise ConfigError(
            f"compression={options.compression} makes of updates something else than the "
            f"coordinator's own, with which {stack.collect.name} compares them; take "
            "compression=random-k, or another aggregator"
        )
    return made


def _in_whole_numbers(stack: Stack, options: CompressionOptions, name: str) -> list[Transform[Any]]:
    if name not in _LEVELS:
        raise ConfigError(
            f"compression={options.compression} rounds to numbers of 16 bits, and secure=true "
            "adds up whole numbers; take qsgd-8, which says how fine those are"
        )
    if any(shapes(layer) for layer in stack.layers):
        raise ConfigError(
            f"compression={options.compression} says how fine whole numbers of updates are, and "
            "the app's own stack has layers that do; leave out one of them"
        )
    return [Rotate(), Quantize(_LEVELS[name], "stochastic")]
