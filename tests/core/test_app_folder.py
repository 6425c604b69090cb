"""An app's folder: found, read and imported; what is wrong is said with file and line."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from tests.fakes import APPS
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError

PROJECT = """
[project]
name = "{name}"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
rounds = 3
model.hidden = 8
"""
CLIENT = "from flwr.clientapp import ClientApp\napp = ClientApp()\n"
SERVER = "from flwr.serverapp import ServerApp\napp = ServerApp()\n"


@pytest.fixture(autouse=True)
def _same_imports_afterwards() -> Iterator[None]:
    path, modules = sys.path[:], dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        del sys.modules[name]
    sys.modules.update(modules)


def folder(where: Path, name: str = "app", **files: str) -> Path:
    path = where / name
    path.mkdir()
    texts = {"client_app": CLIENT, "server_app": SERVER, **files}
    for file, text in texts.items():
        (path / f"{file}.py").write_text(text)
    (path / "pyproject.toml").write_text(PROJECT.format(name=name))
    return path


def test_an_app_of_flowers_is_read() -> None:
    app = open_app(APPS / "plain")
    assert (app.name, app.nodes, app.server) == ("plain", 4, "server_app:app")
    assert app.options == {"num-server-rounds": 2, "learning-rate": 0.1, "out": ""}
    assert isinstance(app.server_app(), ServerApp)
    assert isinstance(app.client_app(), ClientApp)


def test_nodes_of_flowers_own_simulation_settings(tmp_path: Path) -> None:
    path = folder(tmp_path)
    assert open_app(path).nodes is None
    assert open_app(path).options == {"rounds": 3, "model.hidden": 8}
    with (path / "pyproject.toml").open("a") as file:
        file.write('[tool.flwr.federations]\ndefault = "local"\n')
        file.write("[tool.flwr.federations.local]\noptions.num-supernodes = 7\n")
    assert open_app(path).nodes == 7
    with (path / "pyproject.toml").open("a") as file:
        file.write("[tool.umbel]\nnodes = 0\n")
    with pytest.raises(ConfigError, match="asks for 0 nodes; it must be a whole number above 0"):
        open_app(path)


def test_two_apps_with_modules_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for name in ("one", "two"):
        client = f"from task import NAME\n{CLIENT}app.name = NAME\n"
        folder(tmp_path, name, client_app=client, task=f"NAME = {name!r}\n")
    for name in ("one", "two", "one"):
        assert open_app(tmp_path / name).client_app().name == name  # type: ignore[attr-defined]


def test_loading_leaves_other_modules_alone(tmp_path: Path) -> None:
    """An app may have folders called like modules of the library that are loaded already."""
    path = folder(tmp_path, server_app=f"import json, logging\n{SERVER}app.json = json\n")
    for name in ("json", "logging", "umbel", "flwr"):
        (path / name).mkdir()
    assert open_app(path).server_app().json is json  # type: ignore[attr-defined]
    for name in ("logging", "umbel.core.app_folder", "flwr.serverapp"):
        assert name in sys.modules


def test_the_digest_is_of_the_code_and_not_of_what_it_leaves_behind(tmp_path: Path) -> None:
    path = folder(tmp_path)
    before = open_app(path).digest()
    (path / "notes.txt").write_text("hello")
    (path / ".cache").mkdir()
    (path / ".cache" / "x.py").write_text("x")
    open_app(path).client_app()
    assert open_app(path).digest() == before
    (path / "client_app.py").write_text(CLIENT + "\n")
    assert open_app(path).digest() != before


MISTAKES = {
    "a name": ("x = 1\ny = undefined\n", r"NameError: .*undefined.*client_app\.py, line 2"),
    "syntax": ("x = 1\n\nif x\n", r"SyntaxError: .*client_app\.py, line 3"),
    "in a function": (
        "def f():\n    return 1 / 0\n\nf()\n",
        r"ZeroDivisionError: .*client_app\.py, line 2",
    ),
    "in a library": (
        "import json\n\njson.loads('{')\n",
        r"JSONDecodeError: .*client_app\.py, line 3",
    ),
    "no such module": ("import nowhere\n", r"No module named 'nowhere'.*client_app\.py, line 1"),
    "no app": ("x = 1\n", "client_app:app in .* is not a ClientApp; write at the top level of"),
    "another app": (SERVER, "client_app:app in .* is not a ClientApp"),
    "leaves": ("import sys\nsys.exit('bye')\n", r"SystemExit: bye .*client_app\.py, line 2"),
    "leaves in silence": ("raise SystemExit\n", r"SystemExit.*client_app\.py, line 1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_app_that_does_not_import_names_file_and_line(name: str, tmp_path: Path) -> None:
    text, said = MISTAKES[name]
    path = folder(tmp_path, client_app=text)
    with pytest.raises(ConfigError, match=said):
        open_app(path).client_app()


def test_a_mistake_in_a_module_below_names_that_file(tmp_path: Path) -> None:
    path = folder(tmp_path, client_app="import task\n", task="\n\nraise ValueError('no model')\n")
    with pytest.raises(ConfigError, match=r"ValueError: no model \(.*task\.py, line 3\)"):
        open_app(path).client_app()


def test_a_missing_module_says_what_to_create(tmp_path: Path) -> None:
    path = folder(tmp_path)
    (path / "client_app.py").unlink()
    with pytest.raises(ConfigError, match=r"no module 'client_app'; create client_app\.py"):
        open_app(path).client_app()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is no app: it has no pyproject.toml"),
        ("[project\n", r"pyproject\.toml cannot be read"),
        ('[project]\nname = "x"\n', r"no \[tool\.flwr\.app\.components\]; see an app made by"),
        ("tool = 3\n", "is no Flower app's"),
        (PROJECT.replace("clientapp = ", "nodeapp = "), "must name its two apps"),
        (PROJECT.replace("client_app:app", "client_app"), "must name its two apps"),
        (PROJECT + "list = [1]\n", r"the option list is \[1\]; options are true or false"),
        (PROJECT + '[tool.umbel]\nnodes = "5"\n', "asks for '5' nodes"),
        (PROJECT.replace("[tool.flwr.app.config]", "[tool.umbel]\nnodes = true\n[x]"), "for True"),
        ("[tool.flwr]\nfederations = 3\n", "is no Flower app's"),
    ],
)
def test_a_pyproject_that_is_no_apps_says_so(text: str | None, said: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        open_app(tmp_path)


@pytest.mark.parametrize("line", ["umbel = 3", "flwr.federations = 3", "flwr.app.config = 3"])
def test_a_table_that_is_none_is_a_config_error(line: str, tmp_path: Path) -> None:
    head = PROJECT.partition("[tool.flwr.app.config]")[0]
    text = head.replace("[tool.flwr.app.components]", f"[tool]\n{line}\n[tool.flwr.app.components]")
    (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError):
        open_app(tmp_path)


def test_a_folder_that_is_not_there_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"there is no folder .*; make an app with: umbel new nada"
    ):
        open_app(tmp_path / "nada")


def test_what_is_no_python_is_seen_without_importing_anything(tmp_path: Path) -> None:
    """Also in files that these import at their top; a file that nobody imports may wait."""
    server = "import json\nfrom helpers.more import x\nraise SystemExit('imported')\n"
    path = folder(tmp_path, server_app=server, unused="def broken(:\n")
    (path / "helpers").mkdir()
    (path / "helpers" / "__init__.py").write_text("")
    (path / "helpers" / "more.py").write_text("import server_app\nx = 1\n")
    open_app(path)
    (path / "helpers" / "more.py").write_text("x = 1\n\ndef broken(:\n")
    with pytest.raises(ConfigError, match=r"does not import: SyntaxError.*more\.py, line 3"):
        open_app(path)
    (path / "helpers" / "more.py").write_bytes(b"x = 1\0\n")
    with pytest.raises(ConfigError, match=r"does not import: .*more\.py"):
        open_app(path)
