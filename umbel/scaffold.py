"""`umbel new`: an app that runs at once, made from the files in `template/`."""

import re
from pathlib import Path
from string import Template

from umbel.core.errors import ConfigError

TEMPLATE = Path(__file__).parent / "template"
FRAMEWORKS = TEMPLATE / "frameworks"
SUFFIX = ".tmpl"

_STEPS = "learning-rate = 0.1\nbatch-size = 16\nlocal-epochs = 2\nhidden = 64"
OPTIONS = {
    "torch": ("PyTorch", _STEPS),
    "keras": ("Keras", _STEPS),
    "jax": ("JAX and Flax", _STEPS),
    "transformers": ("Hugging Face Transformers", _STEPS.replace("0.1", "0.05")),
    "sklearn": ("scikit-learn", "learning-rate = 0.01\nlocal-epochs = 2"),
    "numpy": ("NumPy", "learning-rate = 1.0\nlocal-epochs = 5"),
}
"""What a framework is called, and the options of training with it."""


def new_app(folder: Path, framework: str = "torch") -> Path:
    """Make an app in a new folder; its name is the folder's.

    Args:
        folder: new, or empty.
        framework: that the model is made with, one of `OPTIONS`.

    Raises:
        ConfigError: the folder exists and is not empty, its name is no project name, or there is
            no template for the framework.
    """
    if framework not in OPTIONS:
        raise ConfigError(
            f"there is no template for the framework {framework!r}; choose one of "
            f"{', '.join(OPTIONS)}"
        )
    name = folder.expanduser().resolve().name
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", name):
        raise ConfigError(
            f"{name!r} is no name for an app; use letters, digits and dashes, such as my-app"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already; choose another name, or empty it first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        called, options = OPTIONS[framework]
        known = {"name": name, "framework": called, "training": options}
        for source in sorted(TEMPLATE.glob(f"*{SUFFIX}")):
            own = FRAMEWORKS / f"{framework}.py{SUFFIX}"
            found = own if source.name == f"task.py{SUFFIX}" and own.is_file() else source
            text = Template(found.read_text(encoding="utf-8")).substitute(known)
            (folder / source.name.removesuffix(SUFFIX)).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    return folder
