"""An app as a command opens it: what can be refused at once is, before torch is imported.

    pyproject.toml, the files' syntax --> options alone, names of parts --> the app's own import

Each step costs milliseconds but the last, which costs what the app itself imports. What options
are together, and whether the app knows them, only the app can say: `umbel.runner.prepare`.
"""

from pathlib import Path

from umbel.core.app_folder import AppFolder, open_app
from umbel.core.options import Options, renamed
from umbel.strategies.groups import check_alone
from umbel.strategies.private.options import PrivacyOptions

_EXAMPLES = Path(__file__).parent / "examples"


def opened(path: Path | str | None, changes: Options) -> AppFolder:
    """An app whose files are Python, and of whose options each alone could be used.

    Args:
        path: the app's folder; the bundled example if None.
        changes: to the app's options.

    Raises:
        ConfigError: with the cure.
    """
    folder = open_app(Path(path) if path is not None else example())
    check_changes(folder, changes)
    return folder


def check_changes(folder: AppFolder, changes: Options) -> None:
    """Refuse values that no run of this app can have, without importing it.

    An app that keeps its own rounds may mean by its options what it likes.

    Raises:
        ConfigError: the first of them.
    """
    PrivacyOptions.check_given(changes)
    sources = folder.sources()
    if not sources.federated:
        return
    # 0 in an app's own file may leave a value to `derived_options`
    own = {name: value for name, value in folder.options.items() if value != 0}
    check_alone({**renamed(own), **renamed(changes)}, registers=sources.registers)


def example(name: str = "fashion") -> Path:
    """A bundled example: beside this file in a wheel, in `examples/` in a checkout."""
    if (_EXAMPLES / name).is_dir():
        return _EXAMPLES / name
    return Path(__file__).resolve().parent.parent / "examples" / name
