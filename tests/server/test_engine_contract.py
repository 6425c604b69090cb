"""What Flower promises of a grid, kept by the embedded engine with and without worker processes."""

import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict

from tests.fakes import APPS, SharedNursery, WarmCommand
from umbel.core import streams
from umbel.core.flower import UNKNOWN
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid

SLOW = FIRST_NODE + 3
"""The node that waits for a file."""


def unruly(nursery: SharedNursery, workers: int, nodes: int = 6, **more: Any) -> EmbeddedGrid:
    return EmbeddedGrid(APPS / "unruly", nodes, workers=workers, nursery=nursery, **more)


def drawn(grid: EmbeddedGrid, nodes: Sequence[int], group: str = "") -> list[tuple[float, ...]]:
    messages = [Message(RecordDict(), node, "query.draw", group_id=group) for node in nodes]
    replies = grid.send_and_receive(messages)
    records = [reply.content["said"] for reply in replies]
    return [tuple(r["drawn"]) for r in records if isinstance(r, MetricRecord)]  # type: ignore[arg-type]


# ---- random numbers


@pytest.fixture(scope="module")
def by_workers(nursery: SharedNursery) -> dict[int, list[list[tuple[float, ...]]]]:
    """Two rounds of drawing, by number of workers; before the second, a worker is killed."""
    found = {}
    for workers in (0, 1, 2):
        with unruly(nursery, workers) as grid:
            nodes = grid.get_node_ids()
            rounds = [drawn(grid, nodes)]
            for pid in grid.worker_pids[:1]:
                os.kill(pid, signal.SIGKILL)
                grid.send_and_receive([Message(RecordDict(), nodes[0], "query.unheard_of")] * 2)
            rounds.append(drawn(grid, nodes))
        found[workers] = rounds
    return found


def test_every_message_draws_its_own_numbers(by_workers: Any) -> None:
    """Nodes, messages of one node, and a worker that took a dead one's place."""
    for rounds in by_workers.values():
        rows = [row for each in rounds for row in each]
        assert len(rows) == 12
        for generator in zip(*rows, strict=True):
            assert len(set(generator)) == 12


def test_the_numbers_do_not_depend_on_the_number_of_workers(by_workers: Any) -> None:
    assert by_workers[0] == by_workers[1] == by_workers[2]


def test_the_runs_seed_and_the_round_change_the_numbers(nursery: SharedNursery) -> None:
    seen = set()
    for seed in (0, 1):
        with unruly(nursery, 0, run_config={"seed": seed}) as grid:
            seen.add(drawn(grid, [FIRST_NODE], "1")[0])
            seen.add(drawn(grid, [FIRST_NODE], "2")[0])
            again = drawn(grid, [FIRST_NODE], "2")[0]
        with unruly(nursery, 0, run_config={"seed": seed}) as grid:
            assert drawn(grid, [FIRST_NODE], "2")[0] in seen, "a run that goes on draws the same"
            assert again not in seen
    assert len(seen) == 4


def state_of_all() -> list[Any]:
    numpy = np.random.get_state(legacy=False)
    return [
        random.getstate(),
        numpy["state"]["key"].tolist(),  # type: ignore[index]
        numpy["has_gauss"],  # type: ignore[index]
        numpy["gauss"],  # type: ignore[index]
        torch.get_rng_state().tolist(),
    ]


@pytest.mark.parametrize("normals", [0, 1, 2])
def test_nodes_in_this_process_leave_the_servers_generators_alone(
    nursery: SharedNursery, normals: int
) -> None:
    """Also half of a pair of normal numbers, which NumPy keeps beside its state."""
    with unruly(nursery, 0) as grid:
        np.random.randn(normals)
        before = state_of_all()
        drawn(grid, grid.get_node_ids())
        assert state_of_all() == before
        np.random.randn(1)
        before = state_of_all()
        list(grid.stream([Message(RecordDict(), n, "query.draw") for n in grid.get_node_ids()]))
        assert state_of_all() == before


def test_seeded_work_is_the_same_inside_and_outside_of_a_nodes_stream() -> None:
    def inside() -> list[float]:
        with streams.seeded(5):
            return [random.random(), np.random.randn(), float(torch.rand(1))]

    alone = inside()
    streams.seed_all(9)
    with streams.expendable():
        assert inside() == alone
        after = np.random.rand()
        assert inside() == alone
        assert np.random.rand() == after, "what comes after it is determined too"


# ---- order


@pytest.mark.parametrize("workers", [0, 2])
def test_replies_come_in_the_order_of_the_messages(nursery: SharedNursery, workers: int) -> None:
    """Sums of an app's own then have the same last bits with any number of workers."""
    shuffle = random.Random(workers)
    with unruly(nursery, workers, nodes=20) as grid:
        for _ in range(3):
            nodes = shuffle.sample(list(grid.get_node_ids()), 20)
            messages = [Message(RecordDict(), node, "query.draw") for node in nodes]
            replies = grid.send_and_receive(messages)
            assert [reply.metadata.src_node_id for reply in replies] == nodes


