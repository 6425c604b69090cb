"""The app folder: an ordinary Flower app, found, read and imported.

pyproject.toml   [tool.flwr.app.components], [tool.flwr.app.config], [tool.umbel]
server_app.py    app = ...
client_app.py    app = ...
task.py          what both import
"""

import hashlib
import importlib
import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from umbel.core.app_syntax import Sources, read_sources
from umbel.core.errors import ConfigError, described
from umbel.core.options import Value, flatten, read_toml

if TYPE_CHECKING:  # it takes a second, and a folder that is no app is refused before
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

T = TypeVar("T")

_OURS = ("umbel", "flwr")


@runtime_checkable
class Installed(Protocol):
    """An app that wants to know where it comes from."""

    def installed(self, digest: str, options: Mapping[str, Value]) -> None:
        """The SHA-256 of its files in hex, and the options in them."""
        ...


@dataclass(frozen=True)
class AppFolder:
    """A Flower app on disk.

    Attributes:
        path: the folder, absolute.
        name: of the project.
        server: reference to the `ServerApp`, as `module:attribute`.
        client: reference to the `ClientApp`.
        options: `[tool.flwr.app.config]`, flattened.
        nodes: how many virtual nodes the app asks for, or None.
        pool: where its virtual nodes run, or None.
    """

    path: Path
    name: str
    server: str
    client: str
    options: Mapping[str, Value]
    nodes: int | None
    pool: str | None = None

    def sources(self) -> Sources:
        """Read its files without importing any; ConfigError says which is no Python."""
        modules = [reference.partition(":")[0] for reference in (self.server, self.client)]
        return read_sources(self.path, modules)

    def server_app(self) -> "ServerApp":
        """Import the server's app; ConfigError says what went wrong."""
        from flwr.serverapp import ServerApp

        return self._installed(load(self.path, self.server, ServerApp))

    def client_app(self) -> "ClientApp":
        """Import the nodes' app; ConfigError says what went wrong."""
        from flwr.clientapp import ClientApp

        return self._installed(load(self.path, self.client, ClientApp))

    def _installed(self, app: T) -> T:
        """Tell a federation's app where it comes from; others have no use for it."""
        if isinstance(app, Installed):
            app.installed(self.digest(), self.options)
        return app

    def digest(self) -> str:
        """SHA-256 over the names and contents of the app's Python and TOML files."""
        total = hashlib.sha256()
        for file in sorted(self.path.rglob("*")):
            parts = file.relative_to(self.path).parts
            if file.suffix not in (".py", ".toml") or any(part.startswith(".") for part in parts):
                continue
            total.update("/".join(parts).encode() + b"\0" + file.read_bytes() + b"\0")
        return total.hexdigest()


def open_app(path: Path) -> AppFolder:
    """Read an app's `pyproject.toml`, and whether its files are Python.

    Raises:
        ConfigError: no folder, no pyproject, one that is not a Flower app's, or a file of the app
            that is no Python.
    """
    path = path.expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"there is no folder {path}; make an app with: umbel new {path.name}")
    file = path / "pyproject.toml"
    if not file.exists():
        raise ConfigError(f"{path} is no app: it has no pyproject.toml")
    project = read_toml(file)
    app = _table(file, project, "tool", "flwr", "app")
    components = _table(file, app, "components")
    references = [components.get(key) for key in ("serverapp", "clientapp")]
    if not all(isinstance(reference, str) and ":" in reference for reference in references):
        raise ConfigError(
            f"{file} must name its two apps under [tool.flwr.app.components], as "
            'serverapp = "server_app:app" and clientapp = "client_app:app"'
        )
    folder = AppFolder(
        path=path,
        name=str(project.get("project", {}).get("name", path.name)),
        server=str(references[0]),
        client=str(references[1]),
        options=flatten(_optional(file, app, "config")),
        nodes=_nodes(file, project),
        pool=_pool(file, project),
    )
    folder.sources()
    return folder


def _table(file: Path, table: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    for name in names:
        table = table.get(name, {})
        if not isinstance(table, Mapping) or not table:
            raise ConfigError(
                f"{file} is no Flower app's: it has no [tool.flwr.app.components]; "
                "see an app made by: umbel new NAME"
            )
    return table


def _optional(file: Path, table: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table `name` inside another; empty where there is none."""
    inner = table.get(name, {})
    if not isinstance(inner, Mapping):
        raise ConfigError(f"{file}: {name} is {inner!r}, but it must be a table, as in [{name}]")
    return inner


def _nodes(file: Path, project: Mapping[str, Any]) -> int | None:
    """`[tool.umbel] nodes`, or what Flower's own simulation settings of the app say."""
    tool = project["tool"]
    nodes = _optional(file, tool, "umbel").get("nodes")
    if nodes is None:
        federations = _optional(file, tool["flwr"], "federations")
        default = _optional(file, federations, str(federations.get("default", "")))
        nodes = _optional(file, default, "options").get("num-supernodes")
    if nodes is None:
        return None
    if not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1:
        raise ConfigError(f"{file} asks for {nodes!r} nodes; it must be a whole number above 0")
    return nodes


def _pool(file: Path, project: Mapping[str, Any]) -> str | None:
    """`[tool.umbel] pool`."""
    pool = _optional(file, project["tool"], "umbel").get("pool")
    if pool is not None and not (isinstance(pool, str) and pool):
        raise ConfigError(f"{file} asks for the pool {pool!r}; it must be a name in quotes")
    return pool


def load(path: Path, reference: str, kind: type[T]) -> T:
    """Import `module:attribute` from an app's folder.

    The folder goes to the front of `sys.path`, where Flower puts it too, in the place of other
    apps'. Modules of the same name that came from elsewhere (another app's `task`) are forgotten.

    Raises:
        ConfigError: the module does not import, or has no such attribute of that kind.
    """
    module_name, _, attribute = reference.partition(":")
    sys.path[:] = [str(path), *(entry for entry in sys.path if not _is_app(Path(entry), path))]
    _forget_other_apps(path, module_name.partition(".")[0])
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ConfigError(_import_failed(path, module_name, error)) from error
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if not isinstance(found, kind):
        raise ConfigError(
            f"{reference} in {path} is not a {kind.__name__}; write at the top level of "
            f"{module_name}.py: app = ..."
        )
    return found


def _is_app(folder: Path, path: Path) -> bool:
    """Whether an entry of `sys.path` is an app's folder, this one or another."""
    file = folder / "pyproject.toml"
    return folder == path or (file.is_file() and b"tool.flwr.app" in file.read_bytes())


def _forget_other_apps(path: Path, wanted: str) -> None:
    """Drop modules that another app's folder has loaded under the names of this one's files."""
    own = (
        {wanted}
        | {file.stem for file in path.glob("*.py")}
        | {folder.name for folder in path.iterdir() if folder.is_dir()}
    )
    own -= {*sys.stdlib_module_names, *_OURS}  # such names cannot be an app's, only a folder's
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in own and file and path not in Path(file).resolve().parents:
            library = "site-packages" in file or "dist-packages" in file
            if not library or name in ("task", "server_app", "client_app"):
                del sys.modules[name]


def _import_failed(path: Path, module: str, error: BaseException) -> str:
    """One sentence with the place in the app where the import failed."""
    if isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]:
        return f"{path} has no module {module!r}; create {module}.py or correct pyproject.toml"
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}, line {error.lineno}"
    else:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if str(path) in frame.filename] or frames
        where = f"{own[-1].filename}, line {own[-1].lineno}"
    return f"the app does not import: {described(error, where)}"
