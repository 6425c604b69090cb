"""What adversaries see: that it is what was on the wire, and no more."""

import numpy as np
import pytest
import torch

from umbel.benchmarks.attack.tasks import CanaryTrainer, Coins
from umbel.benchmarks.attack.views import Played, play
from umbel.federation import Federation
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack

NODES = 6
COINS = np.array([True, False, True, True, False, True])
EVERYONE = {"rounds": 1, "cohort": "all", "sampling": "all", "client-eval-every": -1, "delta": 1e-5}


def played(stack: Stack, rounds: int = 1) -> Played:
    federation = Federation(
        trainer=CanaryTrainer(NODES, length=10.0), data=Coins(COINS), stack=stack
    )
    return play(federation, NODES, {**EVERYONE, "rounds": rounds})


@pytest.fixture(scope="module")
def plain() -> Played:
    return played(Stack([Clip(1.0)], PlainSum(weighting="fixed")), rounds=2)


def test_the_server_sees_each_reply_as_it_was_sent(plain: Played) -> None:
    view = plain.view("server")
    assert len(view.replies) == 2
    for node in range(NODES):
        expected = torch.zeros(NODES, dtype=torch.float64)
        expected[node] = float(COINS[node])  # clipped from 10 to 1
        assert torch.allclose(view.replies[0][node], expected, atol=1e-5)
    assert torch.allclose(view.totals[0].double(), torch.tensor(COINS, dtype=torch.float64))
    assert view.models[0].tolist() == [0.0] * NODES
    assert torch.equal(view.models[-1], view.final)


def test_others_see_models_only(plain: Played) -> None:
    node = plain.view("other-node")
    assert len(node.models) == 3
    assert node.replies == node.totals == node.wire == ()
    assert len(node.sums(1)) == 1
    user = plain.view("model-user")
    assert len(user.models) == 1
    assert user.sums(1) == []
    assert torch.allclose(user.final, 2 * torch.tensor(COINS).float() / NODES, atol=1e-5)


def test_central_noise_is_on_the_models_and_not_on_the_replies() -> None:
    run = played(Stack([Clip(1.0), Gaussian(5.0)], PlainSum(weighting="fixed")))
    view = run.view("server")
    assert view.replies[0][0][0] == pytest.approx(1.0, abs=1e-5)
    # Six draws of standard deviation 5: all within 0.01 of the sum has probability below 1e-17.
    noise = NODES * view.final.double() - view.totals[0].double()
    assert float(noise.abs().max()) > 0.01


def test_a_secure_sum_shows_the_sum_and_no_reply() -> None:
    collect = SecureSum(mode="semi-honest", min_cohort=3)
    run = played(Stack([Clip(1.0), Quantize(4096)], collect))
    view = run.view("server")
    assert dict(view.replies[0]) == {}
    assert torch.allclose(
        view.totals[0].double(), torch.tensor(COINS, dtype=torch.float64), atol=1e-2
    )
    assert sorted(view.wire[0]) == list(range(NODES))
    assert all(len(sent) > 200 for sent in view.wire[0].values())


def test_listening_changes_nothing() -> None:
    stack = Stack([Clip(1.0)], PlainSum(weighting="fixed"))
    quiet = play(
        Federation(trainer=CanaryTrainer(NODES, length=10.0), data=Coins(COINS), stack=stack),
        NODES,
        EVERYONE,
        listen=lambda number: number < 0,
    )
    assert torch.equal(quiet.final, played(stack).final)
    assert quiet.view("server").replies == ({},)
    assert isinstance(stack.collect, PlainSum)
    assert "gather" not in vars(stack.collect)
