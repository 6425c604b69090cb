"""Scattering features agree with Kymatio's and obey the transform's laws."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from umbel.clients.data.scattering import Scattering

# What Kymatio 0.3.0 gives for `_waves()`; {(channel, row, column): value} by scales and order.
KYMATIO = {
    (2, 2): {
        (0, 3, 3): 0.023471,
        (1, 2, 5): 0.200399,
        (12, 0, 6): 0.425971,
        (17, 3, 1): 0.012196,
        (50, 4, 4): 0.001221,
        (80, 6, 0): 0.019021,
    },
    (3, 2): {
        (0, 1, 1): -0.108242,
        (20, 2, 0): 0.050025,
        (30, 0, 0): 0.005506,
        (90, 1, 2): 0.00285,
        (216, 2, 2): 0.013808,
    },
    (1, 1): {(0, 7, 7): 0.140304, (4, 0, 13): 0.24402, (8, 9, 2): 0.069171},
}


def _waves() -> Tensor:
    y, x = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    return (torch.sin(0.7 * x + 0.3 * y) + torch.cos(0.05 * x * y))[None]


@pytest.mark.parametrize(("scales", "order"), KYMATIO)
def test_values_are_those_of_kymatio(scales: int, order: int) -> None:
    features = Scattering(28, 28, scales, order=order)(_waves())[0]
    for place, value in KYMATIO[scales, order].items():
        assert features[place].item() == pytest.approx(value, abs=2e-4)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("kymatio") is None, reason="needs kymatio")
@pytest.mark.parametrize("shape", [(28, 28), (32, 24), (30, 21)])
@pytest.mark.parametrize(("scales", "order"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_all_values_are_those_of_kymatio(shape: tuple[int, int], scales: int, order: int) -> None:
    # The package's own front door imports a function that recent SciPy no longer has.
    from kymatio.scattering2d.frontend.torch_frontend import ScatteringTorch2D

    images = torch.rand(4, *shape, generator=torch.Generator().manual_seed(1))
    theirs = ScatteringTorch2D(J=scales, shape=shape, max_order=order)(images)
    ours = Scattering(*shape, scales, order=order)(images)
    assert ours.shape == theirs.shape
    assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("scales", "order", "shape"),
    [(2, 2, (81, 7, 7)), (1, 1, (9, 14, 14)), (3, 2, (217, 3, 3)), (2, 1, (17, 7, 7))],
)
def test_shape_is_known_before_any_image(
    scales: int, order: int, shape: tuple[int, int, int]
) -> None:
    transform = Scattering(28, 28, scales, order=order)
    assert transform.shape == shape == transform(torch.zeros(1, 28, 28)).shape[1:]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**32), scale=st.floats(0.01, 100))
def test_a_brighter_image_has_brighter_features(seed: int, scale: float) -> None:
    images = torch.rand(2, 28, 28, generator=torch.Generator().manual_seed(seed))
    transform = Scattering()
    assert torch.allclose(transform(images * scale), transform(images) * scale, rtol=1e-3)


def test_a_flat_image_has_only_its_mean() -> None:
    features = Scattering()(torch.full((1, 28, 28), 3.0))[0]
    assert torch.allclose(features[0], torch.full((7, 7), 3.0), atol=1e-3)
    assert features[1:].abs().max() < 1e-3


def test_an_image_does_not_depend_on_its_batch() -> None:
    images = torch.rand(130, 28, 28)
    transform = Scattering()
    assert torch.allclose(transform(images)[129], transform(images[129:])[0], atol=1e-6)


def test_integer_images_are_taken_as_they_are() -> None:
    images = torch.randint(0, 256, (2, 28, 28), dtype=torch.uint8)
    assert torch.equal(Scattering()(images), Scattering()(images.float()))


def test_no_images_have_no_features() -> None:
    assert Scattering()(torch.zeros(0, 28, 28)).shape == (0, 81, 7, 7)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"scales": 0}, "at least one scale"),
        ({"angles": 0}, "at least one scale"),
        ({"order": 3}, "order 1"),
        ({"height": 6, "scales": 3}, "too small"),
    ],
)
def test_a_transform_that_cannot_be_is_refused(arguments: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Scattering(**arguments)


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="28 x 28"):
        Scattering()(torch.zeros(3, 32, 32))
