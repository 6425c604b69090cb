"""Packages that only some commands need: imported when they are used, and named when missing."""

import importlib
from typing import Any

from umbel.core.errors import ConfigError


def needed(module: str, what: str, extra: str = "deliver") -> Any:
    """Import a module of an optional package.

    Args:
        module: its name.
        what: that needs it, as the subject of a sentence.
        extra: of Umbel, that has it.

    Raises:
        ConfigError: it is not installed; the sentence has the command.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = (error.name or module).partition(".")[0]
        raise ConfigError(
            f"{what} needs the package {missing}: pip install 'umbel[{extra}]'"
        ) from None
