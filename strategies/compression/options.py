"""The options of compression, and the layer that they ask for."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from umbel.core.errors import ConfigError
from umbel.core.limits import check_limits, one_of, option, up_to_one
from umbel.core.options import OptionGroup

if TYPE_CHECKING:  # options are told without torch, which takes a second
    from umbel.strategies.compression.random_k import RandomK

NONE = "none"


@dataclass(frozen=True)
class CompressionOptions(OptionGroup):
    """What of an update is sent; the option names are these with dashes for underscores.

    Attributes:
        compression: `none`: all of it; `random-k`: a few coordinates, which the round chooses, the
            same on all nodes; a node keeps the others and adds them to its next update.
        compression_fraction: with `random-k`, the fraction of the coordinates that is sent.
    """

    compression: str = option(NONE, one_of(NONE, "random-k"))
    compression_fraction: float = option(0.05, up_to_one(without_zero=True))

    def __post_init__(self) -> None:
        check_limits(self)
        given = self.compression_fraction
        if self.compression == NONE and given != CompressionOptions.compression_fraction:
            raise ConfigError(
                f"compression-fraction is {given:g}, but nothing is compressed; add "
                "compression=random-k, or leave it out"
            )

    def layer(self, seed: int) -> "RandomK | None":
        """The layer that compresses; None where nothing does.

        Args:
            seed: of the run.
        """
        if self.compression == NONE:
            return None
        from umbel.strategies.compression.random_k import RandomK

        return RandomK(self.compression_fraction, seed)
