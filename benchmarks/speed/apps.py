"""Apps that benchmarks write; the smallest returns what it got, so all of its time is the engine's.

app                  the client app that returns its message
adding               a client app that returns other numbers, as Umbel's own nodes do
write_app            a folder with any app
write_echo           a folder with `app`, beside a server app if there is one
write_adding         a folder with `adding`
write_federation     a folder whose two halves are those of a `task.py`
"""

from collections.abc import Mapping
from pathlib import Path

from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from umbel.core.contents import take_record
from umbel.core.records import from_array, record_of, to_array

app = ClientApp()
adding = ClientApp()

_PROJECT = """\
[project]
name = "%s"
version = "1"
[tool.flwr.app]
publisher = "umbel"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
[tool.flwr.app.config]
%s
"""


@app.train()
def back(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
    """The content of the message, as the reply."""
    return Message(message.content, reply_to=message)


@adding.train()
def added(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
    """The array `x` of the record `model`, with one added."""
    x = from_array(take_record(message.content, "model", ArrayRecord)["x"])
    return Message(RecordDict({"model": record_of({"x": to_array(x + 1)})}), reply_to=message)


def write_app(path: Path, files: Mapping[str, str], *, name: str, config: str = "") -> Path:
    """Make an app folder in `path`; `config` is its options, as TOML."""
    path.mkdir(parents=True, exist_ok=True)
    for file, text in {"pyproject.toml": _PROJECT % (name, config), **files}.items():
        (path / file).write_text(text, encoding="utf-8")
    return path


def write_echo(path: Path, server: str = "", config: str = "") -> Path:
    """Make an app folder in `path` that holds this app, for engines that want one."""
    # Flower looks for an assignment: a name that is only imported it does not find.
    files = {"client_app.py": f"from {__name__} import app as echo\n\napp = echo\n"}
    if server:
        files["server_app.py"] = server
    return write_app(path, files, name="echo", config=config)


def write_adding(path: Path) -> Path:
    """Make an app folder in `path` that holds the app that adds."""
    files = {"client_app.py": f"from {__name__} import adding\n\napp = adding\n"}
    return write_app(path, files, name="adding")


def write_federation(path: Path, task: str, *, name: str, config: str) -> Path:
    """Make an app folder in `path` whose `task.py` defines `federation`."""
    files = {"task.py": task}
    for side in ("client", "server"):
        files[f"{side}_app.py"] = f"from task import federation\n\napp = federation.{side}_app()\n"
    return write_app(path, files, name=name, config=config)
