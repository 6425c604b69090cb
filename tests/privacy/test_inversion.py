"""Inversion of real gradients of real images, with and without what should stop it."""

import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from umbel.privacy.attacks.inversion import (
    best_matches,
    cosine_inversion,
    dense_input,
    dense_inputs,
    dlg,
    imprint,
    isolated,
    label,
    labels,
    psnr,
    total_variation,
)

DIGITS = load_digits()
IMAGES = torch.tensor(DIGITS.data, dtype=torch.float32) / 16
LABELS = torch.tensor(DIGITS.target)


def network(activation: nn.Module, width: int = 128) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), activation, nn.Linear(width, 10))


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = nn.functional.cross_entropy(model(x), y)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def released(
    parts: Sequence[Tensor], multiplier: float, generator: torch.Generator
) -> list[Tensor]:
    """A gradient clipped to norm 1, with Gaussian noise of that multiplier."""
    flat = torch.cat([part.flatten() for part in parts])
    flat = flat * min(1.0, 1 / float(flat.norm()))
    flat = flat + multiplier * torch.randn(flat.shape, generator=generator)
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view_as(part) for piece, part in zip(pieces, parts, strict=True)]


def test_closed_form_is_exact_without_noise_and_useless_with_it() -> None:
    model = network(nn.ReLU())
    generator = torch.Generator().manual_seed(1)
    clear, noisy = [], []
    for i in range(50):
        parts = gradient(model, IMAGES[i : i + 1], LABELS[i : i + 1])
        clear.append(psnr(IMAGES[i], dense_input(parts[0], parts[1])))
        parts = released(parts, 0.1, generator)
        noisy.append(psnr(IMAGES[i], dense_input(parts[0], parts[1]).clamp(0, 1)))
    assert min(clear) > 100
    assert sum(noisy) / 50 < 8


def test_clipping_alone_changes_nothing() -> None:
    model = network(nn.ReLU())
    parts = gradient(model, IMAGES[:1], LABELS[:1])
    parts = released(parts, 0.0, torch.Generator())
    assert psnr(IMAGES[0], dense_input(parts[0], parts[1])) > 100


def test_labels_are_read_from_the_bias() -> None:
    model = network(nn.ReLU())
    right = 0
    for i in range(50):
        parts = gradient(model, IMAGES[i : i + 1], LABELS[i : i + 1])
        right += label(parts[-1]) == int(LABELS[i])
    assert right == 50
    found = set(labels(gradient(model, IMAGES[:4], LABELS[:4])[-1]).tolist())
    assert found <= set(LABELS[:4].tolist())


def test_a_sum_of_few_one_image_clients_gives_them_away_and_of_many_does_not() -> None:
    centred = IMAGES - IMAGES.mean()
    model = network(nn.ReLU())
    found = {}
    for clients in (5, 50):
        shares = []
        for start in range(0, 400, clients):
            rows = torch.arange(start, start + clients)
            parts = [gradient(model, centred[i : i + 1], LABELS[i : i + 1]) for i in rows]
            weight, bias = (torch.stack([part[k] for part in parts]).sum(dim=0) for k in (0, 1))
            matches = best_matches(centred[rows], dense_inputs(weight, bias))
            shares.append(float((matches > 60).double().mean()))
        found[clients] = sum(shares) / len(shares)
    assert found[5] > 0.5
    assert found[50] < 0.15


@given(st.integers(1, 5), st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_one_active_neuron_is_enough(neurons: int, size: int) -> None:
    generator = torch.Generator().manual_seed(neurons * 100 + size)
    x = torch.randn(size, generator=generator)
    error = torch.zeros(neurons)
    error[0] = 0.3
    assert torch.allclose(dense_input(torch.outer(error, x), error), x, atol=1e-5)
    assert dense_inputs(torch.outer(error, x), error).shape == (1, size)
    assert torch.equal(dense_input(torch.zeros(neurons, size), torch.zeros(neurons)), 0 * x)


@pytest.mark.parametrize(("batch", "bins", "reach"), [(64, 1000, 4.0), (8, 64, 1.0)])
def test_imprint_isolates_what_the_formula_says(batch: int, bins: int, reach: float) -> None:
    # The mean over 20 batches has a deviation of 0.8 (0.25); four images are five of them.
    generator = torch.Generator().manual_seed(5)
    # Digits have few grey levels, so that many have the same mean; a grain tells them apart.
    images = IMAGES + 0.01 * torch.rand(IMAGES.shape, generator=generator)
    counts = []
    for _ in range(20):
        order = torch.randperm(len(images), generator=generator)
        mine = images[order[:batch]]
        layer = imprint(images[order[batch:]], bins)
        weight, bias = layer.weight.clone().requires_grad_(), layer.bias.clone().requires_grad_()
        head = torch.randn(10, 1, generator=generator).expand(10, bins) / bins
        logits = torch.relu(mine @ weight.T + bias) @ head.T
        loss = nn.functional.cross_entropy(logits, LABELS[order[:batch]])
        found = layer.recover(*torch.autograd.grad(loss, (weight, bias)))
        counts.append(int((best_matches(mine, found) > 40).sum()))
    assert sum(counts) / len(counts) == pytest.approx(isolated(batch, bins), abs=reach)


def test_isolated_values() -> None:
    for batch, bins, expected in ((64, 1000, 60.09), (64, 256, 50.01), (8, 64, 7.16)):
        assert isolated(batch, bins) == pytest.approx(expected, abs=0.01)


def test_dlg_finds_the_image_and_the_label() -> None:
    model = network(nn.Sigmoid(), width=32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.5, 0.5)  # as in the paper's code: gradients that do not vanish

    def gradient_of(x: Tensor, soft: Tensor) -> Sequence[Tensor]:
        loss = nn.functional.cross_entropy(model(x), soft)
        return torch.autograd.grad(loss, list(model.parameters()), create_graph=True)

    seen = gradient(model, IMAGES[:1], LABELS[:1])
    result = dlg(gradient_of, seen, (1, 64), classes=10, iterations=60, seed=1)
    assert psnr(IMAGES[:1], result.inputs) > 25
    assert int(result.labels) == int(LABELS[0])


def test_cosine_inversion_needs_only_the_direction() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12 * 64, 10)
    )
    image = IMAGES[:1].view(1, 1, 8, 8)

    def gradient_of(x: Tensor, soft: Tensor) -> Sequence[Tensor]:
        loss = nn.functional.cross_entropy(model(x), soft)
        return torch.autograd.grad(loss, list(model.parameters()), create_graph=True)

    seen = [0.001 * part for part in gradient(model, image, LABELS[:1])]
    target = nn.functional.one_hot(LABELS[:1], 10).float()
    result = cosine_inversion(gradient_of, seen, (1, 1, 8, 8), target=target, iterations=300)
    assert psnr(image, result.inputs) > 20
    noise = [torch.randn(part.shape, generator=torch.Generator().manual_seed(2)) for part in seen]
    blind = cosine_inversion(gradient_of, noise, (1, 1, 8, 8), target=target, iterations=100)
    assert psnr(image, blind.inputs) < 12


def test_small_things() -> None:
    assert psnr(IMAGES[0], IMAGES[0]) == math.inf
    assert psnr(torch.zeros(4), torch.ones(4)) == 0.0
    assert best_matches(IMAGES[:3], IMAGES[:0]).tolist() == [-math.inf] * 3
    assert float(total_variation(torch.zeros(2, 5))) == 0.0
    assert float(total_variation(torch.eye(4)[None, None])) == pytest.approx(1.0)
