"""A coordinator that lies, played on somebody's own app: is it refused, or does it get something?

other options   all nodes but one are told that their update is to be nothing: the sum of many
                would be the update of one
asked twice     a round is asked for once more, without one node: two sums whose difference is its
                update; or a second draw of a node's own noise, to be averaged
beside          what nodes answer besides updates: evaluations, metrics, counts, statistics
errors          an exception of the app with a record in its text
exact numbers   two worlds that differ in one node: whatever is the same in two runs of a world and
                other in the other world has no noise on it; so has noise whose size tells

A lie that goes through `leaks`, one that is not gone along with was `refused`; where the lie was
answered and nothing was learned the promise `holds`.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.clientapp import ClientApp

from umbel.benchmarks.attack.canaries import (
    aside,
    canary_federation,
    honest_stack,
    norm_of,
    one_round,
)
from umbel.benchmarks.attack.tasks import LENGTH
from umbel.benchmarks.attack.verdicts import Outcome, Verdict, not_tested
from umbel.benchmarks.attack.views import Attackable, Played, play
from umbel.clients.trainers.base import Options, promising
from umbel.core.contents import records_of
from umbel.core.errors import UmbelError
from umbel.privacy.attacks.promises import deviation_ceiling
from umbel.strategies.collect import Exchange, Gather, RoundSpec, Seals

NODES, SPARE = 10, 2000
VICTIM = 4
SECRET = "patient 4711"
PUBLIC = ("num-examples", "example-epsilon")
"""Beside hidden records: how many a node has is public, and so is what they have spent."""
TIMES = ("seconds", "phases", "bytes_up", "bytes_down", "time", "memory")
DEVIATIONS = 6.0
"""Standard errors by which two sizes of noise must differ to be called so: 1e-8 both ways."""


def tell(federation: Attackable, options: Options, nodes: int = NODES) -> list[Verdict]:
    """Every lie that an app promises anything against.

    Args:
        federation: the app's own.
        options: changes to its options.
        nodes: of the app; at most `NODES` of them take part.
    """
    try:
        stack = honest_stack(federation, options)
    except UmbelError as error:
        return [_refused("any", str(error))]
    few = min(nodes, NODES)
    masked = isinstance(stack.collect, Seals)
    alone = not masked and any(getattr(layer, "participations", 0) for layer in stack.layers)
    complete = federation.complete(options)
    records = promising(federation.trainer_for(complete), complete) is not None
    hidden = masked or alone or records
    lies: list[tuple[bool, str, Callable[[], Verdict]]] = [
        (masked, "other options", lambda: other_options(federation, options)),
        (masked or alone, "asked twice", lambda: asked_twice(federation, options)),
        (hidden, "beside", lambda: beside(federation, options, few)),
        (hidden, "errors", lambda: errors(federation, options, few)),
        (stack.private, "exact numbers", lambda: exact_numbers(federation, options)),
    ]
    return [_told_to(what, lie) for applies, what, lie in lies if applies]


def _told_to(what: str, lie: Callable[[], Verdict]) -> Verdict:
    try:
        return lie()
    except UmbelError as error:
        if what == "beside":  # nothing was asked for that could have been refused
            return not_tested(f"lie: {what}", "server", " ".join(str(error).split()))
        return _refused(what, str(error))


def _refused(what: str, why: str) -> Verdict:
    return Verdict(f"lie: {what}", "server", "refused", " ".join(why.split()), false_alarm=None)


def _verdict(what: str, leaks: bool, words: str) -> Verdict:
    outcome: Outcome = "leaks" if leaks else "holds"
    return Verdict(f"lie: {what}", "server", outcome, words, false_alarm=None)


def other_options(federation: Attackable, options: Options) -> Verdict:
    """Tell one node's neighbours that their updates are to be nothing."""
    norm = norm_of(federation, options)
    changed, given = canary_federation(
        federation, options, np.ones(NODES, dtype=bool), spare=SPARE, option=True
    )
    played = play(changed, NODES, given, around=lambda app: _Told(app, _silenced))
    if not played.heard or not played.heard[0].count:
        return _refused("other options", _reasons(played))
    change = played.final.double().numpy() * NODES
    others = np.delete(change, VICTIM)
    leaks = bool(np.abs(others).max() < norm / 100) and change[VICTIM] > norm / 4
    words = f"{played.heard[0].count} nodes with different options were added up"
    return _verdict("other options", leaks, words + (": the sum is one's update" if leaks else ""))


