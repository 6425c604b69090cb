"""Federated learning on Flower: the public names.

Names are imported when they are first used, so that `import umbel` is quick. They are listed in
`__init__.pyi`, one import each; editors and type checkers read the same file.
"""

import importlib
import re
from pathlib import Path
from typing import Any

from umbel import former

__version__ = "0.1.0"

_LISTED = re.compile(r"^from ([\w.]+) import (\w+)", re.MULTILINE)
_LISTED_LONG = re.compile(r"^from ([\w.]+) import \(\s*(\w+)", re.MULTILINE)


def _homes() -> dict[str, str]:
    """The module of each public name."""
    text = Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    return {name: home for form in (_LISTED, _LISTED_LONG) for home, name in form.findall(text)}


_HOMES = _homes()
__all__ = sorted([*_HOMES, "__version__"])

former.install()


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    name = former.NAMES.get(name, name)
    if name not in _HOMES:
        raise AttributeError(f"module 'umbel' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
