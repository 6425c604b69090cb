"""Gradient inversion: the examples behind an update.

    dense_input      one example behind a dense layer's gradient, in closed form
    dense_inputs     the same from a sum over examples or clients: one candidate a neuron
    labels           which classes the examples have (iDLG), from the last bias alone
    dlg              any model: an example whose gradient is the one that was seen   (L-BFGS)
    cosine_inversion any model: the same by direction, with a smooth image as prior  (Adam)
    Imprint          a layer that a malicious server chooses, so that closed form works on batches

The first two train nothing and are exact: a dense layer's weight gradient is the outer product
of the error and the input, its bias gradient is the error alone (Geiping et al. 2020,
arXiv:2003.14053, proposition 3.1).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GradientOf = Callable[[Tensor, Tensor], Sequence[Tensor]]
"""(inputs, class probabilities) -> the gradients of the loss, differentiable in both."""


def psnr(original: Tensor, guess: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB; larger is a better copy, infinite is an exact one.

    Args:
        original: any shape.
        guess: the same shape.
        peak: the range of a pixel.
    """
    error = (original.double() - guess.double()).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(peak * peak / error)


def dense_input(weight: Tensor, bias: Tensor) -> Tensor:
    """The one input behind a dense layer's gradient: x = dL/dW_i / dL/db_i for any neuron i.

    The neurons are combined by least squares, which is exact without noise and the best linear
    guess with it (Geiping et al. 2020, arXiv:2003.14053, proposition 3.1).

    Args:
        weight: the weight's gradient, shape (out, in).
        bias: the bias' gradient, shape (out,).

    Returns:
        Shape (in,). Where no neuron was active it is all zero: nothing can be said.
    """
    weight, bias = weight.double(), bias.double()
    energy = bias.square().sum()
    return torch.zeros(weight.shape[1]) if energy == 0 else ((bias @ weight) / energy).float()


def dense_inputs(weight: Tensor, bias: Tensor) -> Tensor:
    """A candidate input of every neuron, from a gradient summed over examples or clients.

    A neuron that was active for one example only gives that example exactly.

    Args:
        weight: shape (out, in).
        bias: shape (out,).

    Returns:
        Shape (active, in), the neurons whose bias gradient is not 0.
    """
    weight, bias = weight.double(), bias.double()
    active = bias != 0
    return (weight[active] / bias[active, None]).float()


def best_matches(originals: Tensor, candidates: Tensor, peak: float = 1.0) -> Tensor:
    """The PSNR in dB of each original's nearest candidate, shape (n,).

    It uses the originals: it measures what an attack has found, it is no attack.

    Args:
        originals: shape (n, in).
        candidates: shape (k, in); with k = 0 the result is minus infinity.
        peak: the range of a pixel.
    """
    if not len(candidates):
        return torch.full((len(originals),), -math.inf, dtype=torch.float64)
    best = []
    for original in originals.double():
        error = (candidates.double() - original).square().mean(dim=1)
        error = torch.where(error.isfinite(), error, torch.inf).min()
        best.append(math.inf if error == 0 else 10 * math.log10(peak**2 / float(error)))
    return torch.tensor(best, dtype=torch.float64)


def label(bias: Tensor) -> int:
    """The class of the single example behind a last layer's bias gradient.

    Softmax minus one-hot is negative at the label alone (Zhao et al. 2020, arXiv:2001.02610).
    """
    return int(bias.argmin())


def labels(bias: Tensor) -> Tensor:
    """The classes that a batch surely contains: those of a negative bias gradient, ascending."""
    return torch.nonzero(bias < 0).flatten()


@dataclass(frozen=True)
class Inverted:
    """A guessed example.

    Attributes:
        inputs: shape (batch, ...).
        labels: shape (batch,).
        distance: between the seen and the guess' gradient, in the attack's own measure.
    """

    inputs: Tensor
    labels: Tensor
    distance: float


