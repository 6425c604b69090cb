"""`assert_private` on federations that keep their promise, and on those that do not."""

import numpy as np
import pytest

from umbel.benchmarks.attack.defences import quarter_noise
from umbel.benchmarks.attack.tasks import CanaryTrainer, Coins
from umbel.federation import Federation
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.stack import Stack
from umbel.testing import assert_private

NOISE = 3.7307  # epsilon 1 at delta 1e-5 for one round of everybody
NOISY = Stack([Clip(0.5), Gaussian(NOISE)], PlainSum(weighting="fixed"))


def federation(stack: Stack) -> Federation:
    """Any trainer and any data: the audit replaces both."""
    return Federation(
        trainer=CanaryTrainer(4, 1.0), data=Coins(np.ones(4, dtype=bool)), stack=stack
    )


def test_a_correct_stack_passes() -> None:
    audit = assert_private(federation(NOISY), epsilon=1.01)
    assert audit.claimed == pytest.approx(1.0, rel=1e-2)
    assert not audit.refuted


def test_a_stack_without_promise_fails() -> None:
    with pytest.raises(AssertionError, match="promises nothing"):
        assert_private(federation(Stack()))
    with pytest.raises(AssertionError, match="promises nothing against server"):
        assert_private(federation(NOISY), against="server")


def test_too_large_a_promise_fails() -> None:
    with pytest.raises(AssertionError, match=r"0\.5 is allowed"):
        assert_private(federation(NOISY), epsilon=0.5)


def test_a_broken_stack_fails() -> None:
    with pytest.raises(AssertionError, match="was measured"):
        assert_private(federation(quarter_noise(NOISY)), canaries=1000)
