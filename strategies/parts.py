"""The parts of an algorithm that a federation takes as values, and that options name.

    Federation(optimizer=FedAvgM(momentum=0.95))          a value
    Federation(sampler=lambda options: FixedSize(10))     a function of the options
    Federation(aggregator="median")                       a name
    -c method=fedprox                                     a name, which goes before the app's own

Each kind of part has its protocol: a value is held against it when it is handed over, and what a
function makes when it is made. New kinds of parts need a line in `PROTOCOLS` and one in
`umbel.core.registry.KINDS`.
"""

from collections.abc import Mapping
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.registry import KINDS, OWN, is_function, made, make, names, refuse_class
from umbel.strategies import known_names as known_names
from umbel.strategies.aggregator import Aggregator
from umbel.strategies.exchange import Exchange
from umbel.strategies.optimizers import ServerOptimizer
from umbel.strategies.samplers import Sampler
from umbel.strategies.transform import Transform

PROTOCOLS: Mapping[str, tuple[type[Any], ...]] = {
    "optimizer": (ServerOptimizer,),
    "sampler": (Sampler,),
    "aggregator": (Aggregator, Exchange),
    "objective": (Transform,),
}
"""What a part of a kind has to be; the protocols are checked by the names of their methods."""


def check_given(kind: str, given: Any) -> None:
    """Refuse what cannot be a part of this kind, when an app hands it over.

    Raises:
        ConfigError: a class, or an object without the methods of its kind.
    """
    refuse_class(kind, given)
    if given is not None and not isinstance(given, str) and not is_function(given):
        _check(kind, given)


def default_names(given: Mapping[str, Any]) -> dict[str, str]:
    """What the options that name parts say where nobody says anything: by option.

    Args:
        given: the app's parts by kind; None where it brings none.
    """
    return {
        KINDS[kind]: part if isinstance(part, str) else OWN
        for kind, part in given.items()
        if part is not None
    }


def part_for(kind: str, given: Any, options: Mapping[str, Any], *more: Any) -> Any:
    """The part of a run: the one that its option names, or the app's own.

    Args:
        kind: of the part.
        given: what the app brings; None is nothing.
        options: complete ones.
        more: what a function that makes it may take beside them; see `umbel.core.registry.made`.

    Returns:
        None where the option leaves it to the app and that brings none.

    Raises:
        ConfigError: no part of that name, or a function that makes none of this kind.
    """
    name = str(options[KINDS[kind]])
    if name != OWN:
        found = make(kind, name, options, *more)
    elif isinstance(given, str):  # an app cannot name its own part so
        raise ConfigError(
            f"{KINDS[kind]}={OWN} is the part that the app brings, and this app names {given!r}; "
            f"leave {KINDS[kind]} out"
        )
    else:
        found = made(given, options, *more)
    if found is not None:
        _check(kind, found)
    return found


def required_part(kind: str, given: Any, options: Mapping[str, Any]) -> Any:
    """`part_for`, of a kind that every run needs.

    Raises:
        ConfigError: the option leaves it to the app, and that brings none.
    """
    found = part_for(kind, given, options)
    if found is None:
        raise ConfigError(
            f"{KINDS[kind]}={OWN} is the part that the app brings in Federation({kind}=...), and "
            f"this app brings none; it can be {', '.join(names(kind))}"
        )
    return found


def _check(kind: str, part: Any) -> None:
    refuse_class(kind, part)
    wanted = PROTOCOLS.get(kind, ())
    if not wanted or isinstance(part, wanted):
        return
    members = [m for m in dir(wanted[0]) if not m.startswith("_")]
    missing = [m for m in members if not hasattr(part, m)]
    raise ConfigError(
        f"the {kind} is a {type(part).__name__} without {' and '.join(missing)}; give an object "
        f"with {', '.join(members)} (see umbel.{wanted[0].__name__})"
    )