def dlg(
    gradient_of: GradientOf,
    seen: Sequence[Tensor],
    shape: Sequence[int],
    *,
    classes: int,
    iterations: int = 100,
    seed: int = 0,
) -> Inverted:
    """Deep leakage from gradients: inputs and soft labels that give the gradient that was seen.

    Minimises ||g(x', y') - g||^2 with L-BFGS (Zhu, Liu, Han 2019, arXiv:1906.08935, algorithm 1).
    The model must be twice differentiable: with ReLU it seldom works, with sigmoid it does.

    Args:
        gradient_of: the loss' gradients at inputs and class probabilities.
        seen: the gradients, one a parameter.
        shape: of the inputs, batch first.
        classes: of the model.
        iterations: L-BFGS steps, each of up to 20 evaluations.
        seed: of the first guess.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(*shape, generator=generator).requires_grad_()
    soft = torch.randn(shape[0], classes, generator=generator).requires_grad_()
    optimizer = torch.optim.LBFGS([inputs, soft], line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        guess = gradient_of(inputs, soft.softmax(dim=1))
        distance = torch.stack(
            [(a - b).square().sum() for a, b in zip(guess, seen, strict=True)]
        ).sum()
        distance.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return distance

    distance = math.inf
    for _ in range(iterations):
        now = float(optimizer.step(closure).detach())  # type: ignore[no-untyped-call]  # torch has no types for it
        if not math.isfinite(now) or abs(distance - now) < 1e-14:
            break
        distance = now
    return Inverted(inputs.detach(), soft.detach().argmax(dim=1), distance)


def cosine_inversion(
    gradient_of: GradientOf,
    seen: Sequence[Tensor],
    shape: Sequence[int],
    *,
    target: Tensor,
    iterations: int = 500,
    smoothness: float = 1e-3,
    rate: float = 0.1,
    box: tuple[float, float] = (0.0, 1.0),
    seed: int = 0,
) -> Inverted:
    """Inversion by the gradient's direction, which clipping does not change.

    Minimises 1 - cos(g(x'), g) + smoothness * TV(x') with Adam on the sign of the gradient and
    decay of the rate at 3/8, 5/8 and 7/8 (Geiping et al. 2020, arXiv:2003.14053, section 4).

    Args:
        gradient_of: the loss' gradients at inputs and class probabilities.
        seen: the gradients, one a parameter.
        shape: of the inputs, (batch, channels, height, width) or (batch, features).
        target: known class probabilities, shape (batch, classes); `label` finds them.
        iterations: steps.
        smoothness: of the total variation, images only.
        rate: of the first steps.
        box: smallest and largest value of an input.
        seed: of the first guess.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.rand(*shape, generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([inputs], lr=rate)
    steps = [iterations * part // 8 for part in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=0.1)
    flat = torch.cat([part.flatten() for part in seen])
    length = flat.norm().clamp_min(1e-12)
    best, best_distance = inputs.detach().clone(), math.inf
    for _ in range(iterations):
        optimizer.zero_grad()
        guess = torch.cat([part.flatten() for part in gradient_of(inputs, target)])
        distance = 1 - (guess @ flat) / (guess.norm().clamp_min(1e-12) * length)
        distance = distance + smoothness * total_variation(inputs)
        if float(distance.detach()) < best_distance:
            best, best_distance = inputs.detach().clone(), float(distance.detach())
        distance.backward()
        if inputs.grad is not None:
            inputs.grad.sign_()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            inputs.clamp_(*box)
    return Inverted(best, target.argmax(dim=1), best_distance)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels; 0 for inputs that are no images."""
    if images.dim() < 4:
        return images.new_zeros(())
    across = (images[..., 1:] - images[..., :-1]).abs().mean()
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    return across + down


@dataclass(frozen=True)
class Imprint:
    """A dense layer that sorts a batch into bins, so that a bin of one gives its image away.

    All neurons measure the same thing, the mean pixel, with ever higher thresholds: neuron i is
    active for the images brighter than threshold i, and neighbouring gradients differ by the
    images of one bin (Fowl et al. 2022, arXiv:2110.13057, section 3). A malicious server puts it
    before a model; of n images in k bins (1 - 1/k)^(n - 1) are alone in theirs.

    Attributes:
        weight: shape (bins, in).
        bias: shape (bins,).
    """

    weight: Tensor
    bias: Tensor

    def recover(self, weight: Tensor, bias: Tensor, tolerance: float = 1e-9) -> Tensor:
        """The images in the bins, from the layer's gradients.

        Args:
            weight: gradient of shape (bins, in).
            bias: gradient of shape (bins,).
            tolerance: bins of a smaller share of the bias gradient are empty.

        Returns:
            Shape (found, in). A bin of several images gives a weighted mean of them.
        """
        last = torch.zeros(1, weight.shape[1], dtype=torch.float64)
        weight, bias = weight.double(), bias.double()
        errors = bias - torch.cat([bias[1:], bias.new_zeros(1)])
        sums = weight - torch.cat([weight[1:], last])
        filled = errors.abs() > tolerance * bias.abs().max()
        return (sums[filled] / errors[filled, None]).float()


def imprint(public: Tensor, bins: int, scale: float = 1.0) -> Imprint:
    """An imprint layer whose bins are equally likely for images like the public ones.

    With a small scale, and large weights behind it, an update is the layer's own gradient and
    little else. So clipping and rounding take next to nothing from it.

    Args:
        public: shape (n, in), images of the same kind; only the distribution of their means is
            used.
        bins: neurons of the layer.
        scale: of the layer's outputs.
    """
    means = public.double().mean(dim=1)
    levels = torch.arange(bins, dtype=torch.float64) / bins
    thresholds = torch.quantile(means, levels)
    # The lowest bin is open: an image darker than any public one is still seen.
    thresholds[0] = min(float(thresholds[0]), 0.0) - 1.0
    size = public.shape[1]
    return Imprint(torch.full((bins, size), scale / size), (-scale * thresholds).float())


def isolated(batch: int, bins: int) -> float:
    """How many of a batch are expected to be alone in their bin: n (1 - 1/k)^(n - 1)."""
    return batch * (1 - 1 / bins) ** (batch - 1)
