"""A coordinator that lies, to real nodes: each has its own records and gets what it is sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict

from umbel.clients.data.examples import Split
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.flower import take_identity
from umbel.core.records import Manifest, to_array
from umbel.federation import Federation
from umbel.privacy.masking.session import Member, Roster
from umbel.strategies.collect import Gathering, Sum
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS
from umbel.strategies.secure.wire import SECURE, plain_of, query_of
from umbel.strategies.transform import Facts, Round

RUN, SIZE, NODES = 7, 12, 6


def train(arrays: dict[str, Any], examples: Any, job: Any) -> Any:
    """A node's own step, as long as an option says; some fail with words of their own data."""
    if examples < 0:
        raise ValueError("patient Smith, born 1961, is not in the index")
    step = np.random.default_rng([int(examples), 1]).normal(0, 0.1, SIZE)
    gain = float(job.options["gain"]) * (job.learning_rate or 1.0)
    return {"w": arrays["w"] + gain * step}, int(examples), {"loss": 0.25}


def initial(options: Any) -> dict[str, Any]:  # noqa: ARG001
    return {"w": np.zeros(SIZE)}


def evaluate(arrays: dict[str, Any], examples: Any) -> Any:  # noqa: ARG001
    return {"loss": 0.5, "accuracy": 0.75}


def federation(broken: Sequence[int] = (), **changes: Any) -> Federation:
    """A small app; `broken` are the partitions whose data make it fail."""

    def data(node: Any, _: Any) -> Split:
        return Split(-1 if node.partition in broken else node.partition + 1, [1])

    options = {"gain": 1.0, "cohort": "all", "learning-rate": 0.5}
    given: dict[str, Any] = {"options": options, **changes}
    return Federation(FunctionTrainer(initial, train, evaluate), data, **given)


@dataclass
class Liar:
    """Asks nodes of one app.

    Attributes:
        options: of the run, as every node is sent them.
        told: changes to the message of each node, by node.
        options_of: changes to the options of each node, by node.
        arrays: changes to the model's arrays, by node.
        policy: a policy file for every node.
        app: of the nodes.
    """

    options: Mapping[str, Any]
    told: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    options_of: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    arrays: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    policy: Path | None = None
    app: Federation = field(default_factory=federation)
    count: int = NODES
    round: int = 1
    contexts: dict[int, Context] = field(default_factory=dict)
    sent: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        take_identity(RUN)
        self.complete = self.app.complete(self.options)
        self.client = self.app.client_app()
        self.nodes = [100 + i for i in range(self.count)]
        for i, node in enumerate(self.nodes):
            config: dict[str, Any] = {"partition-id": i, "num-partitions": self.count}
            if self.policy is not None:
                config["policy"] = str(self.policy)
            run_config = {**self.complete, **self.options_of.get(node, {})}
            self.contexts[node] = Context(RUN, node, config, RecordDict(), run_config)

    @property
    def stack(self) -> Any:
        return self.app.stack_for(self.complete)

    def facts(self) -> Facts:
        return Facts(
            size=SIZE, expected_replies=self.count, max_replies=self.count, round=self.round
        )

    def content(self, node: int = 0) -> RecordDict:
        """What a node is sent, with its changes."""
        manifest = Manifest.of({"w": torch.zeros(SIZE, dtype=torch.float64)})
        stack = self.stack
        states = stack.init(SIZE)
        values: dict[str, Any] = {"round": self.round, "manifest": manifest.digest}
        values |= {"learning-rate": 0.5, **stack.publish(states, self.facts())}
        values |= self.told.get(node, {})
        arrays = {PARAMETERS: torch.zeros(SIZE, dtype=torch.float64), **self.arrays.get(node, {})}
        record = ArrayRecord({name: to_array(value) for name, value in arrays.items()})
        return RecordDict({MODEL: record, CONFIG: ConfigRecord(values)})

    def ask(self, node: int, kind: str = "train", content: RecordDict | None = None) -> Message:
        """One message to one node, and its reply."""
        told = self.content(node) if content is None else content
        message = Message(told, node, kind, group_id="1")
        reply = self.client(message, self.contexts[node])
        reply.metadata.__dict__["_src_node_id"] = node
        return reply

    def gather(self, nodes: Sequence[int] | None = None, spoil: Any = None) -> Sum:
        """A round by Umbel's own server half, over messages that differ from node to node."""
        stack, asked = self.stack, list(nodes or self.nodes)
        facts = stack.check(self.facts(), stack.init(SIZE))
        requests = [Message(self.content(node), node, "train") for node in asked]
        round_ = Gathering(
            self.round, facts.size, torch.float64, float(self.count), facts, run_id=RUN
        )
        trips = stack.collect.gather(requests, round_)
        out = next(trips)
        try:
            while True:
                replies = []
                for message in out:
                    node, kind = message.metadata.dst_node_id, message.metadata.message_type
                    self.sent.append(message)
                    reply = self.ask(node, kind, self._own(node, message))
                    if spoil is None or spoil(node, kind, reply):
                        replies.append(reply)
                out = trips.send(iter(replies))
        except StopIteration as end:
            result: Sum = end.value
            return result

    def _own(self, node: int, message: Message) -> RecordDict:
        """The content for a node: one content is sent to all, so its own part is put back in."""
        if message.metadata.message_type != "train":
            return message.content
        return RecordDict({**self.content(node), SECURE: message.content[SECURE]})

    def average(self, sum_: Sum) -> torch.Tensor:
        stack, before = self.stack, self.facts()
        facts = stack.check(before, stack.init(SIZE))
        rnd = Round(
            1, float(self.count), sum_.replies, sum_.weight, facts, torch.Generator().manual_seed(1)
        )
        average = stack.decode(sum_, stack.init(SIZE), rnd, before)[0]
        assert average is not None
        return average

    def conspire(self) -> dict[int, str]:
        """A server that shows every node its own ticket: what nodes say when asked for shares."""
        stack = self.stack
        facts = stack.check(self.facts(), stack.init(SIZE))
        requests = [Message(self.content(node), node, "train") for node in self.nodes]
        round_ = Gathering(
            self.round, facts.size, torch.float64, float(self.count), facts, run_id=RUN
        )
        first = next(stack.collect.gather(requests, round_))
        adverts = {}
        for message in first:
            node = message.metadata.dst_node_id
            adverts[node] = plain_of(self.ask(node, "train", self._own(node, message)).content)
        offered = plain_of(first[0].content)
        members = tuple(member_of(node, advert) for node, advert in sorted(adverts.items()))
        said = {}
        for node, advert in adverts.items():
            ticket = bytes(advert["ticket"])  # type: ignore[arg-type]
            mode: Any = offered["mode"]
            invitation = {"ticket": ticket, "roster": Roster(ticket, mode, members).blob}
            content = RecordDict({SECURE: ConfigRecord(invitation)})
            reply = plain_of(self.ask(node, query_of("share"), content).content)
            said[node] = str(reply.get("refused", "shared its secrets"))
        return said


def member_of(node: int, advert: Mapping[str, Any]) -> Member:
    """A node's advertisement as a roster has it."""
    names = ("sealing", "masking", "identity", "certificate", "signature")
    return Member(node, *(bytes(advert[name]) for name in names))


def refusal(reply: Message) -> str:
    """What a node said in place of an answer."""
    assert reply.has_error(), reply.content
    return str(reply.error.reason)
