"""The rooms and the one direction of their imports, drawn from the source itself."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import umbel

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "core": set(),
    "privacy": set(),
    "transport": {"core"},
    "strategies": {"core", "privacy"},
    "clients": {"core", "strategies", "privacy", "transport"},
    "server": {"core", "strategies", "privacy", "transport"},
    "deliver": {"core", "server", "clients", "strategies", "privacy", "transport"},
    "benchmarks": {"core", "deliver", "server", "clients", "strategies", "privacy", "transport"},
}
"""The table of CONTRIBUTING.md; every room may import itself, `umbel` may import all."""
ROOMS = tuple(MAY_IMPORT)
FLOWERS_OWN = ("flwr.app", "flwr.clientapp", "flwr.serverapp")
"""What Flower exports; anything else is touched in `core/flower.py`, with a reason."""


def sources(room: str) -> list[Path]:
    return [file for file in sorted((ROOT / room).rglob("*.py")) if "__pycache__" not in file.parts]


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that a file names: at the top, in functions, and in texts that are imported.

    A text counts wherever it stands, because `importlib.import_module` may get it by any way.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield node.lineno, "." * node.level + (node.module or "")
            elif node.module:
                yield node.lineno, node.module
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if re.fullmatch(rf"umbel\.({'|'.join(ROOMS)})(\.\w+)*", node.value):
                yield node.lineno, node.value
        elif isinstance(node, ast.JoinedStr) and isinstance(node.values[0], ast.Constant):
            start = re.match(rf"umbel\.({'|'.join(ROOMS)})\b", str(node.values[0].value))
            if start:
                yield node.lineno, start.group()


def wrong_arrows(room: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    for line, name in imported(tree):
        parts = name.split(".")
        if parts[0] in ROOMS:
            yield line, f"{name}: a room under its bare name"
        elif name.startswith("."):
            yield line, f"{name}: relative"
        elif parts[0] == "umbel" and room != "umbel":
            target = parts[1] if len(parts) > 1 else ""
            if target not in ROOMS:
                if target:
                    yield line, f"{name}: the front door"
            elif target != room and target not in MAY_IMPORT[room]:
                yield line, f"{name}: {room} may not import {target}"


@pytest.mark.parametrize("room", [*ROOMS, "umbel"])
def test_arrows_go_one_way(room: str) -> None:
    files = sources(room)
    assert files
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {what}"
        for file in files
        for line, what in wrong_arrows(room, ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("room", "line"),
    [
        ("privacy", "from umbel.strategies import layer"),
        ("strategies", "import umbel.server.rounds"),
        ("transport", "from umbel.privacy.bounds.clipping import l2_norm"),
        ("server", "def f():\n    from umbel.clients.handler import ClientHandler"),
        ("clients", "importlib.import_module('umbel.server.rounds')"),
        ("clients", "importlib.import_module(f'umbel.server.{name}')"),
        ("server", "if TYPE_CHECKING:\n    from umbel.clients import data"),
        ("server", "from umbel import clients"),
        ("server", "from umbel.federation import Federation"),
        ("clients", "from .trainer import Job"),
        ("benchmarks", "import privacy"),
        ("umbel", "from server import rounds"),
    ],
)
def test_the_test_sees_a_wrong_arrow(room: str, line: str) -> None:
    assert list(wrong_arrows(room, ast.parse(line)))


def test_examples_know_the_front_door_only() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in sources("examples")
        for line, name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if name.split(".")[0] in ROOMS
        or (name.startswith("umbel.") and name.removeprefix("umbel.") not in umbel.__all__)
    ]
    assert wrong == []


def test_rooms_have_shelves_and_no_deeper() -> None:
    places = {file.parent.relative_to(ROOT) for room in ROOMS for file in sources(room)}
    assert all(len(place.parts) <= 2 for place in places)


def test_no_file_is_a_drawer_for_whatever_is_left() -> None:
    drawers = {"utils", "common", "helpers", "misc"}
    assert not [f for room in [*ROOMS, "umbel"] for f in sources(room) if f.stem in drawers]


def test_no_room_is_importable_under_its_bare_name() -> None:
    """A second copy of every class would be the price: equal names, unequal types."""
    for room in ROOMS:
        assert room not in sys.modules
        found = importlib.util.find_spec(room)
        assert found is None or ROOT not in Path(str(found.origin)).parents, found


def test_flowers_internals_are_touched_in_one_file() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for room in [*ROOMS, "umbel"]
        if room != "benchmarks"  # which measure Flower's own parts beside ours
        for file in sources(room)
        if file != ROOT / "core" / "flower.py"
        for line, name in imported(ast.parse(file.read_text(encoding="utf-8")))
        if name.startswith("flwr.") and not name.startswith(FLOWERS_OWN)
    ]
    assert wrong == []


def test_the_mathematics_knows_no_flower() -> None:
    for room in ("privacy", "transport"):
        names = {
            name.split(".")[0]
            for file in sources(room)
            for _, name in imported(ast.parse(file.read_text(encoding="utf-8")))
        }
        assert room == "transport" or "flwr" not in names
        assert "torch" not in names or room == "privacy"


FOREIGN = {
    ("clients/data/examples.py", "shape"),
    ("clients/data/fashion_mnist.py", "reason"),
    ("clients/data/partitioned.py", "split"),
    ("clients/given.py", "fit"),
    ("clients/ledger/charging.py", "noise_multiplier"),
    ("server/pools/dask.py", "address"),
}
"""Attributes of other libraries' objects that happen to be called like some of ours."""
ABOUT_OTHERS = (
    "clients/frameworks/",
    "clients/trainers/sklearn.py",
    "clients/trainers/sklearn_module.py",
    "clients/trainers/keras.py",
)
"""Files whose subject is the objects of another library, of whatever kind a user gives."""


