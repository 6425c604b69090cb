"""An app's files read as Python before anything heavy is imported: a slip costs no seconds."""

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

from umbel.core.errors import ConfigError


def check_syntax(folder: Path, modules: Sequence[str]) -> frozenset[str]:
    """Read what importing these modules of an app would read of its folder, and import nothing.

    Args:
        folder: of the app.
        modules: dotted names; with them go the files that they import at their top level.

    Returns:
        The names of what is called in these files: `Federation` in an app that makes one.

    Raises:
        ConfigError: a file is no Python; with its place.
    """
    called: set[str] = set()
    seen: set[Path] = set()
    waiting = [file for module in modules for file in _files(folder, module)]
    while waiting:
        file = waiting.pop()
        if file in seen:
            continue
        seen.add(file)
        try:
            tree = ast.parse(file.read_bytes(), str(file))
        except (SyntaxError, ValueError) as error:  # a null byte is a ValueError in older Pythons
            line = error.lineno if isinstance(error, SyntaxError) else 1
            raise ConfigError(
                f"the app does not import: {type(error).__name__}: {error} ({file}, line {line})"
            ) from error
        called |= set(_called(tree))
        waiting += [other for module in _imported(tree) for other in _files(folder, module)]
    return frozenset(called)


def _files(folder: Path, module: str) -> list[Path]:
    """The file of a module, and those of the packages around it, where the folder has them."""
    parts = module.split(".")
    places = [folder.joinpath(*parts[: i + 1]) for i in range(len(parts))]
    found = [file for place in places for file in (place / "__init__.py", place.with_suffix(".py"))]
    return [file for file in found if file.is_file()]


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _called(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                yield node.func.id
            elif isinstance(node.func, ast.Attribute):
                yield node.func.attr
