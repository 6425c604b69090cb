"""From the sum of a round to the next model: decode, step the optimiser, mix in the buffers.

A round that has not enough to go on leaves the model as it was, and some of them in a row end the
run.
"""

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from umbel.core.errors import RunError
from umbel.server.checkpoint import Position
from umbel.server.failures import Failures
from umbel.server.output.progress import Progress
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.collect import NO_REPLY, Aggregate
from umbel.strategies.optimizers import ServerOptimizer, advance
from umbel.strategies.transform import Facts, RoundContext

PATIENCE_WITHOUT_REPLIES = 3
"""Rounds in a row without enough replies after which a run gives up."""


class Release:
    """Makes the next model of what was collected.

    Args:
        job: what is trained.
        optimizer: of the server.
        share: lays a new model where it is sent from.
        failures: what nodes failed of.
        progress: where a person watches.
        log: the run's log, which errors name.
    """

    def __init__(
        self,
        job: TrainingSpec,
        optimizer: ServerOptimizer,
        share: Callable[[Tensor], Tensor],
        failures: Failures,
        progress: Progress,
        log: Path,
    ) -> None:
        self._job, self._optimizer, self._share = job, optimizer, share
        self._failures, self._progress, self._log = failures, progress, log

    def apply(
        self,
        position: Position,
        number: int,
        entering: Facts,
        facts: Facts,
        sum_: Aggregate,
        least: int,
    ) -> tuple[Position, dict[str, float]]:
        """The position after round `number`, and what the stack says of it.

        Args:
            position: before it.
            number: the round.
            entering: facts of an update before the stack; `facts` are those at its bottom.
            facts: see there.
            sum_: what was collected.
            least: the fewest replies that stand for a round.

        Raises:
            RunError: the model stopped being finite, or there were not enough replies too often.
        """
        job = self._job
        if (sum_.replies < least and job.guard.seeded) or sum_.aborted:
            return self._abandon(position, number, sum_, least), {}
        rnd = RoundContext(
            number=number,
            cohort=entering.expected_replies,
            replies=sum_.replies,
            weight=sum_.weight,
            facts=facts,
            generator=torch.Generator().manual_seed(job.options.seed * 1_000_003 + number),
            learning_rate=job.options.rate_in(number, job.learning_rate) or 0.0,
        )
        average, layers, metrics = job.stack.decode(sum_, position.layers, rnd, entering)
        failed_rounds = 0 if job.guard.seeded else position.failed_rounds
        after = position.replace(round=number, layers=layers, failed_rounds=failed_rounds)
        if average is None:
            return after, metrics
        parameters, slots = advance(self._optimizer, position.parameters, average, position.slots)
        del average
        # A sum that is finite has no term that is not; it costs a tenth of looking at each.
        if not (math.isfinite(parameters.sum()) or bool(torch.isfinite(parameters).all())):
            raise RunError(
                f"the model stopped being finite in round {number}; lower learning-rate or "
                "server-learning-rate"
            )
        after = after.replace(parameters=self._share(parameters), slots=slots)
        if sum_.buffers is not None:
            after = after.replace(buffers=sum_.buffers.to(position.buffers.dtype))
        return self._averaged(after), metrics

    def count_failures(
        self, position: Position, number: int, sum_: Aggregate, population: int
    ) -> Position:
        """Of a private run: how many rounds in a row all nodes that were asked have failed.

        Such a round releases noise and is paid like any other, since model users must not see
        who was asked. When all fail again and again there is nothing to protect and nothing to
        learn, so the run ends before it has spent its budget on noise.

        Raises:
            RunError: it has happened too often, or in the first round to every node there is.
        """
        if sum_.replies or not sum_.rejected or sum_.aborted:
            return position.replace(failed_rounds=position.failed_rounds if sum_.aborted else 0)
        after = position.replace(failed_rounds=position.failed_rounds + 1)
        everyone = position.round == 0 and len(sum_.rejected) >= population
        if after.failed_rounds >= PATIENCE_WITHOUT_REPLIES or everyone:
            raise RunError(
                f"round {number}: all {len(sum_.rejected)} nodes that were asked failed"
                f"{self._failures.first(sum_.rejected)}; the run ends before it spends its budget "
                f"on noise; the nodes' errors are in {self._log}"
            )
        return after

    def _abandon(self, position: Position, number: int, sum_: Aggregate, least: int) -> Position:
        """A round without enough replies leaves the model as it was."""
        if not sum_.replies and not sum_.rejected and not sum_.aborted:
            self._progress.note(
                f"round {number}: the draw chose no node; the model stays as it was"
            )
            return position.replace(round=number)
        first = self._failures.first(sum_.rejected)
        after = position.replace(round=number, failed_rounds=position.failed_rounds + 1)
        said = f"round {number}: {sum_.replies} of {least} needed replies could be used{first}"
        if sum_.aborted:
            said = f"round {number}: {sum_.aborted}{first}"
        answered = any(item.reason != NO_REPLY for item in sum_.rejected)
        nobody = answered and not sum_.aborted and not sum_.replies and position.round == 0
        if nobody or after.failed_rounds >= PATIENCE_WITHOUT_REPLIES:
            raise RunError(f"{said}; the run ends; the nodes' errors are in {self._log}")
        self._progress.note(f"{said}; the model stays as it was")
        return after

    def _averaged(self, position: Position) -> Position:
        """With its model in the mean of the last ones, from `average-from` on."""
        start = self._job.options.average_from
        if not start or position.round < start:
            return position
        count = position.averaged + 1
        before = position.delivered
        return position.replace(average=before.lerp(position.parameters, 1 / count), averaged=count)
