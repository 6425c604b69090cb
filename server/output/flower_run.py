"""Where a run of `flwr run` is kept, and what it is called.

Flower's own process runs the server app. It knows neither the folder in which somebody typed
`flwr run` nor the app's folder there, only the copy that was sent to it. And a local SuperLink
lives on in the folder of the first `flwr run` ever typed. So the name is read from the copy; the
folder is that of the `flwr run` that still waits for this app (`--stream`), else the process's own.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from umbel.core.app_folder import open_app
from umbel.core.errors import UmbelError


def app_name() -> str | None:
    """The name of the app whose copy is imported, from its `pyproject.toml`; None if none is."""
    for entry in sys.path:
        name = _named(Path(entry))
        if name is not None:
            return name
    return None


def asked_from(name: str, processes: Path = Path("/proc")) -> Path | None:
    """The folder in which this user's newest `flwr run` of such an app was typed, if it runs still.

    Args:
        name: of the app.
        processes: where the kernel shows them; elsewhere than on Linux there are none.
    """
    found: list[tuple[float, Path]] = []
    for process in processes.glob("[0-9]*"):
        try:
            if process.stat().st_uid != os.getuid():
                continue
            words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
            folder = (process / "cwd").readlink()
            if any(_named(folder / app) == name for app in _apps(words)):
                found.append((process.stat().st_mtime, folder))
        except OSError:  # it has ended meanwhile, or is another user's
            continue
    return max(found)[1] if found else None


def _apps(words: list[str]) -> Iterator[str]:
    """What may be the APP of a `flwr run APP`; the current folder is meant where none is given."""
    for place, word in enumerate(words[:-1]):
        if Path(word).name == "flwr" and words[place + 1] == "run":
            yield from (each for each in words[place + 2 :] if each and not each.startswith("-"))
            yield "."


def _named(folder: Path) -> str | None:
    """The name of the Flower app in a folder; None where there is none."""
    try:
        file = folder / "pyproject.toml"
        if not file.is_file() or b"tool.flwr.app" not in file.read_bytes():
            return None
        return open_app(folder).name
    except (OSError, UmbelError):
        return None
