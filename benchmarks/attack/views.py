"""What each adversary really sees of a run: the one door through which every attack goes.

    play(federation, ...)     runs the stack that will run, on the embedded engine, and listens
    played.view("server")     what that adversary has; an attack can reach nothing else

The listener writes messages down as they were on the wire, after the nodes' half of every layer
and before the server's. So a layer that forgets to protect is attacked like one that is not
there, and no attack has to know which layers there are.

    adversary         models of all rounds   final model   each node's reply   the raw sum
    server                    x                   x           if readable          x
    malicious-server          x (its own choice)  x           if readable          x
    other-node                x                   x
    model-user                                    x
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import Tensor

from umbel.clients.data.examples import Node
from umbel.clients.trainers.base import SizesGroups, Trainer
from umbel.core.contents import records_of, take_record
from umbel.core.options import Options
from umbel.core.records import Manifest, from_array
from umbel.server.embedded.executor import FIRST_NODE
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.session import session
from umbel.server.pools.choose import make_pool
from umbel.strategies.collect import Aggregate, Exchange, Gather, RoundSpec
from umbel.strategies.exchange import read_update
from umbel.strategies.layout import MODEL, PARAMETERS
from umbel.strategies.stack import Stack

Adversary = Literal["server", "malicious-server", "other-node", "model-user"]


class Attackable(Protocol):
    """What is attacked: `umbel.Federation`, which must be a dataclass with a field `stack`."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def data(self) -> Callable[[Node, Options], Any]: ...
    def complete(self, given: Options) -> dict[str, Any]: ...
    def trainer_for(self, options: Options) -> Trainer: ...
    def stack_for(self, options: Options) -> Stack: ...
    def client_app(self) -> ClientApp: ...
    def server_app(self) -> ServerApp: ...


@dataclass(frozen=True)
class Heard:
    """One round at the server's end of the wire.

    Attributes:
        number: from 1.
        model: that was sent, shape (size,).
        replies: by partition, each update that could be read from a node's reply as a vector of
            the model's size; a masked update cannot.
        wire: by partition, all bytes of all records that the node sent this round.
        total: what the collect returned: the sum before the server's half of any layer.
        count: updates in it.
        asked: partitions that were asked.
    """

    number: int
    model: Tensor
    replies: Mapping[int, Tensor]
    wire: Mapping[int, bytes]
    total: Tensor
    count: int
    asked: tuple[int, ...] = ()


@dataclass(frozen=True)
class View:
    """What one adversary has; what it has not is empty.

    Attributes:
        adversary: who.
        models: the global models that it saw, in order, each of shape (size,).
        replies: per round, by partition, the updates it could read.
        totals: per round, the raw sum.
        wire: per round, by partition, the bytes.
        manifest: names and shapes of the model's parameters, public.
    """

    adversary: Adversary
    models: tuple[Tensor, ...]
    replies: tuple[Mapping[int, Tensor], ...]
    totals: tuple[Tensor, ...]
    wire: tuple[Mapping[int, bytes], ...]
    manifest: Manifest

    @property
    def final(self) -> Tensor:
        """The model that the run ended with."""
        return self.models[-1]

    def sums(self, number: int) -> list[Tensor]:
        """Everything in this view that is a function of round `number`'s updates together.

        The change of the model, and the raw sum for whom it passes; an attack takes its best.
        """
        at = number - 1
        found = [self.totals[at]] if at < len(self.totals) else []
        if at + 1 < len(self.models):
            found.append(self.models[at + 1] - self.models[at])
        return found


@dataclass(frozen=True)
class Played:
    """A run and everything that was heard of it.

    Attributes:
        result: as `umbel run --json` prints it: metrics, epsilon, epsilon_against.
        lines: of metrics.jsonl.
        heard: the rounds.
        final: the last model, shape (size,).
        manifest: of the model's parameters.
        mechanism: as the certificate describes it; empty where nothing is claimed.
    """

    result: Mapping[str, Any]
    lines: Sequence[Mapping[str, Any]]
    heard: Sequence[Heard]
    final: Tensor
    manifest: Manifest
    mechanism: Mapping[str, Any] = field(default_factory=dict)

    def view(self, adversary: Adversary) -> View:
        """What this adversary has."""
        if adversary == "model-user":
            return View(adversary, (self.final,), (), (), (), self.manifest)
        models = (*(heard.model for heard in self.heard), self.final)
        if adversary == "other-node":
            return View(adversary, models, (), (), (), self.manifest)
        return View(
            adversary,
            models,
            tuple(heard.replies for heard in self.heard),
            tuple(heard.total for heard in self.heard),
            tuple(heard.wire for heard in self.heard),
            self.manifest,
        )

    @property
    def bytes_up(self) -> int:
        """Of the run."""
        return sum(int(line.get("bytes_up", 0)) for line in self.lines)

    @property
    def seconds(self) -> list[float]:
        """Of each round."""
        return [float(line["seconds"]) for line in self.lines if line["round"] > 0]


