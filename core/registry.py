"""The parts of an algorithm by name: built in, registered by an app, or of an installed package.

    -c optimizer=fedadam         built in
    register("optimizer", "sign", SignSgd())                      in an app's task.py
    [project.entry-points."umbel.parts"]                          in a package's pyproject.toml
    "optimizer.sign" = "my_package:SignSgd"

A part is a value, or a function of the run's options that makes one. Whatever is registered is
kept as it was given; who asks for it knows what a part of that kind has to do.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from umbel.core.errors import ConfigError, described

KINDS: Mapping[str, str] = {
    "optimizer": "optimizer",
    "sampler": "cohort",
    "aggregator": "aggregator",
    "objective": "method",
    "pool": "pool",
}
"""Kinds of parts, and the option of a run that names one."""

OWN = "app"
"""The value of such an option that means the part which the app itself brings."""

GROUP = "umbel.parts"
"""Entry points of installed packages: their names are `KIND.NAME`, their values the parts."""

_built_in: dict[tuple[str, str], Any] = {}
_registered: dict[tuple[str, str], Any] = {}


def register(kind: str, name: str, part: Any) -> None:
    """Let an option of a run name a part.

    Args:
        kind: `optimizer`, `sampler`, `aggregator`, `objective` or `pool`.
        name: as in the option; a second part of one name takes the place of the first.
        part: the part, or a function of the run's options that makes it.

    Raises:
        ConfigError: no such kind, a name of Umbel's own or that no option can have, or a class.

    >>> register("sampler", "first-ten", lambda options: FirstNodes(10))  # doctest: +SKIP
    """
    _check_kind(kind)
    if not re.fullmatch(r"[\w.-]+", name):
        raise ConfigError(
            f"a part is registered as {name!r}; give it a name without spaces, such as 'my-{kind}'"
        )
    if name == OWN or (kind, name) in _built_in:
        raise ConfigError(f"the {kind} {name!r} is Umbel's own; register yours by another name")
    refuse_class(kind, part)
    _registered[kind, name] = part


def provide(kind: str, name: str, part: Any) -> None:
    """Register a part that Umbel itself brings."""
    _built_in[kind, name] = part


def is_built_in(kind: str, name: str) -> bool:
    """Whether Umbel itself brings a part of this name."""
    return (kind, name) in _built_in


def names(kind: str) -> tuple[str, ...]:
    """Every name of a kind: the built-in ones first, in their own order."""
    _check_kind(kind)
    known = [*_built_in, *_registered, *_installed()]
    return tuple(dict.fromkeys(name for k, name in known if k == kind))


def is_known(kind: str, name: str) -> bool:
    """Whether there is a part of this name; other packages are looked at last, it takes a while."""
    key = (kind, name)
    return key in _built_in or key in _registered or key in _installed()


def make(kind: str, name: str, options: Mapping[str, Any], *more: Any) -> Any:
    """The part of this name, made from a run's options where it is a function of them.

    Args:
        kind: of the part.
        name: of the part.
        options: complete ones.
        more: what such a function may take beside the options; see `made`.

    Raises:
        ConfigError: there is none, or a package's cannot be imported.
    """
    key = (kind, name)
    if key in _built_in:
        found = _built_in[key]
    elif key in _registered:
        found = _registered[key]
    elif key in _installed():
        found = _loaded(kind, name)
    else:
        option = KINDS.get(kind, kind)
        raise ConfigError(f"{option} is {name!r}; it can be {', '.join(names(kind))}")
    return made(found, options, *more)


def made(part: Any, options: Mapping[str, Any], *more: Any) -> Any:
    """The part itself, where what is given is a function of the options.

    A function with more parameters gets as many of `more`: a local objective may take, beside the
    options, a function that gives the first model, for methods that need its layout.
    """
    if not is_function(part):
        return part
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [one for one in inspect.signature(part).parameters.values() if one.kind in kinds]
    return part(options, *more[: len(taken) - 1])


def is_function(part: Any) -> bool:
    """Whether what is given is a function, and not a part that can also be called."""
    return inspect.isroutine(part) or isinstance(part, functools.partial)


def takes_one(function: Any) -> bool:
    """Whether a function can be called with one value; one that does not say so is taken at it."""
    try:
        inspect.signature(function).bind(None)
    except ValueError:  # of a built-in one
        return True
    except TypeError:
        return False
    return True


def refuse_class(kind: str, part: Any) -> None:
    """Raises:
    ConfigError: a class is given in place of one of its objects.
    """
    if inspect.isclass(part):
        name = part.__name__
        raise ConfigError(
            f"the {kind} is the class {name}; give an object, such as {name}(), or a function of "
            f"the options: lambda options: {name}()"
        )


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ConfigError(f"there is no kind of part {kind!r}; it can be {', '.join(KINDS)}")


@functools.cache
def _installed() -> dict[tuple[str, str], metadata.EntryPoint]:
    """The parts of installed packages, not imported yet."""
    found = {}
    for point in metadata.entry_points(group=GROUP):
        kind, _, name = point.name.partition(".")
        if kind in KINDS and name:
            found[kind, name] = point
    return found


def _loaded(kind: str, name: str) -> Any:
    point = _installed()[kind, name]
    try:
        part = point.load()
    except Exception as error:
        raise ConfigError(
            f"the {kind} {name!r} of an installed package ({point.value}) cannot be imported: "
            f"{described(error)}; repair the package, or choose another"
        ) from error
    return part() if inspect.isclass(part) else part
