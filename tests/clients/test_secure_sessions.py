"""Sessions of a secure sum in node processes: who holds them, who answers, what is left of them.

Three nodes with certificates and apps in processes of their own; the server's half of the
protocol drives them as a coordinator's connection would.
"""

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

from umbel.benchmarks.speed.apps import write_federation
from umbel.clients.ledger.database import LedgerDatabase
from umbel.clients.ledger.file import LedgerFile
from umbel.clients.ledger.names import STATE
from umbel.clients.process.app_process import Answer, AppProcess, AppSettings
from umbel.clients.process.node_process import write_shared
from umbel.clients.process.pipe import BESIDE
from umbel.clients.process.sessions import SecureSessions
from umbel.clients.process.spent import SpentRounds
from umbel.core.errors import ConfigError
from umbel.core.flower import take_identity
from umbel.core.records import Manifest, to_array
from umbel.strategies.collect import Gathering, Sum
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS
from umbel.strategies.private.clip import Clip
from umbel.strategies.secure.distributed_skellam import DistributedSkellam
from umbel.strategies.secure.node import EXTERNAL_SESSION, IDENTITY
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.secure.wire import SECURE, STAGES, query_of, stage_of
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts
from umbel.transport.certificates import make_server_identity, open_authority, save_identity
from umbel.transport.codec import decode, encode, encode_values
from umbel.transport.link_pb2 import Begin

NODES = (1001, 1002, 1003)
TASK = """
import numpy as np

from umbel import Federation, FunctionTrainer
from umbel.strategies.private.clip import Clip
from umbel.strategies.secure.distributed_skellam import DistributedSkellam
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack


def train(arrays, examples, job):
    return {"w": arrays["w"] + np.float32(examples)}, 1, {}


def initial(options):
    return {"w": np.zeros(SIZE, "f4")}


federation = Federation(
    FunctionTrainer(initial, train),
    lambda node, _: node.partition + 1,
    stack=STACK,
)
"""
EXACT = "Stack((Clip(2048), Quantize(levels=1 << 16)), SecureSum())"
NOISED = (
    "Stack((Clip(1.0), Quantize(64, 'stochastic'), DistributedSkellam(4.0, min_cohort=3)),"
    " SecureSum(weighting='fixed'))"
)
STACKS = {
    EXACT: Stack((Clip(2048), Quantize(levels=1 << 16)), SecureSum()),
    NOISED: Stack(
        (Clip(1.0), Quantize(64, "stochastic"), DistributedSkellam(4.0, min_cohort=3)),
        SecureSum(weighting="fixed"),
    ),
}


class Nodes:
    """Nodes whose apps run, and what was sent to them and came back."""

    def __init__(self, folder: Path, size: int, stack: str = EXACT) -> None:
        task = TASK.replace("SIZE", str(size)).replace("STACK", stack)
        self.stack, self.folder = STACKS[stack], folder
        app = write_federation(folder / "app", task, name="x", config="")
        authority = open_authority(folder)
        self.trainees: dict[int, AppProcess] = {}
        self.size, self.asked, self.memory = size, 0, folder / "memory"
        for partition, node in enumerate(NODES):
            identity = folder / f"{node}.pem"
            save_identity(identity, make_server_identity(authority, [f"node-{node}"]))
            config = {
                IDENTITY: str(identity),
                STATE: str(folder / f"{node}"),
                "partition-id": partition,
                "num-partitions": 3,
            }
            settings = AppSettings(app, self.memory / str(node), config, 1)
            self.trainees[node] = AppProcess(replace(settings, spent=folder / f"{node}.rounds"))

    async def ask(self, message: Message) -> Answer:
        """Send a message to its node."""
        self.asked += 1
        data = b"".join(encode(message.content))
        trainee = self.trainees[message.metadata.dst_node_id]
        if len(data) > BESIDE:
            write_shared(trainee.inbound[0], [data])
        begin = Begin(
            id=f"m{self.asked}",
            size=len(data),
            inline=data if len(data) <= BESIDE else b"",
            run_id=1,
            message_type=message.metadata.message_type,
            ttl=60,
        )
        return await trainee.run(begin, message.metadata.dst_node_id, 120)

    async def sum(
        self, before: Callable[[str, list[Message]], Any] = lambda *_: None, number: int = 1
    ) -> Sum:
        """One round; `before` is told of each trip, and may do something to the nodes."""
        stack = self.stack
        above = Facts(size=self.size, max_replies=3, expected_replies=3, round=number)
        facts = stack.check(above, stack.init(self.size))
        manifest = Manifest.of({"w": torch.zeros(self.size)})
        config = ConfigRecord({"round": number, "manifest": manifest.digest})
        published = stack.publish(stack.init(self.size), above)
        for name, value in published.items():
            config[name] = value
        model = ArrayRecord({PARAMETERS: to_array(torch.zeros(self.size))})
        content = RecordDict({MODEL: model, CONFIG: config})
        requests: Any = [Message(content, node, "train") for node in NODES]
        round_ = Gathering(number, self.size, torch.float32, 3.0, facts, run_id=1)
        gathering = stack.collect.gather(requests, round_)
        requests = next(gathering)
        try:
            while True:
                before(requests[0].metadata.message_type, requests)
                answers = await asyncio.gather(*map(self.ask, requests))
                replies = [
                    Message(decode(answer.parts, checksum=True), reply_to=request)
                    for answer, request in zip(answers, requests, strict=True)
                ]
                requests = gathering.send(iter(replies))
        except StopIteration as end:
            result: Sum = end.value
            return result


