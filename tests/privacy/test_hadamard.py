"""The rotation: orthonormal at every size, its own inverse with the same seed, and it spreads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.masking import hadamard

SEED = b"seed" * 8


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 28, 24, 40, 56, 64, 128, 448, 8192])
def test_the_matrix_is_orthonormal(size: int) -> None:
    assert hadamard.padded(size) == size
    eye = torch.eye(min(size, 64), size, dtype=torch.float64)
    rows = torch.stack([hadamard.rotate(row, SEED) for row in eye])
    assert torch.allclose(rows @ rows.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12)
    # Hadamard: all entries have the same size, so no direction of an update stands out.
    assert torch.allclose(rows.abs(), torch.full_like(rows, size**-0.5), atol=1e-12)


@given(st.integers(1, 3000), st.binary(min_size=32, max_size=32))
@settings(deadline=None, max_examples=50)
def test_rotating_back_gives_the_update(size: int, seed: bytes) -> None:
    update = torch.randn(size, dtype=torch.float64)
    rotated = hadamard.rotate(update, seed)
    assert len(rotated) == hadamard.padded(size)
    assert torch.allclose(hadamard.rotate_back(rotated, seed, size), update, atol=1e-10)
    assert abs(float(rotated.norm()) - float(update.norm())) < 1e-9 * (1 + float(update.norm()))


@given(st.integers(4, 10**9))
def test_filling_up_costs_at_most_a_quarter(size: int) -> None:
    assert size <= hadamard.padded(size) <= max(1.25 * size, size + 3)


def test_the_sum_of_rotations_is_the_rotation_of_the_sum() -> None:
    first, second = torch.randn(2, 1000, dtype=torch.float64)
    both = hadamard.rotate(first, SEED) + hadamard.rotate(second, SEED)
    assert torch.allclose(hadamard.rotate_back(both, SEED, 1000), first + second, atol=1e-10)


def test_an_update_in_one_coordinate_is_spread_over_all() -> None:
    spike = torch.zeros(100_000)
    spike[777] = 1.0
    rotated = hadamard.rotate(spike, SEED)
    assert float(rotated.abs().max()) < 1.01 * len(rotated) ** -0.5
