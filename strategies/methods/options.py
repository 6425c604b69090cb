"""The options of methods; which method is one of those of every run."""

from dataclasses import dataclass

from umbel.core.errors import ConfigError
from umbel.core.limits import above, at_least, check_limits, option
from umbel.core.options import OptionGroup, dashed

_OF = {
    "feddyn_alpha": "feddyn",
    "fedexp_eps": "fedexp",
    "qfedavg_q": "q-fedavg",
    "ditto_lambda": "ditto",
    "personal_layers": "fedper",
}
"""Which method each option is for."""


@dataclass(frozen=True)
class MethodOptions(OptionGroup):
    """The options of methods; the option names are these with dashes for underscores.

    Attributes:
        feddyn_alpha: with `method=feddyn`, the strength of the pull to the model that was sent.
        fedexp_eps: with `method=fedexp`, what keeps the server's step bounded.
        qfedavg_q: with `method=q-fedavg`, how much more nodes count on which the model is worse; 0
            is FedAvg.
        ditto_lambda: with `method=ditto`, the strength of the pull of personal models to the
            common one.
        personal_layers: with `method=fedper`, the parameters that stay on the nodes: names or
            patterns such as `head.*`, with commas between them.
    """

    feddyn_alpha: float = option(0.1, above(0))
    fedexp_eps: float = option(1e-3, above(0))
    qfedavg_q: float = option(1.0, at_least(0))
    ditto_lambda: float = option(0.1, above(0))
    personal_layers: str = ""

    def __post_init__(self) -> None:
        check_limits(self)

    def check_for(self, method: str) -> None:
        """Refuse options of a method that the run does not have.

        Raises:
            ConfigError: one is given that would do nothing.
        """
        for name, owner in _OF.items():
            value = getattr(self, name)
            if value != getattr(MethodOptions, name) and method != owner:
                raise ConfigError(
                    f"{dashed(name)} is {value}, but method is {method}; give "
                    f"method={owner}, or leave {dashed(name)} out"
                )
