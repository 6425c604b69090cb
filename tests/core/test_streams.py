"""The generators of this process are kept to the last half of a pair, quickly or not."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from umbel.core import streams


def draw() -> list[float]:
    return [
        *(random.gauss(0.0, 1.0) for _ in range(3)),
        random.random(),
        *np.random.standard_normal(3).tolist(),
        float(np.random.rand()),
        float(torch.rand(1)),
    ]


def half_used() -> None:
    streams.seed_all(3)
    random.gauss(0.0, 1.0)
    np.random.standard_normal(1)


def half_used_without_a_draw() -> None:
    """A state that was kept with half of a pair is set, while the words are as they were."""
    half_used()
    state = np.random.get_state()
    np.random.standard_normal(1)
    with streams.kept():
        pass
    np.random.set_state(state)
    streams.look_closely()


def used_up() -> None:
    """The words of the Mersenne Twister are made anew with the next number."""
    streams.seed_all(4)
    for _ in range(624 // 2):
        random.random()
        np.random.rand()


@pytest.mark.parametrize("begin", [half_used, half_used_without_a_draw, used_up])
def test_what_comes_after_is_what_would_have_come(begin: Callable[[], None]) -> None:
    begin()
    expected = draw()
    for between in ([], [5], [5, 6]):
        begin()
        with streams.kept():
            for seed in between:
                streams.seed_all(seed)
                draw()
        with streams.kept():
            pass
        assert draw() == expected


def test_the_quick_way_is_taken_here(monkeypatch: pytest.MonkeyPatch) -> None:
    with streams.kept():
        pass  # by now it is known how the states lie in memory

    def slow(*_: Any, **__: Any) -> Any:
        raise AssertionError("the state was read number by number")

    monkeypatch.setattr(np.random, "get_state", slow)
    for _ in range(2):
        streams.look_closely()
        np.random.seed(1)
        with streams.kept():
            draw()


def test_a_numpy_that_keeps_its_words_elsewhere_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(streams._numpy.__dict__, "_understood", False)
    half_used()
    expected = draw()
    half_used()
    with streams.kept():
        draw()
    assert draw() == expected
