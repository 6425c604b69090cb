"""How a trainer's settings are read from a run's options.

A trainer's settings are the fields of a frozen dataclass; an option has the same name in
kebab-case. The field's value is the default, and its type is the option's type.
"""

from dataclasses import fields, replace
from typing import Any, TypeVar

from umbel.clients.trainers.base import Options
from umbel.core.options import checked, dashed

D = TypeVar("D")


def options_of(settings: Any, kind: type[Any]) -> dict[str, bool | int | float | str]:
    """The options that `read` understands, with their defaults.

    Args:
        settings: an instance of `kind`, or of a dataclass that extends it.
        kind: the dataclass whose fields are options.
    """
    return {dashed(f.name): getattr(settings, f.name) for f in fields(kind)}


def settings_of(trainer: Any, kind: type[D]) -> D:
    """The settings that a trainer's own attributes of their names make.

    Args:
        trainer: has an attribute for each field of `kind`.
        kind: the dataclass whose fields are options.
    """
    names = (field.name for field in fields(kind))  # type: ignore[arg-type]  # D is a dataclass by contract
    return kind(**{name: getattr(trainer, name) for name in names})


def read(settings: D, options: Options) -> D:
    """The settings with those replaced that the options name; other options are not looked at.

    Raises:
        ConfigError: an option has another type than its default.
    """
    changes: dict[str, Any] = {}
    for field in fields(settings):  # type: ignore[arg-type]  # likewise
        name = dashed(field.name)
        if name in options:
            changes[field.name] = checked(name, options[name], getattr(settings, field.name))
    return replace(settings, **changes) if changes else settings  # type: ignore[type-var]  # likewise
