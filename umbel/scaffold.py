"""`umbel new`: an app that runs at once, made from the files in `template/`."""

import re
from pathlib import Path
from string import Template

from umbel.core.errors import ConfigError

TEMPLATE = Path(__file__).parent / "template"
SUFFIX = ".tmpl"


def new_app(folder: Path) -> Path:
    """Make an app in a new folder; its name is the folder's.

    Raises:
        ConfigError: the folder exists and is not empty, or its name is no project name.
    """
    name = folder.expanduser().resolve().name
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ConfigError(
            f"{name!r} is no name for an app; use letters, digits and dashes, such as my-app"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; choose another name, or empty it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in sorted(TEMPLATE.glob(f"*{SUFFIX}")):
            text = Template(source.read_text(encoding="utf-8")).substitute(name=name)
            (folder / source.name.removesuffix(SUFFIX)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    return folder