def _silenced(context: Context) -> Context:
    if context.node_config.get("partition-id") == VICTIM:
        return context
    told = {**context.run_config, LENGTH: 0.0}
    return Context(context.run_id, context.node_id, context.node_config, context.state, told)


class _Told(ClientApp):
    """Nodes whose coordinator tells each what it likes."""

    def __init__(self, app: ClientApp, change: Callable[[Context], Context]) -> None:
        super().__init__()
        self.app, self.change = app, change

    def __call__(self, message: Message, context: Context) -> Message:
        return self.app(message, self.change(context))


def asked_twice(federation: Attackable, options: Options) -> Verdict:
    """Ask for the same round again, of all nodes but the last."""
    changed, given = canary_federation(federation, options, np.ones(NODES, dtype=bool), spare=SPARE)
    said: list[str] = []
    played = play(changed, NODES, given, asking=lambda collect: _again(collect, said))
    if len(played.heard) < 2 or not played.heard[1].count:
        return _refused(
            "asked twice", "; ".join(dict.fromkeys(filter(None, said))) or _reasons(played)
        )
    first, second = played.heard[0].replies, played.heard[1].replies
    if second:
        fresh = [node for node, reply in second.items() if not reply.equal(first[node])]
        words = f"{len(fresh)} of {len(second)} nodes answered a round twice with fresh noise"
        return _verdict("asked twice", bool(fresh), words)
    words = f"a round was added up twice, of {played.heard[0].count} nodes and of "
    return _verdict("asked twice", True, words + f"{played.heard[1].count} of them")


def _again(collect: Exchange, said: list[str]) -> Exchange:
    """The collect, which asks for everything twice; what nodes said the second time is kept."""
    greedy = copy.copy(collect)

    def gather(requests: Sequence[Message], round_: RoundSpec) -> Gather:
        again = [
            Message(
                content=message.content,
                dst_node_id=message.metadata.dst_node_id,
                message_type=message.metadata.message_type,
                group_id=message.metadata.group_id,
            )
            for message in requests[:-1]
        ]
        sum_ = yield from collect.gather(requests, round_)
        second = yield from collect.gather(again, round_)
        said.extend([*(one.reason for one in second.rejected), second.aborted])
        return sum_

    object.__setattr__(greedy, "gather", gather)
    return greedy


def beside(federation: Attackable, options: Options, nodes: int = NODES) -> Verdict:
    """Listen to one real round and evaluation for anything that is not a protected update."""
    complete = federation.complete(options)
    records = promising(federation.trainer_for(complete), complete) is not None
    listening: list[_Listening] = []

    def around(app: ClientApp) -> ClientApp:
        listening.append(_Listening(app))
        return listening[-1]

    own: Any = replace(federation, **aside(federation))
    given = {**one_round(federation, options, 0), "client-eval-every": 1}
    play(own, nodes, given, around=around)
    heard = sorted({name for one in listening for name in one.names})
    told = [name for name in heard if not (records and name.rpartition(": ")[2] in PUBLIC)]
    words = f"nodes told {', '.join(told)} in the clear" if told else "nothing but updates"
    return _verdict("beside", bool(told), words)


