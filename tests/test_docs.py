"""The documentation: its programs run, and what a script writes is what the script writes now."""

import ast
import importlib.util
import re
import runpy
from pathlib import Path
from types import ModuleType

import pytest

import umbel

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))


def script(name: str) -> ModuleType:
    """A script of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", HOW_TO, ids=lambda page: page.stem)
def test_the_program_of_a_page_does_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "\n".join(blocks(page, "python"))
    assert "\nassert " in program
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    runpy.run_path("program.py", run_name="program")


def test_the_picture_of_the_rooms_is_drawn_from_the_imports() -> None:
    drawn = script("draw_rooms").draw()
    assert (DOCS / "rooms.svg").read_text(encoding="utf-8") == drawn, "python docs/draw_rooms.py"


def test_the_picture_leaves_out_what_follows_and_refuses_a_circle() -> None:
    drawing = script("draw_rooms")
    graph = {"a": frozenset("bc"), "b": frozenset("c"), "c": frozenset[str]()}
    assert drawing.reduced(graph) == {**graph, "a": frozenset("b")}
    with pytest.raises(ValueError, match="a -> b -> a"):
        drawing.levels({"a": frozenset("b"), "b": frozenset("a")})


def test_the_page_of_the_command_line_is_what_the_commands_say() -> None:
    page = script("write_command_line").page()
    assert "\\" not in page
    found = (DOCS / "command-line.md").read_text(encoding="utf-8")
    assert found == page, "python docs/write_command_line.py"


def test_the_round_names_the_methods_of_a_layer() -> None:
    from umbel.strategies.transform import Transform

    picture = (DOCS / "round.svg").read_text(encoding="utf-8")
    for method in ("check", "broadcast", "encode", "decode", "claim"):
        assert hasattr(Transform, method) and f">{method}: " in picture


def test_the_reference_has_every_public_name_once() -> None:
    named = re.findall(r"^::: ([\w.]+)$", (DOCS / "reference.md").read_text(), re.MULTILINE)
    homes = {f"{home}.{name}" for name, home in umbel._HOMES.items() if "former" not in home}
    assert homes <= set(named)
    assert len(named) == len(set(named))


def test_the_quick_start_is_the_readmes() -> None:
    readme = blocks(ROOT / "README.md", "sh")
    assert blocks(DOCS / "index.md", "sh") == readme[:2]


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    assert set(re.findall(r": (\S+\.md)$", navigation, re.MULTILINE)) == pages


NAMED = re.compile(r"`((?:[\w-]+/)*[\w-]+\.py)?(?:::(test_\w+)(…?))?`")
PAGES = sorted([*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
ROOMS = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_file_and_test_that_a_page_names_is_there(page: Path) -> None:
    """A page that says which test holds a sentence says nothing once that test was renamed."""
    home: Path | None = None
    for name, test, cut in NAMED.findall(page.read_text(encoding="utf-8")):
        if name.partition("/")[0] in ROOMS - {"docs"} and "/my_" not in name:
            assert (ROOT / name).is_file(), f"{page.name} names {name}"
        if name and (name.startswith("tests/") or test):
            (home,) = [ROOT / name] if "/" in name else (ROOT / "tests").rglob(name)
        if test:
            assert home is not None
            text = home.read_text(encoding="utf-8")
            assert re.search(rf"def {test}{'' if cut else '[(]'}", text), f"{home}::{test}"


# A page's title and what it is written after promise nothing.
PROMISES = {"privacy.md": set(), "security.md": {"References"}}


@pytest.mark.parametrize("page", PROMISES)
def test_every_section_about_safety_names_the_tests_that_hold_it(page: str) -> None:
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text("utf-8"), flags=re.M | re.S)
    _, *sections = re.split(r"^##+ ", text, flags=re.MULTILINE)
    for section in sections:
        title = section.partition("\n")[0]
        named = [name for name, _, _ in NAMED.findall(section) if name.startswith("tests/")]
        assert named or title in PROMISES[page], f"{page}: nothing holds {title!r}"


# What a user writes to bring a part: its page, its class or function, and the most lines it takes.
FROM_OUTSIDE = {
    "objective-prox": ("objective", "Prox", 25),
    "objective-drift": ("objective", "Drift", 70),
    "aggregator": ("aggregator", "Median", 30),
    "sampler": ("sampler", "Longest", 20),
    "optimizer": ("optimizer", "Sign", 15),
    "pool": ("pool", "Fresh", 40),
    "asynchronous": ("asynchronous", "fedbuff", 60),
}


@pytest.mark.parametrize(("page", "name", "most"), FROM_OUTSIDE.values(), ids=FROM_OUTSIDE)
def test_a_part_from_outside_is_short(page: str, name: str, most: int) -> None:
    found = [
        node
        for block in blocks(DOCS / "how-to" / f"{page}.md", "python")
        for node in ast.parse(block).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name
    ]
    (part,) = found
    assert part.end_lineno is not None
    first = min([part.lineno, *(line.lineno for line in part.decorator_list)])
    assert part.end_lineno - first + 1 <= most


def test_objectives_are_written_from_outside() -> None:
    """FedProx and SCAFFOLD, with what `umbel` exports."""
    code = blocks(DOCS / "how-to" / "objective.md", "python")
    modules = re.findall(r"^from (umbel[\w.]*) import", "\n".join(code), re.MULTILINE)
    assert set(modules) <= {"umbel", "umbel.testing"}
