"""The settings of local training that mean the same in every framework."""

from dataclasses import dataclass
from typing import TypeVar

from umbel.clients.settings import read
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError
from umbel.core.limits import at_least, check_limits, option


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How a node trains by gradient steps. Option names are the same in kebab-case.

    Attributes:
        learning_rate: learning rate of the local optimiser; a round's own rate
            (`Job.learning_rate`) wins.
        batch_size: examples a step; 0 is all of them.
        local_epochs: passes over the node's examples.
        local_steps: steps of the optimiser; above 0 it takes the place of `local_epochs`.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        proximal_mu: strength of FedProx: mu/2 times the squared distance to the model that was sent
            is added to the loss (Li et al. 2020, https://arxiv.org/abs/1812.06127, eq. 2).
        clip_gradient: largest l2 norm of a step's gradient; 0 is no limit.
    """

    learning_rate: float = option(0.05, at_least(0))
    batch_size: int = option(32, at_least(0))
    local_epochs: int = option(1, at_least(0))
    local_steps: int = option(0, at_least(0))
    momentum: float = option(0.0, at_least(0))
    weight_decay: float = option(0.0, at_least(0))
    proximal_mu: float = option(0.0, at_least(0))
    clip_gradient: float = option(0.0, at_least(0))

    def validate(self) -> None:
        """Raises:
        ConfigError: a value is out of its range.
        """
        check_limits(self)
        if self.local_epochs == 0 and self.local_steps == 0:
            raise ConfigError("local-epochs and local-steps are both 0; set one of them above 0")


L = TypeVar("L", bound=LocalSettings)


def local_settings(defaults: L, options: Options, learning_rate: float | None) -> L:
    """A trainer's settings with the options' changes; a round's learning rate wins.

    Raises:
        ConfigError: an option has the wrong type or is out of its range.
    """
    if learning_rate is not None:
        options = {**options, "learning-rate": learning_rate}
    settings = read(defaults, options)
    settings.validate()
    return settings
