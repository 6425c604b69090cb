"""The embedded engine runs any Flower app, unmodified, isolated, and without a node's weight."""

import importlib
import json
import logging
import random
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from tests.fakes import APPS, SharedNursery
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.core.flower import UNAVAILABLE, UNKNOWN
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid


@pytest.fixture(autouse=True)
def _same_path_afterwards() -> Iterator[None]:
    before = sys.path[:]
    yield
    sys.path[:] = before


def run_app(name: str, nursery: Any, workers: int, log: Path | None = None, **config: Any) -> None:
    folder = open_app(APPS / name)
    config = {**folder.options, **config}
    server = folder.server_app()
    nodes = folder.nodes or 3
    with EmbeddedGrid(
        folder.path, nodes, workers=workers, run_config=config, nursery=nursery, log=log
    ) as grid:
        server(grid, Context(1, 1, {}, RecordDict(), config))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_app_that_knows_only_flower(
    workers: int, tmp_path: Path, nursery: SharedNursery
) -> None:
    """FedAvg of Flower, its messages, then queries and actions of the app's own; mods; state."""
    out, log = tmp_path / "said.json", tmp_path / "log.txt"
    run_app("plain", nursery if workers else None, workers, log, out=str(out))
    said = json.loads(out.read_text())
    task = importlib.import_module("task")
    w = np.zeros(4, np.float32)
    for _ in range(2):
        rows = [task.data(partition) for partition in range(4)]
        steps = [task.step(w, x, y, 0.1) for x, y in rows]
        w = np.average(steps, axis=0, weights=[len(y) for _, y in rows]).astype(np.float32)
    np.testing.assert_allclose(said["w"], w, rtol=1e-6)
    assert said["visits"] == 2.0, "the node's state lasted over two rounds"
    assert said["evaluated"] == [1, 2]
    assert said["custom"] == [0, 1, 2, 3]
    assert said["mods"] == [5, 5, 5, 5], "two rounds of two messages and one of its own"
    assert [row["partition"] for row in said["queries"]] == [0, 1, 2, 3]
    assert {row["visits"] for row in said["queries"]} == {2}
    assert 1 <= len({row["pid"] for row in said["queries"]}) <= max(1, workers)
    (error,) = said["errors"]
    assert error.startswith("LookupError: the shelf is empty (")  # and where
    assert said["errors-again"] == said["errors"], "a failed message left no trace in the state"
    assert len(said["unknown"]) == 4
    assert "LookupError: the shelf is empty" in log.read_text(), "with its traceback"
    assert "a node says something" in log.read_text(), "what nodes print goes to the log"


