"""A secure sum among nodes of one process: to try it, to measure it, to attack it.

>>> import numpy as np
>>> values = {node: np.full(3, node, "<u4") for node in range(1, 7)}
>>> Rehearsal.of(values, bits=20).run().total.tolist()
[21, 21, 21]
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from umbel.privacy.masking import keys
from umbel.privacy.masking.masks import Words
from umbel.privacy.masking.session import Mode, Terms
from umbel.strategies.secure.checks import AbortedError
from umbel.strategies.secure.message import REFUSED, Plain
from umbel.strategies.secure.policy import Policy, RefusalError
from umbel.strategies.secure.protocol import Party, Released, advertise, respond, serve

STAGES = ("advertise", "share", "mask", "agree", "unmask")

Tamper = Callable[[str, int, Plain], Plain | None]
"""Stage, node and message to the message that arrives, or None for none."""


def honest(stage: str, node: int, message: Plain) -> Plain | None:  # noqa: ARG001
    """Every message arrives as it was sent."""
    return message


@dataclass
class LocalSession:
    """All parties of one session.

    Attributes:
        terms: of the session.
        key: of the server.
        nodes: by id.
        values: what each node brings, shape (size,).
        to_node, to_server: may change or drop any message on its way.
        memory: what each node keeps between messages.
        wire: every reply as its node sent it, by stage and node.
        seconds: of processor time, by the server, and by all nodes together.
        terms_of: terms that a node sees, where they differ.
    """

    terms: Terms
    key: keys.KeyPair
    nodes: Mapping[int, Party]
    values: Mapping[int, Words]
    to_node: Tamper = honest
    to_server: Tamper = honest
    memory: dict[int, Plain] = field(default_factory=dict)
    wire: dict[tuple[str, int], Plain] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: {"server": 0.0, "nodes": 0.0})
    terms_of: dict[int, Terms] = field(default_factory=dict)

    @staticmethod
    def of(
        values: Mapping[int, Words],
        bits: int = 20,
        mode: Mode = "malicious",
        min_cohort: int = 3,
        policy: Policy | None = None,
    ) -> "LocalSession":
        """A session for these values, with fresh identities."""
        size = len(next(iter(values.values())))
        fresh = keys.digest("nonce", keys.new_signing_key())[:16]
        key = keys.KeyPair.generate()
        terms = Terms(7, 1, fresh, bytes(32), bytes(32), bits, size, mode, min_cohort, key.public)
        chosen = policy or Policy()
        nodes = {
            node: Party(node, keys.signing_key(keys.new_signing_key()), policy=chosen)
            for node in values
        }
        return LocalSession(terms, key, nodes, values)

    def again(self, **changes: Any) -> "LocalSession":
        """The same nodes in another session."""
        terms = replace(self.terms, **changes)
        return LocalSession(terms, self.key, self.nodes, self.values)

    def run(self) -> Released:
        """Plays the session; AbortedError if the server gives up."""
        trips = serve(self.terms, list(self.nodes), self.key)
        replies: list[tuple[int, Plain]] | None = None
        for stage in (*STAGES, ""):
            start = time.thread_time()
            try:
                requests = next(trips) if replies is None else trips.send(iter(replies))
            except StopIteration as stop:
                released: Released = stop.value
                return released
            finally:
                self.seconds["server"] += time.thread_time() - start
            replies = [
                (node, arrived)
                for node, request in requests.items()
                if (arrived := self.exchange(stage, node, request)) is not None
            ]
        raise AssertionError("the protocol has another stage than it should")

    def expected(self, released: Released) -> list[int]:
        """What the total must be, by whole numbers of any length."""
        columns = zip(*(self.values[node].tolist() for node in released.included), strict=True)
        return [sum(column) % (1 << self.terms.bits) for column in columns]

    def refusals(self) -> dict[int, str]:
        """What nodes said when they would not go on."""
        return {node: str(r[REFUSED]) for (_, node), r in self.wire.items() if REFUSED in r}

    def requests_at(self, last: str) -> dict[int, Plain]:
        """Plays up to a stage, and gives the requests that the nodes would have got there."""
        seen: dict[int, Plain] = {}

        def catch(stage: str, node: int, message: Plain) -> Plain | None:
            if stage == last:
                seen[node] = message
                return None
            return message

        self.to_node = catch
        with suppress(AbortedError):
            self.run()
        return seen

    def exchange(self, stage: str, node: int, request: Plain) -> Plain | None:
        """One request to one node, and what arrives of the reply."""
        changed = self.to_node(stage, node, request)
        if changed is None:
            return None
        start = time.thread_time()
        reply = self._reply(stage, node, changed)
        self.seconds["nodes"] += time.thread_time() - start
        self.wire[stage, node] = reply
        return self.to_server(stage, node, reply)

    def _reply(self, stage: str, node: int, request: Plain) -> Plain:
        me = self.nodes[node]
        if stage == "advertise":
            terms = self.terms_of.get(node, self.terms)
            try:
                self.memory[node], reply = advertise(me, terms, self.values[node])
            except RefusalError as refusal:
                return {REFUSED: str(refusal)}
            return reply
        self.memory[node], reply = respond(me, stage, self.memory.get(node, {}), request)
        return reply
