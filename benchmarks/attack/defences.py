"""The defences that are compared, and ways to break them on purpose.

A defence builds the stack of a schedule: noise is calibrated to the rounds and the sampling of
the run that it protects. A fault changes what a stack does and leaves what it claims; an audit
that does not notice is worth nothing.
"""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from flwr.app import Message, RecordDict
from torch import Tensor

from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.errors import ConfigError
from umbel.privacy.budget.accounting import poisson, spent
from umbel.privacy.budget.calibrate import noise_multiplier
from umbel.privacy.budget.events import Charge
from umbel.strategies.collect import Exchange, Gather, PlainSum, RoundSpec
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.secure.distributed_skellam import DistributedSkellam
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, Metrics, NodeContext, Stateless, Transform


@dataclass(frozen=True)
class Schedule:
    """How a run samples its nodes, which is what its noise is calibrated to.

    Attributes:
        rounds: of the run.
        nodes: the enrolled population.
        cohort: expected nodes of a round.
        delta: of the claim.
        norm: that updates are clipped to.
    """

    rounds: int
    nodes: int
    cohort: float
    delta: float
    norm: float

    @property
    def rate(self) -> float:
        """The probability of a node to take part in a round."""
        return min(1.0, self.cohort / self.nodes)

    def options(self, sampling: str = "poisson") -> dict[str, Any]:
        """As options of a run."""
        given: dict[str, Any] = {"rounds": self.rounds, "delta": self.delta}
        if self.rate == 1:
            return {**given, "cohort": "all", "sampling": "all"}
        size = float(self.cohort)
        return {**given, "cohort": sampling, "sampling": sampling, "cohort-size": size}


PLANNED_SIZE = 1 << 17
"""Coordinates that distributed noise is planned for; smaller models cost a little less."""

Build = Callable[[Schedule], Stack]


@dataclass(frozen=True)
class Defence:
    """A row of the matrix.

    Attributes:
        name: in tables; unique.
        words: what it does, for somebody who does not know the field.
        build: the stack for a schedule.
        cohort: nodes of a round, where the defence fixes it; None leaves it to the task.
        example_epsilon: of DP-SGD inside every node; None is ordinary training.
        unit: whose presence it claims to hide.
        noise: who makes it.
        secure: whether the server sees sums only.
    """

    name: str
    words: str
    build: Build
    cohort: int | None = None
    example_epsilon: float | None = None
    unit: Literal["none", "client", "example"] = "none"
    noise: Literal["none", "nodes", "server"] = "none"
    secure: bool = False

    def trainer(self, plain: TorchTrainer, delta: float) -> Any:
        """The trainer as nodes use it under this defence."""
        if self.example_epsilon is None:
            return plain
        return PrivateSgd(trainer=plain, example_epsilon=self.example_epsilon, example_delta=delta)


def promised(stack: Stack, size: int, schedule: Schedule) -> dict[str, float]:
    """Epsilon that the stack's claims come to over a schedule, by adversary.

    For planning, and for stacks that a run does not account because they say that they are not
    private; where a run accounts, its own ledger is what counts.

    Args:
        stack: of the run.
        size: coordinates of an update.
        schedule: how many rounds, and who takes part.
    """
    cohort = schedule.cohort
    facts = Facts(size=size, round=1, expected_replies=cohort, max_replies=math.ceil(cohort))
    facts = stack.check(facts, stack.init(size))
    charges: dict[str, dict[Charge, int]] = {}
    for claim in stack.claims(facts):
        event = claim.event
        multiplier = getattr(event, "noise_multiplier", None)
        if claim.sampled and multiplier is not None:
            event = poisson(multiplier, schedule.rate)
        charge = Charge(event, claim.relation, claim.extra_delta)
        row = charges.setdefault(claim.against, {})
        row[charge] = row.get(charge, 0) + schedule.rounds
    return {who: spent(row, schedule.delta).epsilon for who, row in charges.items()}


# ---- the rows


def nothing(schedule: Schedule) -> Stack:  # noqa: ARG001
    """Updates as they are."""
    return Stack()


def clipped(schedule: Schedule) -> Stack:
    """Clipping alone."""
    return Stack([Clip(schedule.norm)], PlainSum(weighting="fixed"))


def local(epsilon: float, schedule: Schedule) -> Stack:
    """Noise on every node."""
    noise = LocalGaussian(epsilon, schedule.delta, schedule.rounds)
    return Stack([Clip(schedule.norm), noise], PlainSum(weighting="fixed"))