@pytest.mark.parametrize("workers", [0, 2])
def test_an_app_in_the_style_before_messages(
    workers: int, nursery: SharedNursery, caplog: pytest.LogCaptureFixture
) -> None:
    """NumPyClient, client_fn, server_fn and a strategy of flwr.server, which sends from threads."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger="flwr")
    try:
        run_app("legacy", nursery if workers else None, workers)
    finally:
        logger.removeHandler(caplog.handler)
    assert "'distance': [(1, " in caplog.text
    distance = float(caplog.text.split("(2, ")[-1].split(")")[0])
    assert distance < 0.2, "two rounds of twenty steps nearly solve it"


# ---- the interface of a grid


def echo_app() -> ClientApp:
    """Answers with what came, and how often this node was asked."""
    app = ClientApp()

    @app.train()
    @app.query()
    def answer(message: Message, context: Context) -> Message:
        seen = context.state.metric_records.setdefault("seen", MetricRecord({"n": 0}))
        seen["n"] += 1  # type: ignore[operator]
        content = RecordDict({**message.content, "seen": MetricRecord({"n": seen["n"]})})
        return Message(content, reply_to=message)

    return app


def ask(nodes: Sequence[int], kind: str = "query", **content: Any) -> list[Message]:
    shared = RecordDict(content)
    return [Message(shared, node, kind) for node in nodes]


def seen(replies: Sequence[Message]) -> list[int]:
    return [int(reply.content["seen"]["n"]) for reply in replies]  # type: ignore[call-overload,index,arg-type]


def test_nodes_and_messages_have_ids_that_apps_may_rely_on() -> None:
    with EmbeddedGrid(echo_app(), 5, run_id=77) as grid:
        nodes = list(grid.get_node_ids())
        assert nodes == [node.node_id for node in grid.get_nodes()]
        assert len(set(nodes)) == 5
        assert [ref.partition for ref in grid.roster()] == [0, 1, 2, 3, 4]
        assert grid.run.run_id == 77
        created = grid.create_message(RecordDict(), "query", nodes[1], "group-x")
        (reply,) = grid.send_and_receive([created])
        data = reply.metadata
        assert (data.src_node_id, data.group_id, data.run_id) == (nodes[1], "group-x", 77)
        assert data.reply_to_message_id == created.metadata.message_id != ""
        assert data.message_id not in ("", created.metadata.message_id)


def pulled(grid: EmbeddedGrid, ids: Iterable[str]) -> list[Message]:
    """Replies to pushed messages, pulled until all are there."""
    replies: list[Message] = []
    left = set(ids)
    while left:
        new = grid.pull_messages(left)
        left -= {reply.metadata.reply_to_message_id for reply in new}
        replies += new
    return replies


def test_pushed_messages_can_be_pulled_in_parts_and_once() -> None:
    with EmbeddedGrid(echo_app(), 4) as grid:
        ids = list(grid.push_messages(ask(grid.get_node_ids())))
        assert len(set(ids)) == 4
        late = pulled(grid, ids[2:])
        early = pulled(grid, ids[:2])
        assert {m.metadata.reply_to_message_id for m in late} == set(ids[2:])
        assert {m.metadata.reply_to_message_id for m in early} == set(ids[:2])
        assert not any(m.has_error() for m in late + early)
        assert grid.send_and_receive([]) == []


def test_an_unknown_message_is_an_error_each_time_it_is_asked_for() -> None:
    """As in Flower's own grid: one that was read is not told from one that never was."""
    with EmbeddedGrid(echo_app(), 1) as grid:
        ids = list(grid.push_messages(ask(grid.get_node_ids())))
        pulled(grid, ids)
        for _ in range(2):
            again = grid.pull_messages([*ids, "unheard-of"])
            assert [m.metadata.reply_to_message_id for m in again] == [*ids, "unheard-of"]
            assert [m.error.code for m in again] == [UNKNOWN, UNKNOWN]