def with_nodes(
    folder: Path,
    size: int,
    use: Callable[[Nodes], Coroutine[Any, Any, None]],
    stack: str = EXACT,
) -> None:
    async def run() -> None:
        nodes = Nodes(folder, size, stack)
        try:
            await asyncio.gather(*(trainee.start() for trainee in nodes.trainees.values()))
            await use(nodes)
        finally:
            for trainee in nodes.trainees.values():
                trainee.stop()

    take_identity(1)
    asyncio.run(run())


def refusal(answer: Answer) -> str:
    return str(decode(answer.parts, checksum=True).config_records[SECURE]["refused"])


def test_apps_that_die_after_training_lose_no_sum_and_replays_find_nothing(tmp_path: Path) -> None:
    async def use(nodes: Nodes) -> None:
        seen: dict[str, list[Message]] = {}
        first = {node: trainee.pid for node, trainee in nodes.trainees.items()}

        def kill(kind: str, requests: list[Message]) -> None:
            seen[kind] = requests
            if kind == query_of("mask"):
                for trainee in nodes.trainees.values():
                    trainee.stop()

        sum_ = await nodes.sum(kill)
        assert not sum_.aborted, sum_.rejected
        assert sum_.replies == 3
        assert sum_.about["identities"] == "authority"
        assert sum_.total.numpy() == pytest.approx(np.full(nodes.size, 6.0), abs=0.01)
        assert all(trainee.pid is None for trainee in nodes.trainees.values())

        # The session is gone: a second unmasking wakes the app, which knows nothing of it.
        again = await nodes.ask(seen[query_of("unmask")][0])
        assert refusal(again).startswith("stage")
        assert nodes.trainees[NODES[0]].pid not in (None, first[NODES[0]])
        # The app that was started anew cannot know the ticket; whoever held the session does.
        replay = await nodes.ask(seen["train"][0])
        assert refusal(replay).startswith("round")
        assert not nodes.memory.exists()
        # Nor does a new session for that round: without one node, it would give its update away.
        anew = await nodes.sum()
        assert anew.aborted and not anew.replies
        assert "rounds only go up" in str(anew.rejected)
        # And the next round is as good as the first.
        assert (await nodes.sum(number=2)).replies == 3

    with_nodes(tmp_path, 10, use)


def test_the_connection_charges_the_ledger_when_the_masked_update_leaves(tmp_path: Path) -> None:
    async def use(nodes: Nodes) -> None:
        def charged() -> list[int]:
            found = [LedgerFile(tmp_path / str(node)).budget() for node in NODES]
            return [rows[0]["participations"] if rows else 0 for rows in found]

        seen = {}

        def look(kind: str, _: list[Message]) -> None:
            seen[kind] = charged()

        assert (await nodes.sum(look)).replies == 3
        assert seen[query_of("mask")] == [0, 0, 0]
        assert seen[query_of("agree")] == [1, 1, 1]

        def spend(kind: str, _: list[Message]) -> None:
            """Another process spends what is left, once the sessions have begun."""
            for node in NODES if kind == query_of("mask") else ():
                with LedgerDatabase(tmp_path / str(node)).writing() as database:
                    database.execute(
                        "INSERT INTO charge SELECT NULL, time, 'x' || reply, run, round,"
                        " coordinator, population, data, unit, mechanism, event, relation, slack,"
                        " 100000 FROM charge"
                    )

        refused = await nodes.sum(spend, number=2)
        assert refused.replies == 0
        assert len(refused.rejected) == 3
        assert all("takes no further part" in each.reason for each in refused.rejected)

    with_nodes(tmp_path, 4, use, NOISED)


def test_a_large_session_passes_through_shared_memory_and_is_wiped_from_it(tmp_path: Path) -> None:
    async def use(nodes: Nodes) -> None:
        sizes: dict[int, int] = {}

        def look(kind: str, _: list[Message]) -> None:
            if kind == query_of("share"):
                for node, trainee in nodes.trainees.items():
                    file = trainee._outbound
                    sizes[node] = os.fstat(file).st_size
                    end = os.pread(file, sizes[node], sizes[node] - BESIDE)
                    assert not end.strip(b"\0")

        sum_ = await nodes.sum(look)
        assert sum_.total.numpy() == pytest.approx(np.full(nodes.size, 6.0), abs=0.01)
        assert all(size > 2 * nodes.size for size in sizes.values())  # it did pass through
        assert not nodes.memory.exists()

    with_nodes(tmp_path, 200_000, use)


