"""Ghost norms give what forming every example's gradient gives, and the bound holds."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from umbel.privacy.bounds.examples import trained
from umbel.privacy.bounds.formed import Vectorised
from umbel.privacy.bounds.ghost import PerExample
from umbel.privacy.bounds.layer_gradients import Factored


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


class Tied(nn.Module):
    """One linear layer, used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.tanh(self.inner(x))))


class Scaled(nn.Module):
    """A parameter that belongs to no known layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x * self.scale)


class Words(nn.Module):
    """Token ids to a class."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 5, padding_idx=0)
        self.norm = nn.LayerNorm(5)
        self.mix = nn.Conv1d(5, 6, 3, padding=1)
        self.wide = nn.Linear(6, 40)
        self.head = nn.Linear(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.norm(self.table(x)).mT).mT
        return self.head(torch.tanh(self.wide(h)).mean(1))


def _images(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(4))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "perceptron": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4, bias=False)),
        (6,),
    ),
    "convolutions": (
        lambda: _images(
            nn.Conv2d(4, 8, 3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.GroupNorm(2, 8),
            nn.Conv2d(8, 8, (3, 2), dilation=(2, 1), padding=2, groups=4, bias=False),
            nn.Tanh(),
        ),
        (4, 11, 9),
    ),
    "circular": (
        lambda: _images(nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), nn.Tanh()),
        (4, 8, 8),
    ),
    "positions": (
        lambda: nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Flatten(), nn.Linear(150, 4)),
        (3, 6),
    ),
    "tied": (Tied, (6,)),
    "scaled": (Scaled, (6,)),
}


def _made(name: str, seed: int, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    make, shape = MODELS[name]
    module, inputs = make(), torch.randn(count, *shape)
    module(inputs)  # lazy layers
    return module, inputs, torch.randint(0, 4, (count,))


def _one_by_one(module: nn.Module, x: Tensor, y: Tensor, norm: float) -> dict[str, Tensor]:
    """The definition: each example's gradient by itself, clipped, added up."""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for i in range(len(x)):
        loss = _losses(module(x[i : i + 1]), y[i : i + 1]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        length = torch.cat([g.flatten() for g in gradients]).norm()
        for name, gradient in zip(parameters, gradients, strict=True):
            total[name] += gradient * min(1.0, norm / max(float(length), 1e-12))
    return total


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=4, deadline=None)
@example(seed=1, count=66, norm=0.3)  # more than convolutions take at a time
@given(seed=st.integers(0, 1000), count=st.integers(1, 12), norm=st.floats(0.05, 5.0))
def test_the_sum_is_that_of_gradients_taken_one_by_one(
    name: str, seed: int, count: int, norm: float
) -> None:
    module, x, y = _made(name, seed, count)
    found = PerExample(module).clipped_sum(x, y, _losses, norm)
    for parameter, total in _one_by_one(module, x, y, norm).items():
        assert torch.allclose(found.gradients[parameter], total, atol=1e-4, rtol=1e-3), parameter


@pytest.mark.parametrize("name", MODELS)
def test_each_gradient_by_itself_is_the_one_taken_alone(name: str) -> None:
    module, x, y = _made(name, 2, 5)
    clipper = PerExample(module)
    rows = clipper.each(x, y, _losses)
    order = list(clipper.names.values())
    for i, row in enumerate(rows):
        alone = _one_by_one(module, x[i : i + 1], y[i : i + 1], 1e9)
        expected = torch.cat([alone[n].flatten() for n in order])
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-3)


