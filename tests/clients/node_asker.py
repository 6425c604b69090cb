"""A coordinator in a few lines: real messages to a real node app, truthful or not."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, RecordDict
from torch import nn

from umbel.clients.data.examples import Examples, Node
from umbel.clients.ledger.names import STATE
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.errors import UmbelError
from umbel.core.flower import Envelope, give_id, take_identity
from umbel.core.records import Manifest, from_array, to_array
from umbel.federation import Federation
from umbel.strategies.collect import Gathering, Sum
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS
from umbel.strategies.transform import Facts

NODE = 1007


def linear() -> nn.Module:
    return nn.Linear(4, 2)


def examples(_: Node, options: Mapping[str, Any]) -> Examples:  # noqa: ARG001
    source = np.random.default_rng(0)
    x = source.normal(size=(40, 4)).astype(np.float32)
    return Examples(x, (x[:, 0] > 0).astype(np.int64))


DP_SGD = Federation(PrivateSgd(trainer=TorchTrainer(linear), example_epsilon=0.5), data=examples)
PLAIN = Federation(TorchTrainer(linear), data=examples)


@dataclass
class QueryRunner:
    """Asks one node; every argument of a question is the coordinator's to choose.

    Attributes:
        federation: the app.
        folder: the node's state; None is a node without one.
        options: of the run.
        run: its id.
        memory: what the app keeps, and a liar may put back.
        more: of the node's own configuration.
    """

    federation: Federation
    folder: Path | None
    options: Mapping[str, Any] = field(default_factory=dict)
    run: int = 1
    memory: RecordDict = field(default_factory=RecordDict)
    more: Mapping[str, Any] = field(default_factory=dict)
    app: Any = None

    def __post_init__(self) -> None:
        self.app = self.app or self.federation.client_app()

    def ask(
        self,
        number: int = 1,
        *,
        name: str = "",
        shift: float = 0.0,
        run: int = 0,
        kind: str = "train",
        told: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> Message:
        """The node's answer; `name` is the message's id, `shift` moves the model."""
        options = {**self.options, **{k.replace("_", "-"): v for k, v in changes.items()}}
        complete = self.federation.complete(options)
        first = self.federation.trainer_for(complete).initial(complete, 0)
        manifest = Manifest.of(first.parameters)
        stack = self.federation.stack_for(complete)
        config = {"manifest": manifest.digest, "round": number}
        config |= stack.publish(stack.init(manifest.size), Facts(size=manifest.size))
        content = RecordDict(
            {
                MODEL: ArrayRecord(
                    {PARAMETERS: to_array(manifest.flatten(first.parameters) + shift)}
                ),
                CONFIG: ConfigRecord({**config, **(told or {})}),
            }
        )
        run = run or self.run
        envelope = Envelope(run, name or f"{number}", NODE, f"{number}", 0.0, 3600.0, kind)
        state = {STATE: str(self.folder)} if self.folder is not None else {}
        context = Context(run, NODE, {**state, **self.more}, self.memory, dict(options))
        reply = self.app(envelope.message(content), context)
        assert isinstance(reply, Message)
        return reply


def update_of(reply: Message) -> torch.Tensor:
    """What the node sent."""
    record = reply.content["update"]
    assert isinstance(record, ArrayRecord)
    return from_array(record["update"]).clone()


def secure_round(
    nodes: Mapping[int, QueryRunner], number: int, *, until: str = "", size: int = 10
) -> Sum | None:
    """One secure sum of these nodes, by their ids; a server that stops before a trip gets none."""
    one = next(iter(nodes.values()))
    options = one.federation.complete(one.options)
    stack = one.federation.stack_for(options)
    first = one.federation.trainer_for(options).initial(options, 0)
    manifest = Manifest.of(first.parameters)
    count = len(nodes)
    facts = Facts(size=size, round=number, expected_replies=count, max_replies=count)
    states = stack.init(size)
    config = {"manifest": manifest.digest, "round": number, **stack.publish(states, facts)}
    model = ArrayRecord({PARAMETERS: to_array(manifest.flatten(first.parameters))})
    content = RecordDict({MODEL: model, CONFIG: ConfigRecord(config)})
    bottom = stack.check(facts, states)
    round_ = Gathering(number, bottom.size, torch.float32, float(count), bottom, run_id=one.run)
    take_identity(one.run)
    gathering = stack.collect.gather([Message(content, node, "train") for node in nodes], round_)
    asked = next(gathering)
    trip = 0
    try:
        while True:
            kind = asked[0].metadata.message_type if asked else ""
            if until and kind.endswith(until):
                return None
            trip += 1
            replies = [_told(nodes[m.metadata.dst_node_id], m, f"{number}.{trip}") for m in asked]
            asked = gathering.send(iter(replies))
    except StopIteration as end:
        found: Sum = end.value
        return found


def _told(node: QueryRunner, request: Message, name: str) -> Message:
    """A node's reply; an exception of its app is an error, as on every engine."""
    give_id(request, name)
    state = {STATE: str(node.folder)} if node.folder is not None else {}
    config = {**state, **node.more}
    id_ = request.metadata.dst_node_id
    context = Context(node.run, id_, config, node.memory, dict(node.options))
    try:
        reply = node.app(request, context)
    except UmbelError as problem:
        return Message(Error(2, str(problem)), reply_to=request)
    assert isinstance(reply, Message)
    return reply