def central(epsilon: float, schedule: Schedule) -> Stack:
    """Noise at the server, for a budget over the whole run."""
    multiplier = _multiplier(epsilon, schedule.delta, schedule.rate, schedule.rounds)
    return with_noise(multiplier, schedule)


@functools.lru_cache(maxsize=32)
def _multiplier(epsilon: float, delta: float, rate: float, rounds: int) -> float:
    """Kept, because a scene builds the same stack for each of its rounds."""
    return noise_multiplier(epsilon, delta, rate, rounds)


def with_noise(multiplier: float, schedule: Schedule) -> Stack:
    """Noise at the server, by its multiplier."""
    return Stack([Clip(schedule.norm), Gaussian(multiplier)], PlainSum(weighting="fixed"))


def rows(central_epsilons: Sequence[float], local_epsilon: float) -> list[Defence]:
    """The rows that stand on a plain sum."""
    return [
        Defence("none", "Nodes send their updates as they are.", nothing),
        Defence(
            "clip",
            "Long updates are shortened. That keeps one node from dominating; it hides nothing.",
            clipped,
        ),
        Defence(
            f"local DP {local_epsilon:g}",
            f"Every node adds noise before anything leaves it (epsilon {local_epsilon:g} for a "
            "whole run). Nobody need be trusted, and the noise is large.",
            partial(local, local_epsilon),
            unit="client",
            noise="nodes",
        ),
        *(
            Defence(
                f"central DP {epsilon:g}",
                f"The server adds noise to each round's sum, for a total epsilon of {epsilon:g} "
                "against everybody who sees the models. The server itself is trusted.",
                partial(central, epsilon),
                unit="client",
                noise="server",
            )
            for epsilon in central_epsilons
        ),
    ]


def example_rows(epsilons: Sequence[float]) -> list[Defence]:
    """The rows in which every record of a node is hidden, and the node is not."""
    return [
        Defence(
            f"example DP {epsilon:g}",
            "Every node trains with noise on its own (DP-SGD), so that no single record shows in "
            f"what it sends: epsilon {epsilon:g} for the run. For hospitals, whose patients need "
            "protection while it is known that the hospital takes part.",
            nothing,
            example_epsilon=epsilon,
            unit="example",
            noise="nodes",
        )
        for epsilon in epsilons
    ]


def summed(schedule: Schedule) -> Stack:
    """Masked updates: the server sees their sum."""
    collect = SecureSum(min_cohort=min_cohort(schedule))
    return Stack([Clip(schedule.norm), Quantize(4096)], collect)


def distributed(epsilon: float, schedule: Schedule) -> Stack:
    """Masked updates with a share of the noise from every node.

    The server knows who takes part, so nothing is amplified: every round counts in full.
    """
    return _with_shares(_shared_multiplier(epsilon, schedule), schedule)


@functools.lru_cache(maxsize=32)
def _shared_multiplier(epsilon: float, schedule: Schedule) -> float:
    """Distributed noise for a budget: the central one's, and what rounding costs on top."""
    multiplier = noise_multiplier(epsilon, schedule.delta, 1.0, schedule.rounds)
    for _ in range(20):
        claimed = promised(_with_shares(multiplier, schedule), PLANNED_SIZE, schedule)["server"]
        if claimed <= epsilon:
            break
        multiplier *= max(1.002, math.sqrt(claimed / epsilon))
    return multiplier


def _with_shares(multiplier: float, schedule: Schedule) -> Stack:
    noise = DistributedSkellam(multiplier, min_cohort(schedule))
    layers: list[Transform[Any]] = [
        Clip(schedule.norm),
        Rotate(),
        Quantize(64, "stochastic"),
        noise,
    ]
    return Stack(layers, SecureSum(min_cohort=min_cohort(schedule), weighting="fixed"))


def min_cohort(schedule: Schedule) -> int:
    """The smallest sum that is opened: two thirds of the cohort."""
    return max(3, math.ceil(2 * schedule.cohort / 3))


def secure_rows(
    cohorts: Sequence[int], epsilons: Sequence[float], distributed_cohort: int
) -> list[Defence]:
    """The rows that stand on a secure sum."""
    return [
        *(
            Defence(
                f"secure sum of {cohort}",
                f"Nodes mask their updates so that the server learns the sum of {cohort} only. "
                "Nothing is added to that sum.",
                summed,
                cohort=cohort,
                secure=True,
            )
            for cohort in cohorts
        ),
        *(
            Defence(
                f"secure sum + DP {epsilon:g}",
                "Nodes mask their updates, and each adds a share of the noise first. The sum that "
                f"the server learns is protected already: epsilon {epsilon:g} over the whole run "
                "against everybody, the server included.",
                partial(distributed, epsilon),
                cohort=distributed_cohort,
                unit="client",
                noise="nodes",
                secure=True,
            )
            for epsilon in epsilons
        ),
    ]


