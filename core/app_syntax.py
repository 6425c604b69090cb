"""An app's files read as Python before anything heavy is imported: a slip costs no seconds."""

import ast
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from umbel.core.errors import ConfigError

_KNOWN = frozenset({"umbel", "flwr", "torch", "torchvision", "numpy", "scipy", "pandas", "sklearn"})
"""Packages of which it is known that they bring neither a federation nor parts of one."""


@dataclass(frozen=True)
class Sources:
    """What importing an app would read of its folder.

    Attributes:
        words: every name in the files.
        imported: modules from elsewhere, without those of the standard library.
    """

    words: frozenset[str]
    imported: frozenset[str]

    @property
    def federated(self) -> bool:
        """Whether the app makes a `Federation` itself."""
        return "Federation" in self.words

    @property
    def registers(self) -> bool:
        """Whether importing the app may register parts: it says so, or another package may."""
        return "register" in self.words or not self.imported <= _KNOWN


def read_sources(folder: Path, modules: Sequence[str]) -> Sources:
    """Read what importing these modules of an app would read of its folder, and import nothing.

    Args:
        folder: of the app.
        modules: dotted names; with them go the files that they import at their top level.

    Raises:
        ConfigError: a file is no Python; with its place.
    """
    seen: set[Path] = set()
    words: set[str] = set()
    elsewhere: set[str] = set()
    waiting = [file for module in modules for file in _files(folder, module)]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        tree = _parsed(file)
        words.update(_words(tree))
        own = {module: _files(folder, module) for module in _imported(tree.body)}
        waiting += [other for files in own.values() for other in files]
        elsewhere.update(
            module.partition(".")[0]
            for module in _imported(ast.walk(tree))
            if not _files(folder, module)
        )
    return Sources(frozenset(words), frozenset(elsewhere - sys.stdlib_module_names))


def _parsed(file: Path) -> ast.Module:
    try:
        return ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:  # a null byte is a ValueError in older Pythons
        line = error.lineno if isinstance(error, SyntaxError) else 1
        raise ConfigError(
            f"the app does not import: {type(error).__name__}: {error} ({file}, line {line})"
        ) from error


def _words(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name


def _files(folder: Path, module: str) -> list[Path]:
    """The file of a module, and those of the packages around it, where the folder has them."""
    parts = module.split(".")
    places = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    found = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return [file for file in found if file.is_file()]


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
