"""Pools: the same bits wherever nodes run, refusals before the first message, chosen by name."""

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.fakes import APPS, SharedNursery, WarmCommand
from umbel.core.errors import ConfigError, RunError
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.pools.base import Group, Pool, Results, WorkerLostError
from umbel.server.pools.choose import make_pool
from umbel.server.pools.executors import ExecutorPool, Threads
from umbel.server.pools.here import Here
from umbel.server.pools.processes import Processes
from umbel.testing import check_pool

ROOT = Path(__file__).resolve().parents[2]


def test_processes_are_a_pool(nursery: SharedNursery) -> None:
    check_pool(lambda workers: Processes(workers, nursery))


def test_threads_are_a_pool() -> None:
    check_pool(Threads)


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessPoolExecutor]:
    with ProcessPoolExecutor(2, mp_context=get_context("forkserver")) as made:
        yield made


def test_any_executor_is_a_pool(executor: ProcessPoolExecutor) -> None:
    check_pool(lambda workers: ExecutorPool(executor, workers))


class Wrong(Threads):
    """Breaks a law: it forgets what nodes keep, or gives them seeds of its own."""

    def __init__(self, workers: int, fault: str) -> None:
        super().__init__(workers)
        self.fault = fault

    def submit(self, group: Group) -> Future[Results]:
        if self.fault == "seed":
            group = [replace(task, seed=task.seed + 1) for task in group]
        inner = super().submit(group)
        if self.fault != "states":
            return inner
        outer: Future[Results] = Future()

        def done(future: Future[Results]) -> None:
            outer.set_result([replace(each, state=None) for each in future.result() or ()])

        inner.add_done_callback(done)
        return outer


@pytest.mark.parametrize(
    ("fault", "law"), [("states", "what a node keeps comes back"), ("seed", "on every pool")]
)
def test_a_pool_that_breaks_a_law_is_found(fault: str, law: str) -> None:
    with pytest.raises(AssertionError, match=law):
        check_pool(lambda workers: Wrong(workers, fault))


class Losing(Threads):
    """A pool whose first worker is lost with what it does."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__(2)
        self.error = error

    def submit(self, group: Group) -> Future[Results]:
        if self.error is None:
            return super().submit(group)
        future: Future[Results] = Future()
        future.set_exception(self.error)
        self.error = None
        return future


def asked(grid: EmbeddedGrid, nodes: int = 3) -> list[Message]:
    content = RecordDict({"orders": ConfigRecord({})})
    ids = grid.get_node_ids()[:nodes]
    return list(grid.stream([Message(content, node, "train") for node in ids], 60.0))


def test_a_lost_worker_costs_its_nodes_their_replies() -> None:
    with EmbeddedGrid(APPS / "unruly", 3, pool=Losing(WorkerLostError("it was lost"))) as grid:
        failed = [reply.error.reason for reply in asked(grid) if reply.has_error()]
        assert failed == ["it was lost"]
        assert not any(reply.has_error() for reply in asked(grid))


def test_a_group_that_was_lost_is_tried_node_by_node() -> None:
    pool = Losing(WorkerLostError("it was lost"))
    with EmbeddedGrid(APPS / "unruly", 3, pool=pool, group_size=3) as grid:
        assert not any(reply.has_error() for reply in asked(grid))


def test_a_broken_pool_ends_the_run_with_a_sentence() -> None:
    with (
        EmbeddedGrid(APPS / "unruly", 3, pool=Losing(OSError("no route to it"))) as grid,
        pytest.raises(RunError, match=r"the pool Losing failed: .*no route to it.*--resume RUN"),
    ):
        asked(grid)


def test_an_object_of_this_process_needs_a_pool_in_it(nursery: SharedNursery) -> None:
    app = ClientApp()
    with pytest.raises(ConfigError, match="worker processes need an app's folder"):
        EmbeddedGrid(app, 2, pool=Processes(1, nursery))
    with EmbeddedGrid(app, 2, pool=Threads(2)) as grid:
        assert grid.sharing == 2


def chosen(asked: Any, workers: int | None = None, **more: Any) -> Pool:
    return make_pool(asked, {}, workers=workers, processors=3, **more)


def test_pools_have_names() -> None:
    with ThreadPoolExecutor(1) as threads:
        for asked_for, workers, kind, count in (
            ("processes", 0, Here, 1),
            ("processes", 2, Processes, 2),
            ("processes", None, Processes, 3),
            ("threads", None, Threads, 3),
            (threads, 2, ExecutorPool, 2),
        ):
            pool = chosen(asked_for, workers)
            assert isinstance(pool, kind) and pool.workers == count
            pool.close()


@pytest.mark.parametrize(
    ("asked_for", "workers", "said"),
    [
        ("cloud", None, r"pool is 'cloud'; it can be dask, ray, processes, threads"),
        ("threads", 0, "workers is 0, but threads need at least 1"),
        (Here(), 2, "workers is 2, but the pool has its own workers"),
        (7, None, "pool is a int; it must be a Pool"),
        ("far://host:1", 2, "workers is 2, but far://host:1 has the workers of its cluster"),
    ],
)
def test_what_is_no_pool_is_refused(asked_for: Any, workers: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        chosen(asked_for, workers)


def test_an_app_may_say_where_it_runs(tmp_path: Path) -> None:
    from umbel.core.app_folder import open_app

    text = (APPS / "unruly" / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text + '\n[tool.umbel]\npool = "threads"\n')
    assert open_app(tmp_path).pool == "threads"
    (tmp_path / "pyproject.toml").write_text(text + "\n[tool.umbel]\npool = 3\n")
    with pytest.raises(ConfigError, match="asks for the pool 3; it must be a name in quotes"):
        open_app(tmp_path)


def test_a_pool_of_the_apps_own_is_chosen_from_the_command_line(
    tmp_path: Path, umbel: WarmCommand
) -> None:
    """The pool of the page stands in an app's `task.py`; the model is the same, bit for bit."""
    page = (ROOT / "docs/how-to/pool.md").read_text(encoding="utf-8")
    program = page.partition("```python\n")[2].partition("```")[0]
    lines = [line for line in program.splitlines() if line.strip()]
    assert len(lines) <= 40
    app = tmp_path / "app"
    shutil.copytree(APPS / "digits", app)
    task = app / "task.py"
    task.write_text(program + task.read_text(encoding="utf-8"), encoding="utf-8")
    models = []
    for pool in ("fresh", "processes"):
        out = tmp_path / pool
        options = ("-c", "rounds=2", "--workers", "2", "--nodes", "4")
        done = umbel.command("run", app, "--pool", pool, "--out", out, *options, cwd=tmp_path)
        assert done.status == 0, done.err
        models.append((out / "model.safetensors").read_bytes())
    assert models[0] == models[1]
    config = json.loads((tmp_path / "fresh" / "config.json").read_text(encoding="utf-8"))
    assert config["pool"] == "fresh"
