"""Methods by the names that the option `method` has: one line each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from umbel.core.errors import ConfigError
from umbel.core.options import Options
from umbel.core.records import Manifest
from umbel.core.registry import provide
from umbel.strategies.methods.ditto import Ditto
from umbel.strategies.methods.feddyn import FedDyn
from umbel.strategies.methods.fedexp import FedExP
from umbel.strategies.methods.fednova import FedNova
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.methods.personal_parts import (
    PersonalParts,
    named_parts,
    normalisation_parts,
)
from umbel.strategies.methods.qfedavg import QFedAvg
from umbel.strategies.methods.scaffold import Scaffold

KIND = "objective"
"""The kind of part that the option `method` names."""


@dataclass(frozen=True)
class KeptParts:
    """Personal parts of a model that is not known yet.

    Attributes:
        patterns: of the names of parameters, as in `personal-layers`.
        name: of the method.
    """

    patterns: str
    name: Literal["fedper", "fedbn"]

    def placed(
        self, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> PersonalParts:
        """The layer for a model.

        Raises:
            ConfigError: the model has no such parts.
        """
        sizes = {name: Manifest.of({name: value}).size for name, value in parameters.items()}
        parts = (
            named_parts(sizes, self.patterns)
            if self.name == "fedper"
            else normalisation_parts(sizes, buffers)
        )
        return PersonalParts(parts, sum(sizes.values()), self.name)


def _own(options: Options) -> MethodOptions:
    return MethodOptions.read(options)


def _fedprox(options: Options) -> None:
    if not float(options.get("proximal-mu", 0.0)) > 0:
        raise ConfigError(
            "method=fedprox needs proximal-mu above 0, the strength of the pull; give one such as "
            "proximal-mu=0.01, with a trainer that knows it (TorchTrainer)"
        )  # and with it, that option makes the layer


provide(KIND, "fedavg", lambda options: None)  # noqa: ARG005
provide(KIND, "fedprox", _fedprox)
provide(KIND, "scaffold", lambda options: Scaffold())  # noqa: ARG005
provide(KIND, "feddyn", lambda options: FedDyn(_own(options).feddyn_alpha))
provide(KIND, "fednova", lambda options: FedNova(float(options.get("momentum", 0.0))))
provide(KIND, "fedexp", lambda options: FedExP(_own(options).fedexp_eps))
provide(KIND, "q-fedavg", lambda options: QFedAvg(_own(options).qfedavg_q))
provide(KIND, "ditto", lambda options: Ditto(_own(options).ditto_lambda))
provide(KIND, "fedper", lambda options: KeptParts(_own(options).personal_layers, "fedper"))
provide(KIND, "fedbn", lambda options: KeptParts("", "fedbn"))  # noqa: ARG005


def method_for(part: Any, first: Any) -> Any:
    """A method as a layer.

    Args:
        part: what the option or the app gives; None is none.
        first: a function that gives the first model's parameters and buffers; asked for only
            where the method needs their layout.
    """
    return part.placed(*first()) if isinstance(part, KeptParts) else part