def test_a_session_is_of_one_run_and_ends_where_training_begins_again(tmp_path: Path) -> None:
    authority = open_authority(tmp_path)
    file = tmp_path / "identity.pem"
    save_identity(file, make_server_identity(authority, ["node"]))
    sessions = SecureSessions({IDENTITY: str(file)})
    assert sessions.wanted
    assert not SecureSessions({}).wanted
    kept = {"ticket": bytes(32), "stage": "share", "run": 7, "round": 1}
    session = b"".join(encode_values(EXTERNAL_SESSION, kept))
    assert sessions.take_over(7, 1001, session) is None
    assert sessions.stage(7, query_of("mask")) == "mask"
    assert sessions.stage(8, query_of("mask")) is None
    assert sessions.stage(7, "query.umbel_hello") is None
    sessions.forget()
    assert sessions.stage(7, query_of("mask")) is None
    again = sessions.take_over(7, 1001, session)
    assert again is not None
    assert refusal(Answer("m", again)).startswith("replay")
    assert sessions.stage(7, query_of("mask")) is None


EVIL = """
from task import federation
from flwr.app import Message
from umbel.clients.handler import FederationClientApp


class Evil(FederationClientApp):
    def unguarded(self, message, context):
        from umbel.core.records import to_array
        import torch
        from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

        kind = message.content["umbel"]["how"]
        bare = {
            "array": RecordDict({"x": ArrayRecord({"w": to_array(torch.ones(2))})}),
            "metric": RecordDict({"x": MetricRecord({"w": 0.5})}),
            "numbers": RecordDict({"x": ConfigRecord({"w": [0.5, 1.5]})}),
            "number": RecordDict({"x": ConfigRecord({"w": 0.5})}),
            "long": RecordDict({"umbel.secure": ConfigRecord({"sealing": bytes(1 << 15)})}),
        }
        return Message(bare[kind], reply_to=message)


app = Evil(federation.client_app().half)
"""


@pytest.mark.parametrize("how", ["array", "metric", "numbers", "number", "long"])
def test_an_app_cannot_send_an_update_by_itself_where_only_sums_may_leave(
    how: str, evil: tuple[asyncio.AbstractEventLoop, AppProcess]
) -> None:
    loop, trainee = evil
    told = ConfigRecord({"how": how})
    data = b"".join(encode(RecordDict({CONFIG: told})))
    begin = Begin(
        id=how, size=len(data), inline=data, run_id=1, message_type="query.umbel_hello", ttl=60
    )
    answer = loop.run_until_complete(trainee.run(begin, 1001, 120))
    assert not answer.parts
    assert answer.error is not None
    assert (
        "policy (min-cohort) refuses: min-cohort asks for secure sums, and the app would"
        in (answer.error[1])
    )


@pytest.fixture(scope="module")
def evil(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[asyncio.AbstractEventLoop, AppProcess]]:
    """A node whose app goes around the gate in its own process."""
    folder = tmp_path_factory.mktemp("evil")
    task = TASK.replace("SIZE", "3").replace("STACK", next(iter(STACKS)))
    app = write_federation(folder / "app", task, name="x", config="")
    (app / "client_app.py").write_text(EVIL)
    (folder / "policy.toml").write_text("min-cohort = 3")
    config = {"policy": str(folder / "policy.toml")}
    loop = asyncio.new_event_loop()
    take_identity(1)
    trainee = AppProcess(AppSettings(app, folder / "memory", config, 1))
    try:
        loop.run_until_complete(trainee.start())
        yield loop, trainee
    finally:
        trainee.stop()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()


def test_a_spent_round_stays_spent_whatever_happens_to_the_node(tmp_path: Path) -> None:
    """A server may begin a round anew only before the node has given its masked update."""
    authority = open_authority(tmp_path)
    file = tmp_path / "identity.pem"
    save_identity(file, make_server_identity(authority, ["node"]))

    def begin(sessions: SecureSessions, ticket: bytes, round_: int, run: int = 7) -> str:
        kept = {"ticket": ticket, "stage": "share", "run": run, "round": round_}
        taken = sessions.take_over(7, 1001, b"".join(encode_values(EXTERNAL_SESSION, kept)))
        return "" if taken is None else refusal(Answer("m", taken))

    rounds = tmp_path / "rounds"
    SpentRounds(rounds).spend(7, 4)
    with rounds.open("a") as cut:
        cut.write("7 5")  # killed in the middle of a line, so before that update left
    again = SecureSessions({IDENTITY: str(file)}, SpentRounds(rounds))
    assert again.spent(7) == 4
    assert "rounds only go up; the server asks for round 4" in begin(again, b"a" * 32, 4)
    assert "asks for round 3" in begin(again, b"b" * 32, 3)
    assert begin(again, b"c" * 32, 5) == ""
    assert begin(again, b"d" * 32, 5) == ""  # nothing had left in the session before
    assert "another run" in begin(again, b"e" * 32, 9, run=8)
    rounds.write_text("7 4\nseven 5\n")
    with pytest.raises(ConfigError, match="is damaged"):
        SpentRounds(rounds)


def test_only_later_trips_are_stages() -> None:
    assert [stage_of(query_of(stage)) for stage in STAGES] == list(STAGES)
    assert {stage_of(each) for each in ("train", "share", "query", "query.umbel_secure_x")} == {
        None
    }
