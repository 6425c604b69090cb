"""A client app that returns what it got: what is left of a message's time is the engine's."""

from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()

_PROJECT = """\
[project]
name = "echo"
version = "1"
[tool.flwr.app]
publisher = "umbel"
[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"
"""


@app.train()
def back(message: Message, context: Context) -> Message:  # noqa: ARG001 - Flower's signature
    """The content of the message, as the reply."""
    return Message(message.content, reply_to=message)


def folder(path: Path) -> Path:
    """Make an app folder in `path` that holds this app, for engines that want one."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "pyproject.toml").write_text(_PROJECT, encoding="utf-8")
    (path / "client_app.py").write_text(f"from {__name__} import app\n", encoding="utf-8")
    return path
