"""Draws `rooms.svg` from the imports in the source: python docs/draw_rooms.py

The rooms are the folders that pyproject.toml makes packages of. An arrow goes from a room to one
that its files import; an arrow that follows from two others is left out.
"""

import ast
import re
import tomllib
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "rooms.svg"
WIDTH, HEIGHT, ACROSS, DOWN, EDGE = 150, 40, 220, 90, 20

Graph = Mapping[str, frozenset[str]]


def rooms() -> dict[str, str]:
    """Folders by the name of their package."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, str] = project["tool"]["setuptools"]["package-dir"]
    return found


def names(tree: ast.AST, folders: Mapping[str, str]) -> Iterator[str]:
    """Every module that a file imports, and every one of a room that it names in a text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            word = re.match(r"(umbel\.\w+)(\.\w+)*$", node.value)  # importlib may get it
            if word and word.group(1) in folders:
                yield node.value


def imports(folders: Mapping[str, str]) -> Graph:
    """What each room imports of the others."""

    def room(module: str) -> str | None:
        parts = module.split(".")
        return next((p for p in (".".join(parts[:2]), parts[0]) if p in folders), None)

    found: dict[str, frozenset[str]] = {}
    for package, folder in folders.items():
        modules = {
            name
            for file in (ROOT / folder).rglob("*.py")
            for name in names(ast.parse(file.read_text(encoding="utf-8")), folders)
        }
        found[package] = frozenset({r for m in modules if (r := room(m))} - {package})
    return found


def levels(graph: Graph) -> dict[str, int]:
    """How far each room stands above the ground.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    found: dict[str, int] = {}

    def level(room: str, path: tuple[str, ...]) -> int:
        if room in path:
            raise ValueError(f"rooms import each other: {' -> '.join((*path, room))}")
        if room not in found:
            below = [level(other, (*path, room)) for other in sorted(graph[room])]
            found[room] = 1 + max(below, default=-1)
        return found[room]

    for each in sorted(graph):
        level(each, ())
    return found


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that follow from others."""

    def reach(room: str) -> frozenset[str]:
        return graph[room].union(*(reach(other) for other in graph[room]))

    return {
        room: frozenset(t for t in targets if not any(t in reach(o) for o in targets - {t}))
        for room, targets in graph.items()
    }


def places(graph: Graph) -> dict[str, tuple[float, int]]:
    """The column and the level of each room; one that is alone stands over what it imports."""
    height = levels(graph)
    found: dict[str, tuple[float, int]] = {}
    for level, group in groupby(
        sorted(graph, key=lambda r: (height[r], r)), key=height.__getitem__
    ):
        row = list(group)
        for column, room in enumerate(row):
            below = [found[other][0] for other in graph[room]]
            alone = sum(below) / len(below) if len(row) == 1 and below else float(column)
            found[room] = (alone, level)
    return found


def draw() -> str:
    """The picture, as SVG."""
    folders = rooms()
    whole = imports(folders)
    levels(whole)  # refuses a circle
    graph = reduced(whole)
    where = places(graph)
    top = max(level for _, level in where.values())
    wide = max(column for column, _ in where.values())

    def corner(room: str) -> tuple[float, float]:
        column, level = where[room]
        return EDGE + column * ACROSS, EDGE + (top - level) * DOWN

    lines = []
    for room in sorted(graph):
        for other in sorted(graph[room]):
            (x1, y1), (x2, y2) = corner(room), corner(other)
            x1, y1, x2 = x1 + WIDTH / 2, y1 + HEIGHT, x2 + WIDTH / 2
            lines.append(
                f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2 - 4:g}" '
                'stroke="#5c6bc0" stroke-width="1.5" marker-end="url(#tip)"/>'
            )
    boxes = []
    for room in sorted(graph):
        x, y = corner(room)
        boxes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
            'fill="#e8eaf6" stroke="#3949ab"/>'
            f'<text x="{x + WIDTH / 2:g}" y="{y + HEIGHT / 2 + 5:g}">{folders[room]}/</text>'
        )
    size = f"{2 * EDGE + wide * ACROSS + WIDTH:g} {2 * EDGE + top * DOWN + HEIGHT:g}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
            f'width="{size.split()[0]}" '
            'font-family="sans-serif" font-size="15" text-anchor="middle" fill="#1a237e">',
            "<title>The rooms of Umbel: an arrow goes to what a room imports</title>",
            '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" '
            'markerHeight="7" orient="auto"><path d="M0 0 L10 5 L0 10 z" fill="#5c6bc0"/>'
            "</marker></defs>",
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            *lines,
            *boxes,
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
