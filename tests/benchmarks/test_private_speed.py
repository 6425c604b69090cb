"""The private parts of the speed benchmark measure what they say."""

from pathlib import Path

import numpy as np
import pytest

from umbel.benchmarks.speed import noise, private_fashion, private_round
from umbel.core.errors import RunError


def test_noise_is_measured_beside_what_it_replaces() -> None:
    (figure,) = noise.measure(quick=True)
    assert figure.target == 20
    assert figure.value > 0
    assert set(figure.beside) == {
        "added to real numbers",
        "NumPy's normal",
        "128-bit table",
        "exact, by coin flips",
    }


def test_the_exact_sampler_has_the_right_spread() -> None:
    """A sum of 400 squares strays by 40 % with a probability below 1e-7 (chi-square, 400)."""
    drawn = np.array([noise.exact(10) for _ in range(400)])
    assert 0.6 < float((drawn**2).mean()) / 100 < 1.4


@pytest.mark.slow
def test_a_private_round_is_timed_beside_a_plain_one() -> None:
    figures = private_round.measure(quick=True)
    assert len(figures) == 2
    for figure in figures:
        plain, private = figure.beside.values()
        assert figure.value == pytest.approx(private / plain)


def test_a_run_that_fails_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="failed"):
        private_fashion.run(tmp_path, "quick", tmp_path, tmp_path / "out")
