"""Who can take part, who does, and what of them is known: the nodes of one run."""

import math
from collections.abc import Mapping, Sequence

from flwr.app import Message
from flwr.serverapp import Grid

from umbel.server.base_grid import BaseGrid
from umbel.server.checkpoint import Position
from umbel.server.failures import Failures
from umbel.server.output.progress import Progress
from umbel.server.roster import NodeRef, newcomers
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.collect import numbers
from umbel.strategies.samplers import (
    Sampler,
    SamplingContext,
    check_bounds,
    choose,
    looks_back,
    remember,
)
from umbel.strategies.transform import Facts


class Population:
    """The nodes of a run, from which a sampler chooses.

    Args:
        job: what is trained.
        grid: the engine.
        nodes: everyone who was there when the run began, in a fixed order.
        sampler: who takes part in a round.
        size: coordinates of an update before the stack.
        progress: where a person watches.

    Attributes:
        nodes: everyone.
        facts: of an update before the stack, as far as they follow from how many nodes there are.
        failures: what nodes failed of, by name.
    """

    def __init__(
        self,
        job: TrainingSpec,
        grid: Grid,
        nodes: Sequence[NodeRef],
        sampler: Sampler,
        size: int,
        progress: Progress,
    ) -> None:
        self._job, self._grid, self._sampler = job, grid, sampler
        self._size, self._progress = size, progress
        self.failures = Failures({node.node_id: node.name for node in nodes}, progress)
        self._next_time: set[int] = set()
        self._measured: dict[str, Mapping[str, float]] = {}
        hidden = bool(job.quiet) or job.stack.private  # a choice that followed it would show it
        self._looks_back = looks_back(sampler)
        self._listens = self._looks_back and not hidden
        self._take(nodes)

    def _take(self, nodes: Sequence[NodeRef]) -> None:
        self.nodes = nodes
        expected, most = check_bounds(self._sampler, len(nodes))
        self.facts = Facts(
            size=self._size,
            expected_replies=expected,
            max_replies=most,
            population=len(nodes),
        )

    def welcome(self) -> bool:
        """Let nodes take part that have come since the run began; whether there are any.

        Not in a private run: what it promises was worked out for the nodes that were there.
        """
        new = newcomers(self._grid, self.nodes)
        if not new:
            return False
        if self._job.stack.private:
            for node in new:
                if node.node_id not in self._next_time:
                    self._progress.note(
                        f"node {node.name} has come after this run began; it takes part from the "
                        f"next run on, because the privacy of this one counts on {len(self.nodes)} "
                        "nodes"
                    )
            self._next_time |= {node.node_id for node in new}
            return False
        everyone = sorted([*self.nodes, *new], key=lambda node: (node.partition, node.name))
        self._take(everyone)
        self.failures.names.update({node.node_id: node.name for node in new})
        names = ", ".join(node.name for node in new)
        self._progress.note(f"joined the run: {names}; there are {len(everyone)} nodes now")
        return True

    def choose(self, position: Position, number: int) -> list[NodeRef]:
        """The nodes of round `number`, which the budget has let in.

        Raises:
            BudgetSpentError: another run was faster.
        """
        guard = self._job.guard
        entropy = [self._job.options.seed, number, 1] if guard.seeded else None
        nodes = guard.eligible(number, self.nodes)
        ctx = SamplingContext(number, entropy, position.history)
        cohort = self._without_gone(choose(self._sampler, nodes, ctx))
        guard.open(number, cohort)
        self._measured = {}
        return cohort

    @property
    def present(self) -> list[NodeRef]:
        """Everyone who can be asked."""
        return self._without_gone(self.nodes)

    def _without_gone(self, nodes: Sequence[NodeRef]) -> list[NodeRef]:
        """Without those that were shut out since the run began.

        They are drawn all the same: the sampling rate is of the population that was planned for.
        """
        gone = self._grid.gone() if isinstance(self._grid, BaseGrid) else set()
        return [node for node in nodes if node.node_id not in gone]

    def least(self, asked: int) -> int:
        """The fewest replies that stand for a round: half of those that are waited for."""
        share = self._grid.enough if isinstance(self._grid, BaseGrid) else 1.0
        return self._job.options.min_replies or max(1, math.ceil(share * asked / 2))

    # ---- what a sampler may look back at

    def hear(self, reply: Message) -> None:
        """Take down what a node says that it measured."""
        if self._listens and not reply.has_error():
            node = reply.metadata.src_node_id
            self._measured[self.failures.names.get(node, str(node))] = numbers(reply)

    def remember(self, position: Position, number: int, cohort: Sequence[NodeRef]) -> Position:
        """The position with round `number` in the nodes' history, where a sampler looks at it."""
        if not self._looks_back:
            return position
        history = remember(position.history, number, cohort, self._measured)
        return position.replace(history=history)