def own_names() -> set[str]:
    """What classes of Umbel call their methods and fields."""
    names: set[str] = set()
    for room in [*ROOMS, "umbel"]:
        for file in sources(room):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                for part in node.body if isinstance(node, ast.ClassDef) else ():
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                        names.add(part.name)
                    elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                        names.add(part.target.id)
                    elif isinstance(part, ast.Assign):
                        names |= {t.id for t in part.targets if isinstance(t, ast.Name)}
    return names


def looked_up(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Attributes that are looked up by a text: `getattr(x, "name")`, `hasattr(x, "name")`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and len(node.args) > 1:
            name = node.args[1]
            if node.func.id in ("getattr", "hasattr") and isinstance(name, ast.Constant):
                yield node.lineno, str(name.value)


def test_no_decision_hangs_on_an_attribute_that_nobody_declares() -> None:
    """What one part of Umbel may have and another asks for is a protocol, not a text."""
    ours = own_names()
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for room in [*ROOMS, "umbel"]
        if room != "benchmarks"  # which play apps that nobody here wrote
        for file in sources(room)
        for line, name in looked_up(ast.parse(file.read_text(encoding="utf-8")))
        if name in ours and not name.startswith("__")
        if (str(file.relative_to(ROOT)), name) not in FOREIGN
        if not str(file.relative_to(ROOT)).startswith(ABOUT_OTHERS)
    ]
    assert wrong == []


WHAT_PARTS_DO = {
    "begin", "claim", "decode", "encode", "gather", "merge", "select", "split", "submit", "train",
}  # fmt: skip
"""A class with such a method is a part of an algorithm, which a user may bring as well."""
NO_PARTS = {"Stack"}
"""What parts stand in."""


def last_name(node: ast.expr) -> str:
    inner = node.value if isinstance(node, ast.Subscript) else node
    return inner.attr if isinstance(inner, ast.Attribute) else getattr(inner, "id", "")


def concrete_parts(files: dict[Path, ast.AST]) -> dict[str, Path]:
    """Classes that are layers, collects, trainers and the like, by name; no protocols."""
    bases: dict[str, set[str]] = {}
    methods: dict[str, set[str]] = {}
    homes: dict[str, Path] = {}
    for file, tree in files.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes[node.name] = file
                bases[node.name] = {last_name(base) for base in node.bases} - {node.name}
                methods[node.name] = {f.name for f in node.body if isinstance(f, ast.FunctionDef)}

    def does(name: str) -> set[str]:
        return set.union(methods[name], *(does(base) for base in bases[name] & methods.keys()))

    return {
        name: home
        for name, home in homes.items()
        if not bases[name] & {"Protocol", "ABC"} and name not in NO_PARTS
        if does(name) & WHAT_PARTS_DO
    }


def kinds_asked_for(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Classes that `isinstance` and `issubclass` are given."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and last_name(node.func) in ("isinstance", "issubclass"):
            for kind in ast.walk(node.args[1]):
                if isinstance(kind, ast.Name | ast.Attribute):
                    yield kind.lineno, last_name(kind)


def test_no_decision_hangs_on_the_class_of_a_part() -> None:
    """A part says what it is by a protocol; so a user's part is asked the same as Umbel's own."""
    files = {
        file: ast.parse(file.read_text(encoding="utf-8"))
        for room in [*ROOMS, "umbel"]
        if room != "benchmarks"  # which look into what they measure
        for file in sources(room)
    }
    parts = concrete_parts(files)
    assert {"Clip", "Median", "SecureSum", "TorchTrainer", "ByKey", "FixedSize"} <= parts.keys()
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file, tree in files.items()
        for line, name in kinds_asked_for(tree)
        if parts.get(name, file) != file
    ]
    assert wrong == []
    (found,) = kinds_asked_for(ast.parse("isinstance(layer, Clip)"))
    assert found == (1, "Clip")


def test_what_is_hidden_from_the_type_checker_has_its_reason() -> None:
    """`type: ignore` names the error, and a comment behind it says why it is none."""
    bare = re.compile(r"#\s*type:\s*ignore(?!\[[\w, -]+\]  # \S)")
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for room in [*ROOMS, "umbel"]
        for file in sources(room)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if bare.search(line)
    ]
    assert not found
