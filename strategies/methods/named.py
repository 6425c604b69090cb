"""Methods by the names that the option `method` has: one line each.

The layer of a method may need the layout of the first model, which is asked for only there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.options import Options
from umbel.core.records import Manifest, Tree
from umbel.core.registry import provide
from umbel.strategies.methods.ditto import Ditto
from umbel.strategies.methods.feddyn import FedDyn
from umbel.strategies.methods.fedexp import FedExP
from umbel.strategies.methods.fednova import FedNova
from umbel.strategies.methods.fedrep import FedRep
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.methods.perfedavg import PerFedAvg
from umbel.strategies.methods.personal_parts import (
    PersonalParts,
    named_parts,
    normalisation_parts,
)
from umbel.strategies.methods.qfedavg import QFedAvg
from umbel.strategies.methods.scaffold import Scaffold
from umbel.strategies.transform import Transform

KIND = "objective"
"""The kind of part that the option `method` names."""

FirstModel = Callable[[], tuple[Tree, Tree]]
"""Parameters and buffers of the first model, whose layout personal parts need."""

Make = Callable[[MethodOptions, Options, FirstModel], Transform[Any] | None]


def _fedprox(_: MethodOptions, options: Options, model: FirstModel) -> None:  # noqa: ARG001
    if not float(options.get("proximal-mu", 0.0)) > 0:
        raise ConfigError(
            "method=fedprox needs proximal-mu above 0, the strength of the pull; give one such as "
            "proximal-mu=0.01, with a trainer that knows it (TorchTrainer)"
        )  # and with it, the option makes the layer


def _scaffold(_: MethodOptions, options: Options, model: FirstModel) -> Scaffold:  # noqa: ARG001
    return Scaffold(float(options.get("momentum", 0.0)))


def _fednova(_: MethodOptions, options: Options, model: FirstModel) -> FedNova:  # noqa: ARG001
    return FedNova(float(options.get("momentum", 0.0)))


def _fedper(own: MethodOptions, _: Options, model: FirstModel) -> PersonalParts:
    sizes = _sizes(model()[0])
    return PersonalParts(named_parts(sizes, own.personal_layers), sum(sizes.values()))


def _fedrep(own: MethodOptions, _: Options, model: FirstModel) -> FedRep:
    sizes = _sizes(model()[0])
    parts = named_parts(sizes, own.personal_layers, "fedrep")
    return FedRep(parts, sum(sizes.values()), head_epochs=own.fedrep_head_epochs)


def _fedbn(_: MethodOptions, options: Options, model: FirstModel) -> PersonalParts:  # noqa: ARG001
    parameters, buffers = model()
    sizes = _sizes(parameters)
    parts = normalisation_parts(sizes, buffers)
    return PersonalParts(parts, sum(sizes.values()), name="fedbn")


def _sizes(parameters: Tree) -> dict[str, int]:
    return {name: Manifest.of({name: value}).size for name, value in parameters.items()}


METHODS: Mapping[str, Make] = {
    "fedavg": lambda *_: None,
    "fedprox": _fedprox,
    "scaffold": _scaffold,
    "feddyn": lambda own, *_: FedDyn(own.feddyn_alpha),
    "fednova": _fednova,
    "fedexp": lambda own, *_: FedExP(own.fedexp_eps),
    "q-fedavg": lambda own, *_: QFedAvg(own.qfedavg_q),
    "ditto": lambda own, *_: Ditto(own.ditto_lambda),
    "fedper": _fedper,
    "fedbn": _fedbn,
    "fedrep": _fedrep,
    "per-fedavg": lambda own, *_: PerFedAvg(own.perfedavg_alpha),
}


def _provided(make: Make) -> Callable[[Options, FirstModel], Transform[Any] | None]:
    """A method as a function of the options and of what gives the first model."""

    def of(options: Options, model: FirstModel) -> Transform[Any] | None:
        return make(MethodOptions.read(options), options, model)

    return of


for _name, _make in METHODS.items():
    provide(KIND, _name, _provided(_make))
