"""Worker processes: killed, hung, replaced; and results that do not depend on their number."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from tests.fakes import APPS, SharedNursery
from umbel.core.errors import ConfigError, RunError
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.pools.processes import ForkServer


@pytest.fixture
def pool(nursery: SharedNursery, tmp_path: Path) -> Iterator[EmbeddedGrid]:
    with EmbeddedGrid(
        APPS / "unruly", 6, workers=2, nursery=nursery, log=tmp_path / "log.txt"
    ) as grid:
        yield grid


def train(
    grid: EmbeddedGrid, nodes: Any = None, timeout: float | None = None, **orders: Any
) -> dict[int, Any]:
    """Replies by partition: what a node said, or its error's reason."""
    content = RecordDict({"orders": ConfigRecord(orders)})
    ids = grid.get_node_ids() if nodes is None else [FIRST_NODE + n for n in nodes]
    messages = [Message(content, node, "train") for node in ids]
    return {
        reply.metadata.src_node_id - FIRST_NODE: reply.error.reason
        if reply.has_error()
        else dict(reply.content["said"])  # type: ignore[call-overload]
        for reply in grid.stream(messages, timeout)
    }


def test_a_killed_worker_is_replaced_and_its_message_reported(pool: EmbeddedGrid) -> None:
    train(pool)
    before = pool.worker_pids
    said = train(pool, die=[2])
    assert set(said) == set(range(6))
    assert "worker process" in said[2] and "died; another has taken its place" in said[2]
    assert all(isinstance(said[n], dict) for n in (0, 1, 3, 4, 5))
    assert len(set(pool.worker_pids)) == 2
    assert len(set(pool.worker_pids) & set(before)) == 1
    again = train(pool)
    assert [again[n]["visits"] for n in range(6)] == [3, 3, 2, 3, 3, 3], "states stay but one"


def test_workers_killed_from_outside_between_rounds(pool: EmbeddedGrid) -> None:
    train(pool)
    for pid in pool.worker_pids:
        os.kill(pid, signal.SIGKILL)
        psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    rounds = [train(pool) for _ in range(2)]
    died = [n for n, said in rounds[0].items() if isinstance(said, str)]
    assert len(died) <= 2, "at most one message for each worker is lost"
    assert all(isinstance(said, dict) for said in rounds[1].values())


def test_a_replaced_worker_draws_other_numbers_than_the_dead_one(
    nursery: SharedNursery, tmp_path: Path
) -> None:
    """Both are forked from one process, and so begin with equal generators."""
    node, drawn = FIRST_NODE + 1, []
    with EmbeddedGrid(
        APPS / "unruly", 6, workers=1, nursery=nursery, log=tmp_path / "log.txt"
    ) as grid:
        workers = []
        for _ in range(3):  # each of these workers does nothing before it draws
            [reply] = grid.send_and_receive([Message(RecordDict(), node, "query.draw")])
            drawn.append(tuple(reply.content["said"]["drawn"]))  # type: ignore[index, arg-type]
            workers += grid.worker_pids
            said = train(grid, nodes=[2], die=[2])[2]
            assert "died; another has taken its place" in said
        assert len(set(workers)) == 3
    for numbers in zip(*drawn, strict=True):  # of Python, NumPy and torch
        assert len(set(numbers)) == 3


def test_every_node_may_die(pool: EmbeddedGrid) -> None:
    said = train(pool, die=[0, 1, 2, 3, 4, 5])
    assert all("died" in reason for reason in said.values())
    assert all(isinstance(answer, dict) for answer in train(pool).values())


def test_a_hung_node_costs_its_own_reply(pool: EmbeddedGrid) -> None:
    train(pool)
    said = train(pool, timeout=3.0, hang=[3])
    assert set(said) == {0, 1, 2, 4, 5}
    hung = set(pool.worker_pids)
    again = train(pool)
    assert set(again) == set(range(6))
    assert again[3]["visits"] == 2, "what it did before it hung was never saved"
    assert {answer["pid"] for answer in again.values()} <= hung


def test_late_replies_do_not_come_to_another_round(pool: EmbeddedGrid) -> None:
    """All nodes hang, so most messages were still queued when time was up."""
    assert train(pool, timeout=0.5, hang=list(range(6))) == {}
    said = train(pool, nodes=[5, 4])
    assert sorted((n, answer["visits"]) for n, answer in said.items()) == [(4, 1), (5, 1)]


def test_a_model_of_many_blocks_comes_back_whole(pool: EmbeddedGrid) -> None:
    content = RecordDict({"orders": ConfigRecord({"size": 3_000_000})})
    messages = [Message(content, node, "train") for node in pool.get_node_ids()]
    for reply in pool.stream(messages):
        partition = reply.metadata.src_node_id - FIRST_NODE
        values = reply.content["big"]["a"].numpy()  # type: ignore[call-overload,index,union-attr]
        assert values.shape == (3_000_000,) and (values == partition).all()


def test_an_app_that_does_not_import_is_said_once(nursery: SharedNursery, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text((APPS / "unruly" / "pyproject.toml").read_text())
    (tmp_path / "client_app.py").write_text("import nowhere\n")
    with (
        pytest.raises(ConfigError, match=r"No module named 'nowhere' .*client_app\.py, line 1"),
        EmbeddedGrid(tmp_path, 2, workers=2, nursery=nursery) as grid,
    ):
        train(grid)


def test_an_app_that_kills_its_process_while_loading(
    nursery: SharedNursery, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text((APPS / "unruly" / "pyproject.toml").read_text())
    (tmp_path / "client_app.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    with (
        pytest.raises(RunError, match=r"died before it had loaded the app, .* --workers 0"),
        EmbeddedGrid(tmp_path, 2, workers=1, nursery=nursery) as grid,
    ):
        train(grid)


def test_no_process_is_left_behind() -> None:
    """Also not when the engine is the one that dies: its workers hang up with it."""
    own = ForkServer()
    with EmbeddedGrid(APPS / "unruly", 2, workers=2, nursery=own) as grid:
        train(grid)
        children = psutil.Process().children(recursive=True)
        family = [child for child in children if child.pid in grid.worker_pids]
        assert len(family) == 2
    assert psutil.wait_procs(family, timeout=20)[1] == []
    with pytest.raises(RunError, match="the process they come from died"):
        own.fork()


def test_numbers_do_not_depend_on_the_number_of_workers(nursery: SharedNursery) -> None:
    """Libraries split a sum over threads; where a node runs must not change how."""
    bits = set()
    for workers in (0, 1):
        with EmbeddedGrid(APPS / "unruly", 1, workers=workers, nursery=nursery) as grid:
            message = Message(RecordDict(), FIRST_NODE, "query.blas")
            (reply,) = grid.send_and_receive([message])
            bits.add(reply.content["said"]["bits"])  # type: ignore[call-overload,index]
    assert len(bits) == 1
