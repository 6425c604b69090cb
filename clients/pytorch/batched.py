"""Many nodes' models trained as one batched computation.

Small models leave most of a processor idle: a step of logistic regression costs more in calls
than in arithmetic. Where every node starts from the same weights, all of them take their steps
together: parameters are stacked along a first axis of nodes, and `torch.func` turns the step of
one node into the step of all. Each node keeps its own shuffles and batches, so it gets what it
would get alone, to float tolerance. Shorter batches are padded with rows of weight zero; nodes
are ordered by number of steps, so that those still at work are always a prefix.

`train_cohort` returns None where this is not possible or, with `batched=auto`, not faster.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from umbel.clients.data.examples import ArrayLike
from umbel.clients.pytorch.batches import (
    ArraySource,
    RealSource,
    Source,
    as_real,
    plan,
    rows_of,
    to_device,
    to_model,
)
from umbel.clients.pytorch.correcting import CorrectingMany, proximal
from umbel.clients.pytorch.dense import Dense
from umbel.clients.pytorch.intake import opened
from umbel.clients.pytorch.loop import autocast
from umbel.clients.pytorch.losses import Objective
from umbel.clients.pytorch.module import BATCH_NORM, ModuleState
from umbel.clients.pytorch.settings import TorchSettings, mixed_precision
from umbel.clients.trainers.base import Job, Trained, Tree, Weights
from umbel.core.errors import UmbelError, described

LEAST_NODES = 8
"""Fewer nodes than this do not pay for the batching itself."""

LEAST_ACTIVE = 4.0
"""On a CPU, nor does a step of fewer nodes on average: where a few nodes have most of the
examples, they take most steps without the others."""

MOST_PARAMETERS = 1 << 17
"""On a CPU, models beyond this keep it busy alone: batching 784-128-10 perceptrons (102 thousand
parameters) was measured 1.6 times as fast as one by one, 784-300-10 equal, 784-512-10 slower."""

MOST_FLOATS = 1 << 26
"""Stacked parameters beyond this many (256 MiB in float32) are not worth their memory."""

_RECURRENT = nn.RNNBase  # vmap has no rule for their fused kernels

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Node:
    """One node's part of the work: its examples and the rows of each of its steps.

    `real` says that the model computes with its integers.
    """

    place: int
    source: ArraySource
    steps: list[Tensor | None]
    real: bool = False

    def count(self, step: int) -> int:
        rows = self.steps[step]
        return self.source.size if rows is None else rows.shape[0]  # len() of a tensor is slow


def train_cohort(
    piece: ModuleState,
    objective: Objective,
    settings: TorchSettings,
    weights: Sequence[Weights],
    examples: Sequence[Any],
    jobs: Sequence[Job],
    target: str = "",
) -> list[Trained] | None:
    """Train all nodes together, or say that it does not apply.

    Args:
        piece: the module, on the device to work on; its state is left as `load` leaves it.
        objective: the loss.
        settings: the same for every node.
        weights: where each node starts; they have to be equal.
        examples: each node's.
        jobs: each node's; the seeds differ.

    Returns:
        One result a node, in order. The parameters of one call share memory.
    """
    if not worthwhile(piece, settings, len(jobs)) or not _same_start(weights):
        return None
    try:
        sources = [opened(piece, e, target) for e in examples]
        nodes = _nodes(piece, sources, settings, jobs)
        if nodes is None or (settings.batched != "on" and not _filled(piece, nodes)):
            return None
        piece.load(weights[0])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "There is a performance drop")  # vmap would loop
            own = [job.correction or proximal(settings) for job in jobs]
            correcting = CorrectingMany.of(
                [own[node.place] for node in nodes],
                weights[0].parameters,
                {name: p.detach() for name, p in piece.parameters.items()},
            )
            result = _Cohort(piece, objective, settings, nodes, correcting).run()
    except UmbelError:  # one node is at fault: alone, it is told so, and the others go on
        return None
    except (RuntimeError, IndexError, ValueError, UserWarning) as error:
        # An operation or a random draw that vmap cannot do, unless a node's label is wrong.
        if "out of bounds" not in str(error):
            piece.unbatchable = f"torch.func cannot batch it ({described(error, '', 200)})"
        return None
    if piece.touched(weights[0]):
        piece.unbatchable = "training changes one of its buffers"
        return None
    if result is None:
        return None
    steps = {node.place: len(node.steps) for node in nodes}
    each = enumerate(zip(result, sources, weights, strict=True))
    return [
        Trained(Weights(parameters, dict(given.buffers)), source.size, {"loss": loss}, steps[place])
        for place, ((parameters, loss), source, given) in each
    ]


def refusal(piece: ModuleState, settings: TorchSettings) -> str:
    """Why these models cannot be trained as one computation; empty where nothing is known."""
    if piece.unbatchable:
        return piece.unbatchable
    for name, module in piece.module.named_modules():
        what = f"the layer {name or 'itself'} ({type(module).__name__})"
        if isinstance(module, BATCH_NORM):
            return f"{what} mixes the examples of a batch and keeps statistics"
        if isinstance(module, _RECURRENT):
            return f"{what} has a fused kernel that cannot be batched over models"
    if any(p.is_complex() for p in piece.parameters.values()):
        return "it has complex parameters"
    if mixed_precision(settings.precision, piece.device) == torch.float16:
        return "precision=fp16 needs a scale of its own for each node"
    return ""


def worthwhile(piece: ModuleState, settings: TorchSettings, nodes: int) -> bool:
    """Whether batching is possible as far as one can see, and expected to be faster.

    On a CPU: at least 8 nodes, at most 2^17 parameters, and no convolution, which would become
    a slow grouped one. On an accelerator, where every call costs more: any model that fits.
    """
    if settings.batched == "off" or refusal(piece, settings):
        return False
    if settings.batched == "on":
        return True
    modules = list(piece.module.modules())
    size = sum(p.numel() for p in piece.parameters.values())
    if nodes < LEAST_NODES or size * nodes > MOST_FLOATS:
        return False
    convolutions = any(isinstance(m, _CONVOLUTIONS) for m in modules)
    return piece.device.type != "cpu" or (size <= MOST_PARAMETERS and not convolutions)


def _filled(piece: ModuleState, nodes: Sequence[Node]) -> bool:
    """Whether enough nodes take part in an average step."""
    steps = sum(len(node.steps) for node in nodes)
    return piece.device.type != "cpu" or steps >= LEAST_ACTIVE * len(nodes[0].steps)


def _same_start(weights: Sequence[Weights]) -> bool:
    first = weights[0]
    return all(
        _same(other.parameters, first.parameters) and _same(other.buffers, first.buffers)
        for other in weights[1:]
    )


def _same(one: Tree, other: Tree) -> bool:
    return one is other or (
        one.keys() == other.keys()
        and all(one[n] is other[n] or torch.equal(one[n], other[n]) for n in one)
    )


def _nodes(
    piece: ModuleState, sources: Sequence[Source], settings: TorchSettings, jobs: Sequence[Job]
) -> list[Node] | None:
    """The nodes, those with most steps first; None unless their examples can be stacked."""
    nodes = []
    shapes = set()
    for place, (source, job) in enumerate(zip(sources, jobs, strict=True)):
        real = isinstance(source, RealSource)
        source = source.stored if isinstance(source, RealSource) else source
        if not isinstance(source, ArraySource):
            if settings.batched == "on":
                piece.unbatchable = "a node's examples are no arrays, but read row by row"
            return None
        shapes.add((source.x.shape[1:], source.y.shape[1:], source.x.dtype, source.y.dtype))
        nodes.append(Node(place, source, list(plan(source.size, settings, job.seed)), real))
    nodes.sort(key=lambda node: len(node.steps), reverse=True)
    return nodes if len(shapes) == 1 else None


class _Cohort:
    """The stacked state of one call, and its steps."""

    def __init__(
        self,
        piece: ModuleState,
        objective: Objective,
        settings: TorchSettings,
        nodes: list[Node],
        correcting: CorrectingMany | None,
    ) -> None:
        self.correcting = correcting
        self.piece, self.objective, self.settings, self.nodes = piece, objective, settings, nodes
        self.device = piece.device
        self.start = {name: p.detach() for name, p in piece.parameters.items()}
        self.fixed = {name: b.detach() for name, b in piece.buffers.items()}
        self.stacked: Tree = {}
        self.velocity: Tree = {}
        self.losses = torch.zeros(len(nodes), device=self.device)
        self.dense = Dense.of(piece)

    def run(self) -> list[tuple[Tree, float]] | None:
        """Each node's parameters and mean loss, in the caller's order; None if one diverged."""
        self.piece.module.train()
        for step in range(len(self.nodes[0].steps)):
            active = [node for node in self.nodes if len(node.steps) > step]
            if not self._step(step, active):
                return None
        counts = [sum(n.count(s) for s in range(len(n.steps))) for n in self.nodes]
        losses = (self.losses / torch.tensor(counts, device=self.device)).tolist()
        if not all(math.isfinite(loss) for loss in losses):
            return None
        stacked = {name: value.cpu() for name, value in self.stacked.items()}
        result: list[Any] = [None] * len(self.nodes)
        for row, node in enumerate(self.nodes):
            result[node.place] = ({n: v[row] for n, v in stacked.items()}, losses[row])
        return result

    def _step(self, step: int, active: list[Node]) -> bool:
        counts = [node.count(step) for node in active]
        x, y = _stack([(n.source, n.steps[step]) for n in active], max(counts))
        if active[0].real:
            x = as_real(x, self.piece.real)
        inputs = to_model(x, self.device, self.piece.real)
        targets = _prepared(self.objective, to_device(y, self.device))
        sizes = torch.tensor(counts, device=self.device)
        mask = None
        if min(counts) != max(counts):
            if self.objective.each is None:
                if self.settings.batched == "on":
                    self.piece.unbatchable = (
                        "the loss function gives only the mean of a batch, and nodes have "
                        "batches of different sizes"
                    )
                return False
            mask = (torch.arange(max(counts), device=self.device) < sizes[:, None]).to(
                self.piece.real
            )
        if step == 0 and not self._rows_are_independent(inputs):
            self.piece.unbatchable = "the output of an example depends on the others of its batch"
            return False
        with autocast(self.settings.precision, self.device):
            gradients, losses = self._gradients(step, inputs, targets, mask)
        self.losses[: len(active)] += losses * sizes
        with torch.no_grad():
            self._update(step, len(active), gradients)
        return True

    def _rows_are_independent(self, inputs: Tensor) -> bool:
        """Whether an example's output is the same in another batch, so that padding is harmless."""
        if self.piece.checked:
            return True
        self.piece.checked = True
        rows = inputs.flatten(0, 1)[:4]
        self.piece.module.eval()
        with torch.no_grad():
            alone, together = self.piece.module(rows[:1]), self.piece.module(rows)
        self.piece.module.train()
        return torch.allclose(alone, together[:1], rtol=1e-3, atol=1e-5)

    def _gradients(
        self, step: int, x: Tensor, y: Tensor, mask: Tensor | None
    ) -> tuple[Tree, Tensor]:
        parameters = {n: v[: len(x)] for n, v in self.stacked.items()} if step else self.start
        if self.dense is not None:
            if not step:
                parameters = {n: v.expand(len(x), *v.shape) for n, v in parameters.items()}
            found = self.dense.gradients(self.objective, parameters, x, y, mask)
            if found is not None:
                return found
            parameters = parameters if step else self.start
        from torch.func import grad_and_value, vmap  # slow to import

        dims = (0 if step else None, 0, 0, None if mask is None else 0)
        gradients, losses = vmap(grad_and_value(self._loss), in_dims=dims)(parameters, x, y, mask)
        # An unused parameter's gradient is one zero, seen by all; each node needs its own.
        return {name: gradient.contiguous() for name, gradient in gradients.items()}, losses

    def _loss(self, parameters: Tree, x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
        outputs = torch.func.functional_call(self.piece.module, {**self.fixed, **parameters}, (x,))
        if mask is None or self.objective.each is None:
            return self.objective.loss(outputs, y)
        each = self.objective.each(outputs, y)
        weight = mask.reshape(-1, *(1,) * (each.ndim - 1)).expand(each.shape)
        if not y.is_floating_point():
            weight = weight * (y != -100)  # positions that cross-entropy leaves out of its mean
        return (each * weight).sum() / weight.sum()

    def _update(self, step: int, active: int, gradients: Tree) -> None:
        settings = self.settings
        if self.correcting is not None:
            places = {n: v[:active] for n, v in self.stacked.items()} if step else self.start
            self.correcting.add_to(gradients, places, active, first=step == 0)
        if settings.clip_gradient:
            _clip(gradients, settings.clip_gradient)
        for name, gradient in gradients.items():
            here = self.stacked[name][:active] if step else self.start[name]
            if settings.weight_decay:
                gradient = gradient.add(here, alpha=settings.weight_decay)
            if settings.momentum:
                gradient = self._with_momentum(step, active, name, gradient)
            if step:
                here.add_(gradient, alpha=-settings.learning_rate)
            else:
                rate = -settings.learning_rate
                self.stacked[name] = torch.add(here, gradient, alpha=rate, out=gradient)

    def _with_momentum(self, step: int, active: int, name: str, gradient: Tensor) -> Tensor:
        if step == 0:
            self.velocity[name] = gradient.clone()
            return gradient
        return self.velocity[name][:active].mul_(self.settings.momentum).add_(gradient)


def _clip(gradients: Tree, limit: float) -> None:
    """Each node's gradient to at most `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
    squares = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()])
    factors = (limit / (squares.sum(0).sqrt() + 1e-6)).clamp(max=1.0)
    for gradient in gradients.values():
        gradient.mul_(factors.reshape(-1, *(1,) * (gradient.ndim - 1)))


def _stack(parts: list[tuple[ArraySource, Tensor | None]], width: int) -> tuple[Tensor, Tensor]:
    """Batches of several nodes, padded to `width` rows with zeros: (nodes, width, ...)."""
    return (
        _padded([(source.x, rows) for source, rows in parts], width),
        _padded([(source.y, rows) for source, rows in parts], width),
    )


def _padded(parts: list[tuple[ArrayLike, Tensor | None]], width: int) -> Tensor:
    first = parts[0][0]
    like = first if isinstance(first, Tensor) else rows_of(first[:0], None)
    result = like.new_empty((len(parts), width, *first.shape[1:]))
    for place, (array, rows) in zip(result, parts, strict=True):
        count = (array if rows is None else rows).shape[0]
        if rows is not None and isinstance(array, Tensor) and array.device == place.device:
            torch.index_select(array, 0, rows.to(array.device), out=place[:count])
        else:
            place[:count] = rows_of(array, rows)
        if count < width:
            place[count:] = 0
    return result


def _prepared(objective: Objective, targets: Tensor) -> Tensor:
    """What `objective.prepare` makes of one node's targets, for all of them."""
    shape = targets.shape
    prepared: Tensor = objective.prepare(targets.flatten(0, 1))
    return prepared.reshape(*shape[:2], *prepared.shape[1:])