# ---- faults


@dataclass(frozen=True)
class Liar:
    """A layer that does what `acts` does and claims what `says` claims.

    Attributes:
        acts: encodes and decodes.
        says: everything else.
        part: of the noise, where a plan decides it later.
    """

    acts: Transform[Any]
    says: Transform[Any]
    part: float = 1.0

    def with_noise(self, noise_multiplier: float) -> "Liar":
        """Once a plan has decided the noise: `part` of it, under a claim of all of it."""
        acts: Any = self.acts
        says: Any = self.says
        return replace(
            self,
            acts=acts.with_noise(noise_multiplier * self.part),
            says=says.with_noise(noise_multiplier),
        )

    def __getattr__(self, name: str) -> Any:
        source = "acts" if name in ("encode", "decode") else "says"
        return getattr(object.__getattribute__(self, source), name)


def quarter_noise(stack: Stack) -> Stack:
    """The noise has a quarter of the standard deviation that is claimed."""
    layers: list[Transform[Any]] = []
    for layer in stack.layers:
        if not isinstance(layer, Gaussian):
            layers.append(layer)
        elif layer.noise_multiplier is None:
            layers.append(Liar(layer, layer, part=0.25))
        else:
            layers.append(Liar(layer.with_noise(layer.noise_multiplier / 4), layer))
    return _changed(stack, layers, stack.collect, "noise")


def skip_clip(stack: Stack) -> Stack:
    """Nodes do not clip, and the server does not measure what arrives."""
    layers: list[Transform[Any]] = [
        Liar(_Nothing(layer.name), layer) if isinstance(layer, Clip) else layer
        for layer in stack.layers
    ]
    return _changed(stack, layers, _unmeasured(stack.collect), "clip")


def unbounded_weights(stack: Stack) -> Stack:
    """Updates count as often as their sender says, under a claim that they count once.

    That takes two mistakes: numbers of examples travel in the clear, and are used.
    """
    if not isinstance(stack.collect, PlainSum):
        raise ConfigError("weights can only be left unbounded in a plain sum")
    honest = stack.collect
    weighted = replace(honest, weighting="examples")
    faulty = copy.copy(weighted)

    def gather(requests: Sequence[Message], round_: RoundSpec) -> Gather:
        sum_ = yield from weighted.gather(requests, round_)
        return replace(sum_, denominator=round_.cohort)

    object.__setattr__(faulty, "check", honest.check)
    object.__setattr__(faulty, "gather", gather)
    return _Telling(stack.layers, faulty)


@dataclass(frozen=True)
class _Telling(Stack):
    """A stack whose nodes say beside the update what they measured, private or not."""

    def encode(
        self,
        update: Tensor,
        config: Mapping[str, Any],
        memory: RecordDict,
        measured: Metrics | None = None,
        told: NodeContext | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        sent, _ = super().encode(update, config, memory, measured, told)
        return sent, dict(measured or {})


FAULTS: Mapping[str, Callable[[Stack], Stack]] = {
    "noise x 0.25": quarter_noise,
    "clip skipped": skip_clip,
    "weights not bounded": unbounded_weights,
}


@dataclass(frozen=True)
class _Nothing(Stateless):
    name: str


def _unmeasured(collect: Exchange) -> Exchange:
    """The collect, which is not told the bound that it would hold updates to."""
    faulty = copy.copy(collect)

    def gather(requests: Sequence[Message], round_: RoundSpec) -> Gather:
        facts = round_.facts.replace(l2_bound=None, grid=None)
        return (yield from collect.gather(requests, replace(round_, facts=facts)))

    object.__setattr__(faulty, "gather", gather)
    return faulty


def _changed(stack: Stack, layers: Sequence[Transform[Any]], collect: Exchange, what: str) -> Stack:
    if not any(isinstance(layer, Liar) for layer in layers):
        raise ConfigError(f"the stack {stack} has no {what} that a fault could be put into")
    return Stack(layers, collect)


def finite(epsilon: float | None) -> float | None:
    """None for no guarantee, so that JSON stays JSON."""
    return epsilon if epsilon is not None and math.isfinite(epsilon) else None
