"""Server optimisers by the names that the option `optimizer` has.

The names are known without the optimisers, which need torch: it takes a second to import, and a
run that is refused shall not wait for it.
"""

from collections.abc import Mapping
from typing import Any, Literal

from umbel.core.registry import provide


def _rate(options: Mapping[str, Any], own: float) -> float:
    """The server's learning rate; 0 is the optimiser's own."""
    return float(options["server-learning-rate"]) or own


def _fedavg(options: Mapping[str, Any]) -> Any:
    from umbel.strategies.optimizers import FedAvg

    return FedAvg(_rate(options, 1.0))


def _fedavgm(options: Mapping[str, Any]) -> Any:
    from umbel.strategies.optimizers import FedAvgM

    return FedAvgM(_rate(options, 1.0), float(options["server-momentum"]))


def _adaptive(name: Literal["fedadam", "fedyogi", "fedadagrad"]) -> Any:
    def of(options: Mapping[str, Any]) -> Any:
        from umbel.strategies.optimizers import Adaptive

        return Adaptive(
            name,
            _rate(options, 0.1),
            float(options["beta-1"]),
            float(options["beta-2"]),
            float(options["adaptive-epsilon"]),
        )

    return of


provide("optimizer", "fedavg", _fedavg)
provide("optimizer", "fedavgm", _fedavgm)
provide("optimizer", "fedadam", _adaptive("fedadam"))
provide("optimizer", "fedyogi", _adaptive("fedyogi"))
provide("optimizer", "fedadagrad", _adaptive("fedadagrad"))
