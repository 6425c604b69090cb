"""What a worker does, wherever it is: load the app once, run groups of tasks.

The random generators of Python, NumPy and PyTorch belong to a process, and every task begins with
a seed of its own. So groups that meet in one process take turns; processes do not wait for each
other.
"""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol, runtime_checkable

from flwr.clientapp import ClientApp

from umbel.core import streams
from umbel.core.app_folder import open_app
from umbel.server.embedded.executor import Executor, output_to
from umbel.server.pools.base import Group, Results, Work

KEPT = 4
"""Runs whose apps a process keeps loaded."""


@runtime_checkable
class ChecksData(Protocol):
    """An app that can tell, where its nodes run, whether their data can be had."""

    def check_data(self, run_config: Mapping[str, Any], nodes: int) -> None:
        """Raises:
        ConfigError: they cannot, with the cure.
        """
        ...


class Loaded:
    """An app that is ready to run tasks in this process.

    Args:
        work: what is to be known of the run.

    Raises:
        ConfigError: the app does not import.
    """

    def __init__(self, work: Work) -> None:
        with streams.kept():  # an app may seed the generators where it is imported
            app = work.app if isinstance(work.app, ClientApp) else open_app(work.app).client_app()
        self.app = app
        self._executor = Executor(app, work.run_config, work.nodes, work.threads)
        self._log = _opened(work.log)

    def run(self, group: Group) -> Results:
        """Run a group as one; None if each of its tasks should be given by itself."""
        with output_to(self._log), streams.kept():
            if len(group) == 1:
                return self._executor.one_by_one(group)
            return self._executor.together(group)

    def run_here(self, group: Group) -> Results:
        """Run a group as one, or else task by task at once."""
        with output_to(self._log), streams.kept():
            return self._executor.run(group)

    def close(self) -> None:
        """Close the log."""
        if self._log is not None:
            self._log.close()


_turn = threading.Lock()
_loaded: "OrderedDict[str, Loaded]" = OrderedDict()


def run_group(work: Work, group: Group) -> Results:
    """Run a group of tasks in this process.

    Args:
        work: what a worker must know; the app is loaded with the first group of a run.
        group: the tasks.

    Raises:
        ConfigError: the app does not import here.
    """
    with _turn:
        return _ready(work).run(group)


def load(work: Work) -> None:
    """Load the app, so that what is wrong with it is said before the first group.

    Raises:
        ConfigError: the app does not import here, or its nodes' data cannot be had here.
    """
    with _turn:
        app = _ready(work).app
        if isinstance(app, ChecksData):
            app.check_data(work.run_config, work.nodes)


def unload(work: Work) -> None:
    """The run is over."""
    with _turn:
        found = _loaded.pop(work.token, None)
        if found is not None:
            found.close()


def _ready(work: Work) -> Loaded:
    if work.token not in _loaded:
        _loaded[work.token] = Loaded(work)
        while len(_loaded) > KEPT:
            _loaded.popitem(last=False)[1].close()
    _loaded.move_to_end(work.token)
    return _loaded[work.token]


def _opened(log: Path | None) -> "IO[str] | None":
    return None if log is None else log.open("a", encoding="utf-8", buffering=1)
