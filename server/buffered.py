"""Asynchronous rounds: nobody waits for the slow.

    so many nodes are at work at any time; whoever answers is followed by another
    a round ends after so many good replies, with one step of the server's optimiser
    a reply to an older model counts for less, by how many rounds it is behind

All else is as in other rounds, and shared with them: lines, evaluation, checkpoints, the stack.
This is FedBuff (Nguyen et al. 2022, https://arxiv.org/abs/2106.06639, algorithm 1); with a buffer
of one it is FedAsync (Xie et al. 2019, https://arxiv.org/abs/1903.03934, algorithm 1), whose mixing
weight is the option `server-learning-rate`.

What is in a round depends on the order of arrival, and so do its bits. A coordinator that is killed
forgets the replies of the round that had not ended: their nodes are asked again, so that none of
their updates is in the model twice.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from flwr.app import Message

from umbel.core.names import NO_REPLY
from umbel.server.checkpoint import Position
from umbel.server.collecting import Collected, Collector
from umbel.server.drive import ROUND_TTL, Phases, drive, mailbox
from umbel.server.parts import RunParts
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.aggregator import Rejected
from umbel.strategies.samplers import FixedSize
from umbel.strategies.transform import Facts


def counting_on_a_buffer(job: TrainingSpec, nodes: int) -> TrainingSpec:
    """The job whose rounds have, as far as facts go, the nodes that each ends after."""
    return replace(job, sampler=FixedSize(min(job.asynchronous.async_buffer, nodes)))


class BufferedCollector(Collector):
    """Keeps nodes at work, and collects whoever answers until the buffer is full.

    Args:
        parts: of the run; `parts.job.asynchronous` says how.
    """

    def __init__(self, parts: RunParts) -> None:
        super().__init__(parts)
        self._how = parts.job.asynchronous
        self._box = mailbox(parts.grid, None)
        self._asked: dict[int, int] = {}
        """The round for which a node that is at work was asked, by node id."""
        self._heard: set[int] = set()
        self._behind: list[int] = []
        self._late: list[Rejected] = []
        self._factors: dict[int, float] = {}
        """Of the present round: who has answered, by how many rounds the replies are behind, whose
        were too far behind, and what each update counts for."""

    def close(self) -> None:
        """Whoever is still at work is not waited for."""
        self._box.cancel()

    def collect(self, position: Position, number: int, before: Facts, phases: Phases) -> Collected:
        """Ask on until so many good replies have come; arguments are those of `Collector`."""
        parts = self.parts
        with phases("sample"):
            nodes = parts.population.present
            requests = parts.requests.to_train(position, number, nodes, before)
            size = parts.requests.size_of(requests[:1])
        facts = parts.job.stack.check(before, position.layers)
        self._heard, self._behind, self._late, self._factors = set(), [], [], {}
        at_work = len(self._asked)
        packing = parts.job.stack.packing(before, position.layers)
        spec = self.spec(number, facts, packing, self._factors)
        gathering = parts.job.stack.collect.gather(requests, spec)
        with phases("train"):
            sum_ = drive(gathering, lambda messages: self._replies(messages, phases))
        sent = len(self._asked) + len(self._heard) - at_work
        rejected = [each for each in sum_.rejected if each.reason != NO_REPLY]
        return Collected(
            cohort=[node for node in nodes if node.node_id in self._heard],
            facts=facts,
            sum_=replace(sum_, rejected=(*rejected, *self._late)),
            bytes_down=sent * size,
            said={"staleness": float(np.mean(self._behind))} if self._behind else {},
        )

    def _replies(self, messages: Sequence[Message], phases: Phases) -> Iterator[Message]:
        """Good replies until the buffer is full, and errors between them."""
        if not messages:
            return
        number = int(messages[0].metadata.group_id)
        seed = [self.parts.job.options.seed, number, 7]
        order = np.random.default_rng(seed).permutation(len(messages))
        following = iter([messages[i] for i in order])
        self._send(following)
        for reply in self._box:
            node = reply.metadata.src_node_id
            behind = number - self._asked.pop(node, number)
            self._heard.add(node)
            good = not reply.has_error()
            if good and self._how.async_limit and behind > self._how.async_limit:
                said = f"an update {behind} rounds behind; async-limit is {self._how.async_limit}"
                self._late.append(Rejected(node, said))
                self._send(following)
                continue
            if good:
                self._behind.append(behind)
                self._factors[node] = self._how.factor(behind)
            full = len(self._behind) >= self._how.async_buffer
            if not full:
                self._send(following)
            self.parts.progress.message_done(len(self._behind), self._how.async_buffer)
            self.hear(reply)
            with phases("aggregate", within="train"):
                yield reply
            del reply  # while the next is awaited, this one must not take room
            if full:
                return

    def _send(self, following: Iterator[Message]) -> None:
        """Ask further nodes until enough are at work; each once for a round."""
        while len(self._asked) < self._how.at_once:
            request = next(following, None)
            if request is None:
                return
            node = request.metadata.dst_node_id
            if node in self._asked or node in self._heard:
                continue
            group = request.metadata.group_id
            self._asked[node] = int(group)
            ttl = self.parts.job.options.round_timeout or ROUND_TTL
            self._box.send([Message(request.content, node, "train", ttl=ttl, group_id=group)])