def play(
    federation: Attackable,
    nodes: int,
    options: Options,
    *,
    listen: Callable[[int], bool] = bool,
    around: Callable[[ClientApp], ClientApp] = lambda app: app,
    asking: Callable[[Exchange], Exchange] = lambda collect: collect,
    pool: str | None = None,
) -> Played:
    """Run a federation on the embedded engine with a listener at the server.

    Args:
        federation: what is attacked; its stack runs unchanged.
        nodes: virtual nodes.
        options: of the run, over the federation's own.
        listen: of which rounds each reply is kept (all by default); models and sums always are.
        around: stands between the coordinator and the nodes' app, for a coordinator that lies.
        asking: changes how the coordinator asks, around the listener.
        pool: where the nodes run, a pool of this process; one after the other if None.
    """
    heard: list[Heard] = []

    def stack(given: Options) -> Stack:
        inner = federation.stack_for(given)
        return replace(inner, collect=asking(overheard(inner.collect, heard, listen)))

    complete = federation.complete(options)
    tapped: Attackable = as_it_is(federation, {"stack": stack})
    trainer = federation.trainer_for(complete)
    group = trainer.group_size(complete) if isinstance(trainer, SizesGroups) else 1
    with tempfile.TemporaryDirectory(prefix="umbel-bench-") as folder:
        config = {"options": complete, "rehearsal": True}
        run = RunDirectory.create(None, "bench", config, out=Path(folder) / "run")
        cores = os.cpu_count() or 1
        place = pool and make_pool(pool, complete, workers=None, processors=cores)
        grid = EmbeddedGrid(
            around(tapped.client_app()),
            nodes,
            pool=place or None,
            run_config=complete,
            group_size=group,
        )
        context = Context(grid.run.run_id, 1, {}, RecordDict(), dict(complete))
        with grid, session(run, SilentProgress()) as opened:
            tapped.server_app()(grid, context)
        first = trainer.initial(complete, int(complete["seed"])).parameters
        manifest = Manifest.of(first)
        final = manifest.flatten(run.read_model())
        mechanism: Mapping[str, Any] = {}
        if run.certificate_path.is_file():
            mechanism = json.loads(run.certificate_path.read_text(encoding="utf-8"))["mechanism"]
        return Played(dict(opened.result), run.rounds(), heard, final, manifest, mechanism)


def as_it_is(federation: Attackable, changes: Mapping[str, Any]) -> Any:
    """The federation with a stack to which its options add nothing: that has happened already.

    A broken layer is not recognised for what it claims to be, so it would be added again.
    """
    kind: Any = type(federation)
    made = type(
        kind.__name__, (kind,), {"stack_for": lambda self, given, _=None: self.stack(given)}
    )
    known = {field.name: getattr(federation, field.name) for field in fields(kind) if field.init}
    return made(**{**known, **changes})


def overheard(collect: Exchange, heard: list[Heard], listen: Callable[[int], bool]) -> Exchange:
    """The same collect, which writes down what passes through its `gather`.

    It is a shallow copy with one method replaced on the instance, so that it keeps its class:
    layers and claims ask what kind of collect they stand on.
    """
    listening = copy.copy(collect)

    def gather(requests: Sequence[Message], round_: RoundSpec) -> Gather:
        replies: dict[int, Tensor] = {}
        wire: dict[int, bytes] = {}
        keep = listen(round_.number)
        model = None
        if requests:
            content = requests[0].content
            model = from_array(take_record(content, MODEL, ArrayRecord)[PARAMETERS]).clone()

        def through(arriving: Iterator[Message]) -> Iterator[Message]:
            for message in arriving:
                if keep:
                    _write_down(message, round_, replies, wire)
                yield message

        gathering = collect.gather(requests, round_)
        sum_: Aggregate
        try:
            sent = next(gathering)
            while True:
                sent = gathering.send(through((yield sent)))
        except StopIteration as end:
            sum_ = end.value
        if model is None:  # an empty cohort: nothing was sent
            model = heard[-1].model if heard else sum_.total.new_zeros(round_.size)
        asked = tuple(message.metadata.dst_node_id - FIRST_NODE for message in requests)
        total = sum_.total.clone()
        heard.append(Heard(round_.number, model, replies, wire, total, sum_.replies, asked))
        return sum_

    object.__setattr__(listening, "gather", gather)
    return listening


def _write_down(
    message: Message, round_: RoundSpec, replies: dict[int, Tensor], wire: dict[int, bytes]
) -> None:
    node = message.metadata.src_node_id - FIRST_NODE
    if message.has_error():
        return
    content = message.content
    parts = [
        bytes(array.data)
        for record in records_of(content, ArrayRecord)
        for array in record.values()
    ]
    parts += [
        value if isinstance(value, bytes) else repr((name, value)).encode()
        for record in records_of(content, ConfigRecord)
        for name, value in record.items()
    ]
    wire[node] = wire.get(node, b"") + b"".join(parts)
    try:
        replies[node] = read_update(message, round_)[0].double().clone()
    except ValueError:
        return  # another trip's message, or a masked vector: nothing that can be read
