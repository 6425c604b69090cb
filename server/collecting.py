"""What a round collects: a cohort is asked, and its replies become one sum."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flwr.app import Message

from umbel.server.checkpoint import Position
from umbel.server.drive import Phases, drive, stream
from umbel.server.parts import RunParts
from umbel.server.roster import NodeRef
from umbel.strategies.aggregator import Aggregate, RoundSpec
from umbel.strategies.payload import Packing
from umbel.strategies.transform import Facts


@dataclass
class Collected:
    """What came of the messages of a round.

    Attributes:
        cohort: the nodes whose replies the round counts on.
        facts: at the bottom of the stack.
        sum_: of the replies.
        bytes_down: size of what was sent.
        said: what is to be written down of the round, by name.
    """

    cohort: Sequence[NodeRef]
    facts: Facts
    sum_: Aggregate
    bytes_down: int
    said: Mapping[str, float] = field(default_factory=dict)


class Collector:
    """Asks a cohort each round and waits for its replies; closed when no more rounds run.

    Args:
        parts: of the run.
    """

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts

    def close(self) -> None:
        """Nothing more is collected."""

    def collect(self, position: Position, number: int, before: Facts, phases: Phases) -> Collected:
        """Ask a cohort, and wait for its replies.

        Args:
            position: before the round.
            number: the round.
            before: facts of an update before the stack.
            phases: the clock of the round.

        Raises:
            BudgetSpentError: another run about the same people was faster.
        """
        parts = self.parts
        with phases("sample"):
            parts.checkpoints.begin_round(number)
            cohort = parts.population.choose(position, number)
            requests = parts.requests.to_train(position, number, cohort, before)
            bytes_down = parts.requests.size_of(requests)
        facts = parts.job.stack.check(before, position.layers)
        packing = parts.job.stack.packing(before, position.layers)
        spec = self.spec(number, facts, packing)
        gathering = parts.job.stack.collect.gather(requests, spec)
        del requests  # with them goes the model that was sent, once all have answered
        with phases("train"):
            sum_ = drive(gathering, lambda messages: self._replies(messages, phases))
        return Collected(cohort, facts, sum_, bytes_down)

    def spec(
        self,
        number: int,
        facts: Facts,
        packing: Packing | None,
        factors: Mapping[int, float] | None = None,
    ) -> RoundSpec:
        """What an exchange needs to know of round `number`; arguments as of `RoundSpec`."""
        parts = self.parts
        return RoundSpec(
            number=number,
            size=facts.size,
            dtype=parts.manifest.dtype,
            cohort=parts.population.facts.expected_replies,
            facts=facts,
            buffers=parts.synced_buffers.size,
            run_id=parts.grid.run.run_id,
            contract=parts.job.contract,
            packing=packing,
            factors={} if factors is None else factors,
        )

    def hear(self, reply: Message) -> None:
        """Take down what a node says beside its update."""
        self.parts.statements.hear(reply)
        self.parts.population.hear(reply)

    def _replies(self, messages: Sequence[Message], phases: Phases) -> Iterator[Message]:
        """The grid's replies; the time that the collect spends between them is aggregation."""
        parts, done = self.parts, 0
        timeout = parts.job.options.round_timeout or None
        for reply in stream(parts.grid, messages, timeout):  # `enumerate` would hold each
            done += 1  # noqa: SIM113
            parts.progress.message_done(done, len(messages))
            self.hear(reply)
            with phases("aggregate", within="train"):
                yield reply
            del reply  # while the next is awaited, this one must not take room
