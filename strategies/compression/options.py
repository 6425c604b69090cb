"""The options of compression; the layers that they ask for are in `building`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from umbel.core.errors import ConfigError
from umbel.core.limits import check_limits, one_of, option, up_to_one
from umbel.core.options import OptionGroup

if TYPE_CHECKING:  # options are told without torch, which takes a second
    from umbel.strategies.stack import Stack

NONE = "none"
AND = "+"
"""Between the name of what makes an update shorter and that of what rounds it."""

SHORTER = ("random-k", "top-k", "sign")
"""What makes an update shorter."""
OF_A_FRACTION = ("random-k", "top-k")
ROUNDED = ("qsgd-8", "qsgd-4", "qsgd-2", "half")
"""How each coordinate is rounded."""
NAMES = (
    NONE,
    *SHORTER,
    *ROUNDED,
    *(f"random-k{AND}{rounded}" for rounded in ROUNDED),
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
        if not any(name in self.names for name in OF_A_FRACTION):
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
    def names(self) -> list[str]:
        """What is done to an update, in this order."""
        return self.compression.split(AND)

    def around(self, stack: "Stack", seed: int, secret: bool) -> "Stack":
        """`umbel.strategies.compression.building.around`, of these options."""
        from umbel.strategies.compression.building import around

        return around(stack, self, seed, secret)
