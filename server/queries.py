"""Private means asked over a grid, and cohorts of virtual nodes asked as pools.

    ask -> gather -> charge -> decode -> what is public from now on

On the embedded engine, where virtual nodes share a few processes, an app whose nodes have one
example each is asked by process and not by node (`umbel.strategies.private.pooled`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from flwr.app import Array, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from umbel.core.errors import RunError
from umbel.core.names import ASK, CONFIG, MEMBERS, MODEL, POOL, PUBLIC, QUESTION
from umbel.core.records import record_of, to_array
from umbel.server.drive import ROUND_TTL, drive, stream
from umbel.server.privacy_gate import PrivacyGate
from umbel.server.roster import NodeRef
from umbel.strategies.aggregator import RoundSpec
from umbel.strategies.transform import Facts, RoundContext

if TYPE_CHECKING:
    from umbel.strategies.private.private_mean import PrivateMean


def public_arrays(public: Mapping[str, Tensor]) -> dict[str, Array]:
    """What questions have released, as it travels beside the model."""
    return {PUBLIC + name: to_array(value) for name, value in public.items()}


def pool_requests(
    model: Mapping[str, Array], config: ConfigRecord, cohort: Sequence[NodeRef], processes: int
) -> list[Message]:
    """One request for each process that has part of the cohort, each about as many nodes."""
    requests = []
    for i in range(processes):
        part = cohort[i * len(cohort) // processes : (i + 1) * len(cohort) // processes]
        if part:
            members = torch.tensor([node.partition for node in part])
            record = record_of({**model, MEMBERS: to_array(members)})
            content = RecordDict({MODEL: record, CONFIG: config})
            group = str(config.get("round", 0))
            first, kind = part[0].node_id, f"query.{POOL}"
            requests.append(Message(content, first, kind, ttl=ROUND_TTL, group_id=group))
    return requests


@dataclass(frozen=True)
class QueryRunner:
    """Asks private means of a population.

    Attributes:
        grid: the engine.
        nodes: everyone.
        guard: pays for the answers.
        processes: ask by process, if above 0.
        timeout: seconds to wait for the answers.
    """

    grid: Grid
    nodes: Sequence[NodeRef]
    guard: PrivacyGate
    processes: int
    timeout: float | None

    def ask(
        self, question: PrivateMean, public: Mapping[str, Tensor], number: int, digest: str
    ) -> dict[str, Tensor]:
        """What is released, by name; charged before it is known.

        Raises:
            RunError: no node could answer.
        """
        stack, everyone = question.stack, float(len(self.nodes))
        states = stack.init(question.size)
        before = Facts(
            size=question.size,
            round=number,
            expected_replies=everyone,
            max_replies=len(self.nodes),
        )
        facts = stack.check(before, states)
        config = ConfigRecord({"round": number, "manifest": digest, QUESTION: question.name})
        for name, value in stack.publish(states, before).items():
            config[name] = value
        round_ = RoundSpec(
            number=number,
            size=question.size,
            dtype=torch.float32,
            cohort=everyone,
            facts=facts,
            run_id=self.grid.run.run_id,
        )
        requests = self._requests(public, config)
        sum_ = drive(
            stack.collect.gather(requests, round_),
            lambda messages: stream(self.grid, messages, self.timeout),
        )
        if sum_.replies == 0 and sum_.rejected:
            raise RunError(
                f"no node could answer the private mean {question.name!r}; one said: "
                f"{sum_.rejected[0].reason}"
            )
        self.guard.release(question.name, question.claims(number))
        rnd = RoundContext(
            number=number,
            cohort=everyone,
            replies=sum_.replies,
            weight=sum_.weight,
            facts=facts,
            generator=torch.Generator().manual_seed(number),
        )
        mean, _, _ = stack.decode(sum_, states, rnd, before)
        assert mean is not None  # its denominator is the population
        return question.answer(mean, public)

    def _requests(self, public: Mapping[str, Tensor], config: ConfigRecord) -> list[Message]:
        model = public_arrays(public)
        if self.processes:
            return pool_requests(model, config, self.nodes, self.processes)
        content = RecordDict({MODEL: record_of(model), CONFIG: config})
        return [Message(content, node.node_id, f"query.{ASK}") for node in self.nodes]