# ---- pushed and pulled


def waiting(nodes: Sequence[int], place: Path, ttl: float | None = None) -> list[Message]:
    content = RecordDict({"orders": ConfigRecord({"place": str(place)})})
    return [Message(content, node, "query.wait", ttl=ttl) for node in nodes]


def until(condition: Any, limit: float = 60.0) -> None:
    """Look again and again; the limit is for tests that fail."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pull_gives_what_is_there_and_waits_for_nobody(
    nursery: SharedNursery, workers: int, tmp_path: Path
) -> None:
    with unruly(nursery, workers, nodes=4) as grid:
        ids = list(grid.push_messages(waiting(grid.get_node_ids(), tmp_path)))
        found: list[Message] = []

        def three() -> bool:
            left = set(ids) - {reply.metadata.reply_to_message_id for reply in found}
            found.extend(grid.pull_messages(left))
            return len(found) == 3

        until(three)
        assert SLOW not in {reply.metadata.src_node_id for reply in found}
        assert grid.pull_messages(ids[3:]) == []
        if workers:  # another message does not wait for the slow node either
            (other,) = grid.send_and_receive(waiting([FIRST_NODE], tmp_path), timeout=60)
            assert other.has_content()
        (tmp_path / "go").touch()
        until(lambda: bool(found.extend(grid.pull_messages(ids[3:])) or len(found) == 4))
        assert not any(reply.has_error() for reply in found)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_was_pushed_is_done_although_nobody_asks(
    nursery: SharedNursery, workers: int, tmp_path: Path
) -> None:
    with unruly(nursery, workers, nodes=3) as grid:
        grid.push_messages(waiting(grid.get_node_ids(), tmp_path))
        until(lambda: len(list(tmp_path.glob("began-*"))) == 3)


def test_a_slow_node_costs_its_own_reply_when_its_ttl_is_over(
    nursery: SharedNursery, tmp_path: Path
) -> None:
    with unruly(nursery, 2, nodes=4) as grid:
        grid.send_and_receive(waiting(grid.get_node_ids()[:3], tmp_path))  # everyone is there
        replies = grid.send_and_receive(waiting(grid.get_node_ids(), tmp_path, ttl=2.0))
        assert [reply.has_error() for reply in replies] == [False, False, False, True]
        assert (replies[3].error.code, replies[3].metadata.src_node_id) == (UNKNOWN, SLOW)
        (tmp_path / "go").touch()
        (after,) = grid.send_and_receive(waiting([SLOW], tmp_path))
        assert after.has_content(), "the process that hung in it has been replaced"


def test_a_reply_that_is_pulled_after_the_ttl_is_an_error(
    nursery: SharedNursery, tmp_path: Path
) -> None:
    with unruly(nursery, 0, nodes=4) as grid:
        messages = waiting([FIRST_NODE, SLOW], tmp_path, ttl=1.0)
        began = time.monotonic()
        quick, slow = grid.push_messages(messages)
        until(lambda: (tmp_path / "began-3").exists())
        until(lambda: time.monotonic() > began + 1.0)
        replies = grid.pull_messages([quick, slow])
        assert [reply.error.code for reply in replies] == [UNKNOWN, UNKNOWN]
        (tmp_path / "go").touch()
        (after,) = grid.send_and_receive(waiting([FIRST_NODE], tmp_path))
        assert after.has_content()
        assert [m.error.code for m in grid.pull_messages([slow])] == [UNKNOWN]


def test_what_is_wrong_with_an_app_is_said_to_whoever_pulls(
    nursery: SharedNursery, tmp_path: Path
) -> None:
    (tmp_path / "pyproject.toml").write_text((APPS / "unruly" / "pyproject.toml").read_text())
    (tmp_path / "client_app.py").write_text("import nowhere\n")
    with EmbeddedGrid(tmp_path, 2, workers=1, nursery=nursery) as grid:
        ids = list(grid.push_messages([Message(RecordDict(), FIRST_NODE, "query")]))

        def said() -> bool:
            try:
                return bool(grid.pull_messages(ids))
            except Exception as error:
                assert "No module named 'nowhere'" in str(error)
                return True

        until(said)


# ---- processes of the app's own


def test_a_node_in_this_process_may_use_a_pool_of_processes(
    umbel: WarmCommand, tmp_path: Path
) -> None:
    """Its processes are forks of a program that takes SIGTERM for Ctrl-C, and are ended by it."""
    ended = umbel.command("run", APPS / "unruly", "--workers", "0", "--nodes", "4", cwd=tmp_path)
    assert ended.out.count("[1, 4, 9]") == 12
    assert "KeyboardInterrupt" not in ended.err
    assert ended.status == 0