class _Listening(ClientApp):
    """Notes the names of all numbers that nodes send beside updates and their protocol."""

    def __init__(self, app: ClientApp) -> None:
        super().__init__()
        self.app = app
        self.names: set[str] = set()

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.app(message, context)
        kind = message.metadata.message_type
        if not reply.has_error() and not kind.startswith("query"):
            self.names |= set(self._numbers(kind, reply))
        return reply

    def _numbers(self, kind: str, reply: Message) -> Iterator[str]:
        for record in records_of(reply.content, MetricRecord):
            yield from (f"{kind}: {name}" for name, value in record.items() if value)
        for arrays in records_of(reply.content, ArrayRecord):
            yield from (f"{kind}: {name}" for name in arrays if name == "buffers")
        for config in records_of(reply.content, ConfigRecord):
            numbers = (int, float)
            yield from (
                f"{kind}: {name}"
                for name, value in config.items()
                if isinstance(value, numbers) and name in ("num-examples", "loss", "accuracy")
            )


class _Failing:
    """The app's trainer, which fails on a record and says which."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def train(self, *given: Any) -> Any:  # noqa: ARG002
        raise ValueError(f"cannot read {SECRET}")

    def __getattr__(self, name: str) -> Any:
        if name in ("train_cohort", "group_size", "bundles"):
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)


def errors(federation: Attackable, options: Options, nodes: int = NODES) -> Verdict:
    """Let the app fail, and see what its error tells."""
    trainer = federation.trainer_for(federation.complete(options))
    failing = {**aside(federation), "trainer": _Failing(trainer)}
    own: Any = replace(federation, **failing)
    try:
        said = _reasons(play(own, nodes, one_round(federation, options, 0)))
    except UmbelError as error:
        said = str(error)
    leaks = SECRET in said
    words = "the text of an exception travelled" if leaks else "no text of an exception travelled"
    return _verdict("errors", leaks, words)


def exact_numbers(federation: Attackable, options: Options) -> Verdict:
    """Whether anything that is released tells two worlds apart with certainty."""
    names = tuple(
        name
        for layer in honest_stack(federation, options).layers
        for name in getattr(layer, "limits", ())
    )
    worlds = []
    for secret in (False, True):
        coins = np.zeros(NODES, dtype=bool)
        coins[VICTIM] = secret
        changed, given = canary_federation(
            federation, options, coins, spare=SPARE, weight=1000, metrics=names
        )
        worlds.append([play(changed, NODES, given) for _ in range(2)])
    told = _told(worlds)
    if told:
        return _verdict("exact numbers", True, f"{', '.join(told)} had no noise on it")
    sizes = [
        deviation_ceiling(one.final.double().numpy(), two.final.double().numpy(), 0.5)
        for one, two in worlds
    ]
    if min(sizes) == 0:
        why = "two runs of a world released the same model"
        return not_tested("lie: exact numbers", "model-user", why)
    error = DEVIATIONS / math.sqrt(NODES + SPARE)
    leaks = abs(math.log(sizes[1] / sizes[0])) > error
    words = "what was released looks alike whether a node took part or not"
    if leaks:
        words = f"the noise is {sizes[1] / sizes[0]:.3g} times as large where one node took part"
    return _verdict("exact numbers", leaks, words)


def _told(worlds: Sequence[Sequence[Played]]) -> list[str]:
    """Names of numbers of a round's line that are the same in a world and other in another."""
    lines = [[_leaves(run.lines[-1]) for run in world] for world in worlds]
    return [
        name
        for name, value in lines[0][0].items()
        if all(line.get(name) == value for line in lines[0])
        and len({line.get(name) for line in lines[1]}) == 1
        and lines[1][0].get(name) != value
    ]


def _leaves(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            inner: leaf
            for key, part in value.items()
            if key not in TIMES
            for inner, leaf in _leaves(part, f"{name}.{key}" if name else str(key)).items()
        }
    return {name: value} if isinstance(value, int | float) and name else {}


def _reasons(played: Played) -> str:
    said = [
        str(one.get("reason", one)) if isinstance(one, Mapping) else str(one)
        for line in played.lines
        for one in line.get("failed", ())
    ]
    return "; ".join(dict.fromkeys(said)) or "no update was used, and nobody said why"
