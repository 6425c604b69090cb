"""Errors that Umbel raises on purpose; every message is a sentence with the value and the cure.

UmbelError
├── ConfigError     an option, an app or a file is wrong          exit status 2
├── StackError      layers that do not fit together               exit status 2
├── RunError        a run that could not go on                    exit status 1
└── CheckError      a verification or a benchmark said no         exit status 3
"""

import sys
import sysconfig
import traceback
from pathlib import Path


class Interrupted(KeyboardInterrupt):
    """A run was stopped by a signal; it can go on from its directory `run`, where there is one."""

    def __init__(self, run: Path | None) -> None:
        super().__init__("" if run is None else str(run))
        self.run = run


def place(error: BaseException) -> str:
    """`file, line n` where an exception came from, in the user's code rather than a library's."""
    frames = traceback.extract_tb(error.__traceback__)
    libraries = tuple(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib"))
    own = [f for f in frames if not f.filename.startswith((*libraries, "<"))]
    return f"{(own or frames)[-1].filename}, line {(own or frames)[-1].lineno}" if frames else ""


def raised_where_no_data_are(error: BaseException) -> bool:
    """Whether an error was raised by a module of Umbel that declares `SAYS_NO_DATA = True`.

    A module or a package with this line at its top says: what its errors tell comes of options,
    layers, policies and messages, and never of a node's data. Only then do its sentences leave a
    node whose policy or run keeps texts back (`clients/gate.py`). A file that is divided takes the
    line along, or its sentences stay; in an app's own modules it counts for nothing.
    """
    step = error.__traceback__
    if step is None:
        return False
    while step.tb_next is not None:
        step = step.tb_next
    names = step.tb_frame.f_globals
    name = str(names.get("__name__", ""))
    module = sys.modules.get(name)
    if not name.startswith("umbel.") or module is None or vars(module) is not names:
        return False
    parts = name.split(".")
    around = [".".join(parts[:end]) for end in range(2, len(parts) + 1)]
    declared = [vars(sys.modules[each]) for each in around if each in sys.modules]
    return any(each.get("SAYS_NO_DATA") is True for each in declared)


LONGEST = 600
"""Characters of an exception's own text that a message repeats."""


def described(error: BaseException, where: str | None = None, longest: int = LONGEST) -> str:
    """`Kind: text (file, line n)` for an exception of any code, on one line.

    `where` is the place if the caller knows a better one than `place`. Umbel's own errors are
    sentences already and need none. A text that is longer than
    `longest` characters is cut; an exception without a text, or whose text cannot be made, is
    still told by its kind and its place.
    """
    kind = type(error).__name__
    try:
        text = " ".join(str(error).split())
    except Exception as broken:
        text = f"its text cannot be made, that raises {type(broken).__name__}"
    if len(text) > longest:
        text = f"{text[:longest]} ... ({len(text):,} characters)"
    said = f"{kind}: {text}" if text else kind
    if where is None:
        where = "" if isinstance(error, UmbelError) else place(error)
    return f"{said} ({where})" if where else said


class UmbelError(Exception):
    """Base of every error that a user should read as one sentence, without a traceback."""

    exit_status = 1


class ConfigError(UmbelError):
    """A value that the user gave cannot be used."""

    exit_status = 2


class StackError(ConfigError):
    """Layers that do not fit together; raised before any message is sent."""


class RunError(UmbelError):
    """A run that started could not go on."""


class CheckError(UmbelError):
    """A verification or a benchmark found what it must not find."""

    exit_status = 3
