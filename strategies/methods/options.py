"""The options of methods; which method is one of those of every run."""

from dataclasses import dataclass

from umbel.core.errors import ConfigError
from umbel.core.limits import above, at_least, check_limits, option
from umbel.core.options import OptionGroup, dashed

_OF = {
    "feddyn_alpha": ("feddyn",),
    "fedexp_eps": ("fedexp",),
    "qfedavg_q": ("q-fedavg",),
    "ditto_lambda": ("ditto",),
    "personal_layers": ("fedper", "fedrep"),
    "fedrep_head_epochs": ("fedrep",),
    "afl_rate": ("afl",),
    "perfedavg_alpha": ("per-fedavg",),
}
"""Which methods each option is for."""


@dataclass(frozen=True)
class MethodOptions(OptionGroup):
    """The options of methods; the option names are these with dashes for underscores.

    Attributes:
        feddyn_alpha: with `method=feddyn`, the strength of the pull to the model that was sent.
        fedexp_eps: with `method=fedexp`, what keeps the server's step bounded.
        qfedavg_q: with `method=q-fedavg`, how much more nodes count on which the model is worse; 0
            is FedAvg.
        afl_rate: with `method=afl`, how fast nodes come to count more on which the model is worse.
        ditto_lambda: with `method=ditto`, the strength of the pull of personal models to the
            common one.
        personal_layers: with `method=fedper` or `fedrep`, the parameters that stay on the nodes:
            names or patterns such as `head.*`, with commas between them.
        fedrep_head_epochs: with `method=fedrep`, a node's passes over its examples for its own
            parts, before it trains the common ones.
        perfedavg_alpha: with `method=per-fedavg`, the learning rate of the one step by which a node
            makes the common model its own.
        fine_tune_epochs: a node's passes over its examples by which it makes the common model its
            own before that is judged on its test examples; 0 is none.
    """

    feddyn_alpha: float = option(0.1, above(0))
    fedexp_eps: float = option(1e-3, above(0))
    qfedavg_q: float = option(1.0, at_least(0))
    afl_rate: float = option(0.1, above(0))
    ditto_lambda: float = option(0.1, above(0))
    personal_layers: str = ""
    fedrep_head_epochs: int = option(5, at_least(1))
    perfedavg_alpha: float = option(0.05, above(0))
    fine_tune_epochs: int = option(0, at_least(0))

    def __post_init__(self) -> None:
        check_limits(self)

    def check_for(self, method: str) -> None:
        """Refuse options of a method that the run does not have.

        Raises:
            ConfigError: one is given that would do nothing.
        """
        for name, owners in _OF.items():
            value = getattr(self, name)
            if value != getattr(MethodOptions, name) and method not in owners:
                raise ConfigError(
                    f"{dashed(name)} is {value}, but method is {method}; give "
                    f"method={' or '.join(owners)}, or leave {dashed(name)} out"
                )
