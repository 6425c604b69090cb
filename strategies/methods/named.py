"""Methods by the names that the option `method` has: one line each.

The layer of a method may need the layout of the first model, which is asked for only there. Each
function here imports the file of its own method only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from umbel.core.errors import ConfigError
from umbel.core.options import Options
from umbel.core.registry import provide
from umbel.strategies.methods.options import MethodOptions

if TYPE_CHECKING:  # names and options are told without torch, which takes a second
    from umbel.core.records import Tree
    from umbel.strategies.transform import Transform

KIND = "objective"
"""The kind of part that the option `method` names."""

FirstModel = Callable[[], "tuple[Tree, Tree]"]
"""Parameters and buffers of the first model, whose layout personal parts need."""

Make = Callable[[MethodOptions, Options, FirstModel], "Transform[Any] | None"]


def _fedprox(_: MethodOptions, options: Options, model: FirstModel) -> None:  # noqa: ARG001
    if not float(options.get("proximal-mu", 0.0)) > 0:
        raise ConfigError(
            "method=fedprox needs proximal-mu above 0, the strength of the pull; give one such as "
            "proximal-mu=0.01, with a trainer that knows it (TorchTrainer)"
        )  # and with it, the option makes the layer


def _scaffold(_: MethodOptions, options: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.scaffold import Scaffold

    return Scaffold(float(options.get("momentum", 0.0)))


def _feddyn(own: MethodOptions, _: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.feddyn import FedDyn

    return FedDyn(own.feddyn_alpha)


def _fednova(_: MethodOptions, options: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.fednova import FedNova

    return FedNova(float(options.get("momentum", 0.0)))


def _fedexp(own: MethodOptions, _: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.fedexp import FedExP

    return FedExP(own.fedexp_eps)


def _qfedavg(own: MethodOptions, _: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.qfedavg import QFedAvg

    return QFedAvg(own.qfedavg_q)


def _afl(own: MethodOptions, _: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.afl import AgnosticFL

    return AgnosticFL(own.afl_rate)


def _perfedavg(own: MethodOptions, _: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.perfedavg import PerFedAvg

    return PerFedAvg(own.perfedavg_alpha)


def _ditto(own: MethodOptions, _: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.ditto import Ditto

    return Ditto(own.ditto_lambda)


def _fedper(own: MethodOptions, _: Options, model: FirstModel) -> Any:
    from umbel.strategies.methods.personal_parts import PersonalParts, named_parts

    sizes = _sizes(model()[0])
    return PersonalParts(named_parts(sizes, own.personal_layers), sum(sizes.values()))


def _fedrep(own: MethodOptions, _: Options, model: FirstModel) -> Any:
    from umbel.strategies.methods.fedrep import FedRep
    from umbel.strategies.methods.personal_parts import named_parts

    sizes = _sizes(model()[0])
    parts = named_parts(sizes, own.personal_layers, "fedrep")
    return FedRep(parts, sum(sizes.values()), head_epochs=own.fedrep_head_epochs)


def _fedbn(_: MethodOptions, options: Options, model: FirstModel) -> Any:  # noqa: ARG001
    from umbel.strategies.methods.personal_parts import PersonalParts, normalisation_parts

    parameters, buffers = model()
    sizes = _sizes(parameters)
    parts = normalisation_parts(sizes, buffers)
    return PersonalParts(parts, sum(sizes.values()), name="fedbn")


def _sizes(parameters: Tree) -> dict[str, int]:
    from umbel.core.records import Manifest

    return {name: Manifest.of({name: value}).size for name, value in parameters.items()}


METHODS: Mapping[str, Make] = {
    "fedavg": lambda *_: None,
    "fedprox": _fedprox,
    "scaffold": _scaffold,
    "feddyn": _feddyn,
    "fednova": _fednova,
    "fedexp": _fedexp,
    "q-fedavg": _qfedavg,
    "afl": _afl,
    "ditto": _ditto,
    "fedper": _fedper,
    "fedbn": _fedbn,
    "fedrep": _fedrep,
    "per-fedavg": _perfedavg,
}


def _provided(make: Make) -> Callable[[Options, FirstModel], Transform[Any] | None]:
    """A method as a function of the options and of what gives the first model."""

    def of(options: Options, model: FirstModel) -> Transform[Any] | None:
        return make(MethodOptions.read(options), options, model)

    return of


for _name, _make in METHODS.items():
    provide(KIND, _name, _provided(_make))
