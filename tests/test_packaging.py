"""The wheel: all code is in it, and it works where there is no checkout."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import umbel
from umbel.core.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LISTED = set(PROJECT["tool"]["setuptools"]["packages"])
TEMPLATES = {"umbel.template", "umbel.template.frameworks"}
"""Folders of data, which are named so that building the wheel has nothing to say of them."""
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
TOPS = sorted(set(FOLDERS.values()))


def folders_with_code() -> set[str]:
    """Package names of every folder under the rooms that holds Python files.

    Of the examples, those travel in the wheel that say so with an `__init__.py`.
    """
    names = {folder: name for name, folder in FOLDERS.items()}
    return {
        ".".join([names[top], *file.parent.relative_to(ROOT / top).parts])
        for top in TOPS
        for file in (ROOT / top).rglob("*.py")
        if "__pycache__" not in file.parts and travels(file)
    }


def travels(file: Path) -> bool:
    """Whether a file belongs to a package."""
    if ROOT / "examples" not in file.parents or file.parent == ROOT / "umbel" / "template":
        return True
    return (file.parent / "__init__.py").is_file()


def test_every_folder_with_code_is_listed() -> None:
    """One that is missing works in a checkout, and is silently absent from the wheel."""
    assert folders_with_code() == LISTED - TEMPLATES


def test_every_room_is_typed() -> None:
    for top in TOPS:
        if top != "examples":
            assert (ROOT / top / "py.typed").is_file(), top


def test_public_names_are_those_that_resolve() -> None:
    assert umbel.__all__ == sorted(umbel.__all__)
    for name in umbel.__all__:
        assert getattr(umbel, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = umbel.nonsense
    tree = ast.parse((ROOT / "umbel" / "__init__.pyi").read_text())
    checked = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked - {None} == set(umbel.__all__) - {"__version__"}, "what type checkers see"
    assert umbel.__version__ == PROJECT["project"]["version"]


def test_ruff_and_links_know_every_room() -> None:
    rooms = {top for top in TOPS if top not in ("umbel", "examples")}
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert rooms == set(banned)
    makefile = (ROOT / "Makefile").read_text()
    assert rooms == set(makefile.split("ROOMS  := ")[1].splitlines()[0].split())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the wheel is made of, so that the checkout stays as it is."""
    where = tmp_path_factory.mktemp("wheel")
    source = where / "source"
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "runs")
    for top in TOPS:
        shutil.copytree(ROOT / top, source / top, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    build = "import sys; from setuptools import build_meta as b; b.build_wheel(sys.argv[1])"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", build, str(where)],
        cwd=source,
        check=True,
        capture_output=True,
        timeout=120,
    )
    (found,) = where.glob("*.whl")
    return found


def test_the_wheel_holds_all_code_and_data_and_nothing_else(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    names = {folder: name.replace(".", "/") for name, folder in FOLDERS.items()}
    wanted = {
        f"{names[top]}/{file.relative_to(ROOT / top)}"
        for top in TOPS
        for file in (ROOT / top).rglob("*")
        if file.is_file()
        and travels(file)
        and "__pycache__" not in file.parts
        and "runs" not in file.relative_to(ROOT / top).parts
        and not file.name.startswith(".")
        and file.suffix in (".py", ".toml", ".tmpl", ".html", ".css", ".proto", ".pyi", ".typed")
    }
    assert wanted - held == set()
    assert {name.split("/")[0] for name in held} == {"umbel"}


def test_the_wheel_works_where_there_is_no_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment that has the dependencies and nothing of this checkout."""
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    probe = f"""
import importlib.util, sys
checkout = {str(ROOT)!r}
def in_checkout(place):  # the environment may lie in it, as .venv
    return place.startswith(checkout) and not place.startswith(sys.prefix)
sys.path[:] = [p for p in sys.path if not in_checkout(p)]
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in type(f).__module__ + str(f)]
sys.path.insert(0, {str(site)!r})
for room in {[top for top in TOPS if top != "umbel"]!r}:
    spec = importlib.util.find_spec(room)
    places = [spec.origin or "", *(spec.submodule_search_locations or [])] if spec else []
    if any(in_checkout(place) or place.startswith({str(site)!r}) for place in places):
        raise SystemExit(f"import {{room}} works: {{places}}")
import umbel
assert umbel.__file__.startswith({str(site)!r}), umbel.__file__
options = "rounds=1 cohort-size=2 local-epochs=1"
sys.argv = ["umbel", "run", "-c", options, "--workers", "0", "--json"]
from umbel.commands.cli import main
main()
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    ended = subprocess.run(
        [sys.executable, "-c", probe],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["rounds"] == 1 and result["metrics"]["accuracy"] > 0.1
    assert (tmp_path / result["run"] / "report.html").is_file()


def test_modules_import_one_by_one_without_warnings() -> None:
    """Also those that nothing else imports."""
    for package in sorted(LISTED - TEMPLATES):
        if package.startswith("umbel.examples"):
            continue
        home = package if package in FOLDERS else package.rpartition(".")[0]
        folder = ROOT / FOLDERS[home] / package.removeprefix(home).lstrip(".")
        for file in sorted(folder.glob("*.py")):
            if file.stem != "__init__":
                try:
                    importlib.import_module(f"{package}.{file.stem}")
                except ConfigError as missing:  # of an extra that is not installed
                    assert 'pip install "umbel[' in str(missing)