def test_a_message_to_nobody_has_no_id_and_an_error_for_a_reply(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with EmbeddedGrid(echo_app(), 2) as grid:
        first, second = grid.get_node_ids()
        with caplog.at_level(logging.ERROR, logger="flwr"):
            ids = list(grid.push_messages(ask([first, 5])))
        assert ids[1] is None
        assert "node 5, which is not in this federation" in caplog.text
        assert seen(pulled(grid, ids[:1])) == [1]
        replies = grid.send_and_receive(ask([first, 5, second]))
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert (replies[1].error.code, replies[1].metadata.src_node_id) == (UNAVAILABLE, 5)
        with pytest.raises(ConfigError, match="ttl of -1"):
            grid.push_messages([Message(RecordDict(), first, "query", ttl=-1.0)])


def test_several_messages_to_one_node_are_answered_in_order_with_its_state() -> None:
    with EmbeddedGrid(echo_app(), 2, group_size=8) as grid:
        first, second = grid.get_node_ids()
        replies = grid.send_and_receive(ask([first, first, second, first], "train"))
        assert seen(replies) == [1, 2, 1, 3]


def test_what_a_node_does_to_its_message_is_its_own() -> None:
    """Contents are shared until somebody changes one."""
    app = ClientApp()
    weights = np.arange(5000, dtype=np.float32)

    @app.train()
    def spoil(message: Message, context: Context) -> Message:
        array = message.content["m"]["w"].numpy()  # type: ignore[call-overload,index,union-attr]
        assert array.tobytes() == weights.tobytes()
        assert message.content["c"]["list"] == [1, 2]  # type: ignore[index]
        assert "spoiled" not in context.run_config
        assert "spoiled" not in context.node_config
        array += 1
        message.content["c"]["list"].append(3)  # type: ignore[index,union-attr]
        message.content["m"]["w"] = Array(array)  # type: ignore[index]
        context.run_config["spoiled"] = True
        context.node_config["spoiled"] = True
        return Message(RecordDict(), reply_to=message)

    content = {"m": ArrayRecord({"w": Array(weights)}), "c": ConfigRecord({"list": [1, 2]})}
    with EmbeddedGrid(app, 5, run_config={"a": 1}) as grid:
        for _ in range(2):
            replies = grid.send_and_receive(ask(grid.get_node_ids(), "train", **content))
            assert not any(reply.has_error() for reply in replies)
    assert content["c"]["list"] == [1, 2]


def test_changing_a_content_after_it_was_pushed_changes_nothing() -> None:
    with EmbeddedGrid(echo_app(), 1) as grid:
        content = RecordDict({"c": ConfigRecord({"a": 1})})
        ids = grid.push_messages([Message(content, grid.get_node_ids()[0], "query")])
        content["c"]["a"] = 2  # type: ignore[index]
        (reply,) = pulled(grid, ids)
        assert reply.content["c"]["a"] == 1  # type: ignore[index]


def test_threads_may_share_a_grid(nursery: SharedNursery) -> None:
    """Flower's older strategies send from a pool of threads; nothing is lost or mixed up."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for workers in (0, 2):
            app: Any = APPS / "unruly" if workers else echo_app()
            with EmbeddedGrid(app, 40, workers=workers, nursery=nursery) as grid:
                nodes = grid.get_node_ids()
                start = threading.Barrier(8)

                def talk(
                    number: int, grid: Any = grid, start: Any = start, nodes: Any = nodes
                ) -> list[int]:
                    start.wait()
                    own, found = nodes[number * 5 : number * 5 + 5], []
                    for i in range(20):
                        content = {"orders": ConfigRecord({"size": i + 1})}
                        messages = ask([own[i % 5]], "train", **content)
                        (reply,) = grid.send_and_receive(messages)
                        assert not reply.has_error(), reply.error.reason
                        found.append(reply.metadata.src_node_id)
                    return found

                with ThreadPoolExecutor(8) as pool:
                    results = list(pool.map(talk, range(8)))
                assert results == [(nodes[n * 5 : n * 5 + 5] * 4) for n in range(8)]
    finally:
        sys.setswitchinterval(before)


def test_ten_thousand_nodes_need_the_memory_of_one_model() -> None:
    """Kept, the replies would be 400 MB; the nodes' own states are what lasts."""
    size, nodes = 10_000, 10_000
    model = {"m": ArrayRecord({"w": Array(np.ones(size, np.float32))})}
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if context.node_id % 10 == 0:
            context.state["own"] = ConfigRecord({"x": "y" * 1000})
        after = message.content["m"]["w"].numpy() + 1  # type: ignore[call-overload,index,union-attr]
        return Message(RecordDict({"m": ArrayRecord({"w": Array(after)})}), reply_to=message)

    with EmbeddedGrid(app, nodes) as grid:
        resident = psutil.Process().memory_info
        before, peak, right = resident().rss, 0, 0
        for reply in grid.stream(ask(grid.get_node_ids(), "train", **model)):
            right += reply.content["m"]["w"].data[-4:] == b"\0\0\0@"  # type: ignore[index,union-attr]
            peak = max(peak, resident().rss) if right % 250 == 0 else peak
        assert right == nodes
        assert len(grid.states.by_node) == nodes // 10
    assert peak - before < 100e6


# ---- groups


class Counting(ClientApp):
    """An app that can train several nodes at once, and says how many they were."""

    def __init__(self, fails: int = -1) -> None:
        super().__init__()
        self.groups: list[int] = []
        self.fails = fails
        self.train()(self._train)
        self.query()(self._train)

    def _train(self, message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == self.fails:
            raise OSError("no more paper")
        context.state["n"] = MetricRecord({"n": len(self.groups)})
        return Message(RecordDict(), reply_to=message)

    def train_many(self, messages: Any, contexts: Any) -> list[Message]:
        self.groups.append(len(messages))
        return [self._train(*pair) for pair in zip(messages, contexts, strict=True)]


def test_training_goes_to_the_app_in_groups() -> None:
    app = Counting()
    with EmbeddedGrid(app, 7, group_size=3) as grid:
        grid.send_and_receive(ask(grid.get_node_ids(), "train"))
        assert app.groups == [3, 3]  # and the seventh alone
        grid.send_and_receive(ask(grid.get_node_ids(), "query"))
        assert app.groups == [3, 3]


def test_one_bad_node_does_not_fail_its_group() -> None:
    with EmbeddedGrid(Counting(fails=1), 3, group_size=3) as grid:
        replies = grid.send_and_receive(ask(grid.get_node_ids(), "train"))
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert replies[1].error.reason.startswith("OSError: no more paper (")


# ---- failures


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ("leave", "SystemExit: enough"),
        ("nonsense", "TypeError: the app returned a int in place of a Message"),
        ("nothing", "TypeError: the app returned a NoneType in place of a Message"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_node_does_wrong_is_its_error_reply(
    order: str, said: str, workers: int, nursery: SharedNursery
) -> None:
    content = {"orders": ConfigRecord({order: [1]})}
    with EmbeddedGrid(APPS / "unruly", 3, workers=workers, nursery=nursery) as grid:
        replies = grid.send_and_receive(ask(grid.get_node_ids(), "train", **content))
        assert [reply.has_error() for reply in replies] == [False, True, False]
        assert replies[1].error.reason.startswith(said)
        assert replies[1].metadata.src_node_id == FIRST_NODE + 1


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="nodes is 0"):
        EmbeddedGrid(echo_app(), 0)
    with pytest.raises(ConfigError, match="workers is -1"):
        EmbeddedGrid(echo_app(), 1, workers=-1)
    with pytest.raises(ConfigError, match="worker processes need an app's folder"):
        EmbeddedGrid(echo_app(), 1, workers=1)


def test_states_go_to_a_checkpoint_once_and_come_back() -> None:
    with EmbeddedGrid(echo_app(), 4) as grid:
        first, second = grid.get_node_ids()[:2]
        grid.send_and_receive(ask([first, second]))
        saved = grid.states.take_changed()
        assert set(saved) == {first, second}
        assert grid.states.take_changed() == {}
        grid.send_and_receive(ask([second]))
        assert set(grid.states.take_changed()) == {second}
    with EmbeddedGrid(echo_app(), 4) as grid:
        grid.states.restore(saved)
        assert seen(grid.send_and_receive(ask(grid.get_node_ids()))) == [2, 2, 1, 1]
        with pytest.raises(Exception, match=r"."):
            grid.states.restore({first: b"damaged"})


def test_any_order_of_pulling_gives_every_reply() -> None:
    shuffle = random.Random(4)
    with EmbeddedGrid(echo_app(), 30) as grid:
        ids = list(grid.push_messages(ask(grid.get_node_ids())))
        shuffle.shuffle(ids)
        for message_id in ids:
            (reply,) = pulled(grid, [message_id])
            assert reply.metadata.reply_to_message_id == message_id
