"""Further training of a changed model, so that it gives again what the original gave.

The loss is half the usual one and half the distance to the original's outputs (distillation, Hinton
et al. 2015, https://arxiv.org/abs/1503.02531, section 2, temperature 2); without targets, for
made-up inputs, only the latter.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from umbel.clients.seeding import seeded
from umbel.deliver.trained import outputs_of

Array = np.ndarray[Any, Any]
TEMPERATURE = 2.0
BATCH = 64


def fine_tune(
    student: nn.Module,
    teacher: nn.Module,
    x: Array,
    y: Array | None,
    *,
    output: str,
    epochs: int,
    learning_rate: float = 2e-3,
    seed: int = 0,
) -> nn.Module:
    """Train a module in place, and return it in eval mode.

    Args:
        student: that is trained.
        teacher: the original.
        x: inputs, shape (n, ...).
        y: targets, shape (n,); None where there are none.
        output: what the outputs are, as in `umbel.clients.trainers.exported.Output`.
        epochs: passes over the inputs.
        learning_rate: of Adam, at the start; it falls to zero as a cosine.
        seed: of the order.
    """
    taught = torch.from_numpy(outputs_of(teacher.eval(), x))
    inputs = torch.from_numpy(x)
    targets = None if y is None else torch.from_numpy(np.asarray(y))
    weights = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=learning_rate)
    steps = epochs * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    student.train()
    with seeded(seed):
        for _ in range(epochs):
            for rows in torch.split(torch.randperm(len(x)), BATCH):
                optimizer.zero_grad()
                found = student(inputs[rows])
                loss = _distance(found, taught[rows], output)
                if targets is not None:
                    loss = (loss + _loss(found, targets[rows], output)) / 2
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
    return student.eval()


def _distance(found: Tensor, taught: Tensor, output: str) -> Tensor:
    if output == "logits":
        scale = TEMPERATURE
        return scale**2 * functional.kl_div(
            (found / scale).log_softmax(1), (taught / scale).softmax(1), reduction="batchmean"
        )
    if output == "logit":
        return functional.binary_cross_entropy_with_logits(found, taught.sigmoid())
    return functional.mse_loss(found, taught)


def _loss(found: Tensor, targets: Tensor, output: str) -> Tensor:
    if output == "logits":
        return functional.cross_entropy(found, targets.long())
    if output == "logit":
        return functional.binary_cross_entropy_with_logits(
            found, targets.float().reshape(found.shape)
        )
    if output == "number":
        return functional.mse_loss(found, targets.float().reshape(found.shape))
    return found.new_zeros(())
