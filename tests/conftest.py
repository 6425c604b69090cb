"""What every test of this project starts from."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from umbel.core import registry

if TYPE_CHECKING:
    from tests.fakes import SharedNursery, WarmCommand

# Flower asks for this when it is imported; no test makes a connection of its own accord.
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

# Keys and ledgers are these tests' own, never the user's.
os.environ["XDG_DATA_HOME"] = tempfile.mkdtemp(prefix="umbel-data-")
os.environ.setdefault("UMBEL_KEY", str(Path(tempfile.mkdtemp(prefix="umbel-key-")) / "key.pem"))

# A runner in the background may have been started with SIGINT ignored, and its children would
# inherit that; tests press Ctrl-C for real.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing on a busy machine.
settings.register_profile("umbel", deadline=None, derandomize=False)
settings.load_profile("umbel")


@pytest.fixture(autouse=True)
def own_data_folder(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test knows the populations of another."""
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("data")))


@pytest.fixture(autouse=True)
def own_registered_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers by name ends with it."""
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))


@pytest.fixture(scope="session")
def umbel() -> "Iterator[WarmCommand]":
    """The `umbel` command, in processes that have its imports already."""
    from tests.fakes import WarmCommand

    warm = WarmCommand()
    yield warm
    warm.close()


@pytest.fixture(scope="session")
def nursery() -> "Iterator[SharedNursery]":
    """Where worker processes come from; one for all tests."""
    from tests.fakes import SharedNursery

    shared = SharedNursery(preload=["umbel.federation"])
    yield shared
    shared.end()


@pytest.fixture
def fresh_processes(monkeypatch: pytest.MonkeyPatch) -> ForkServerContext:
    """Makes processes, for functions of tests, from one that has no threads.

    A fork of the tests' own process can wait forever for a lock that one of its threads (gRPC's,
    say) held at that instant.
    """
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "pytest", "umbel.server.private.run"])
    return context