def test_each_gradient_of_words_by_itself() -> None:
    torch.manual_seed(1)
    module, x, y = Words(), torch.randint(0, 11, (9, 7)), torch.randint(0, 4, (9,))
    clipper = PerExample(module)
    ghost = clipper.each(x, y, _losses)
    assert clipper.ghost
    formed = Vectorised(module, trained(module)).each(x, y, _losses)
    torch.testing.assert_close(ghost, formed, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", ["perceptron", "convolutions", "circular", "positions"])
def test_known_layers_need_no_formed_gradients(name: str) -> None:
    module, x, y = _made(name, 0, 4)
    clipper = PerExample(module)
    clipper.clipped_sum(x, y, _losses, 1.0)
    assert clipper.ghost


@pytest.mark.parametrize("name", ["tied", "scaled"])
def test_other_models_fall_back(name: str) -> None:
    module, x, y = _made(name, 0, 4)
    clipper = PerExample(module)
    clipper.clipped_sum(x, y, _losses, 1.0)
    assert not clipper.ghost


def test_words_and_both_ways_agree() -> None:
    torch.manual_seed(1)
    module, x, y = Words(), torch.randint(0, 11, (9, 7)), torch.randint(0, 4, (9,))
    clipper = PerExample(module)
    ghost = clipper.clipped_sum(x, y, _losses, 0.3)
    assert clipper.ghost
    formed = Vectorised(module, trained(module)).clipped_sum(x, y, _losses, 0.3)
    assert torch.allclose(ghost.norms, formed.norms, rtol=1e-4)
    for name, total in formed.gradients.items():
        assert torch.allclose(ghost.gradients[name], total, atol=1e-5), name


def test_frozen_parameters_take_no_part() -> None:
    module, x, y = _made("perceptron", 0, 5)
    next(module.parameters()).requires_grad_(False)
    found = PerExample(module).clipped_sum(x, y, _losses, 0.1)
    expected = _one_by_one(module, x, y, 0.1)
    assert found.gradients.keys() == expected.keys()
    for name, total in expected.items():
        assert torch.allclose(found.gradients[name], total, atol=1e-5)


@pytest.mark.parametrize("name", ["convolutions", "tied"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_one_example_moves_the_sum_by_the_norm_at_most(name: str, bad: float) -> None:
    module, x, y = _made(name, 3, 8)
    clipper = PerExample(module)
    without = clipper.clipped_sum(x[:-1], y[:-1], _losses, 0.7).gradients
    x[-1] = bad
    with_it = clipper.clipped_sum(x, y, _losses, 0.7).gradients
    moved = torch.cat([(with_it[n] - without[n]).flatten() for n in without]).norm()
    assert moved <= 0.7 * (1 + 1e-4)


def test_what_is_not_finite_is_dropped_and_counted() -> None:
    module, x, y = _made("perceptron", 0, 6)
    x[2] = float("nan")
    found = PerExample(module).clipped_sum(x, y, _losses, 1.0)
    assert found.dropped == 1
    keep = [0, 1, 3, 4, 5]
    for name, total in _one_by_one(module, x[keep], y[keep], 1.0).items():
        assert torch.allclose(found.gradients[name], total, atol=1e-5)


def test_an_empty_batch_is_a_sum_of_zeros() -> None:
    module, x, y = _made("perceptron", 0, 6)
    found = PerExample(module).clipped_sum(x[:0], y[:0], _losses, 1.0)
    assert all(not total.any() for total in found.gradients.values())


def test_layers_that_mix_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="GroupNorm"):
        PerExample(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


def test_a_norm_that_bounds_nothing_is_refused() -> None:
    module, x, y = _made("perceptron", 0, 2)
    with pytest.raises(ValueError, match="norm"):
        PerExample(module).clipped_sum(x, y, _losses, 0.0)


def test_no_gradient_is_left_behind() -> None:
    module, x, y = _made("convolutions", 0, 4)
    PerExample(module).clipped_sum(x, y, _losses, 1.0)
    assert all(p.grad is None for p in module.parameters())
    assert not any(layer._forward_hooks for layer in module.modules())


def test_a_norm_is_never_taken_for_a_smaller_one_where_positions_cancel() -> None:
    """Two positions with nearly opposite gradients: what is left is below what rounding hides."""
    layer = nn.Linear(64, 64, bias=False)
    large = 1e3 * torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0))
    given = torch.cat([large, large + 1e-3], 1)
    back = torch.cat([large, -large], 1)
    true = (back.double().mT @ given.double()).norm()
    assert Factored(layer, given, back).squares().double().sqrt() >= true
