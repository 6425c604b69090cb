"""Random-k: nothing is lost, every stack takes it, and what travels is smaller."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from tests.strategies.quadratics import NODES, SIZE, Run, near, nodes, optimum
from tests.strategies.test_methods_composed import PROTECTIONS, layer_of, options_of
from umbel.clients.data.examples import Examples, Node
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.core.errors import ConfigError, RunError, StackError
from umbel.federation import Federation
from umbel.running import run
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.async_options import AsyncOptions
from umbel.strategies.composition import check_rounds, compose
from umbel.strategies.compression.options import CompressionOptions
from umbel.strategies.compression.random_k import RandomK
from umbel.strategies.contexts import NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.run_options import RunOptions
from umbel.strategies.stack import Stack


@given(
    size=st.integers(1, 60),
    fraction=st.floats(0.01, 1.0),
    away=st.sets(st.integers(1, 8), max_size=6),
    seed=st.integers(0, 2**31),
)
def test_what_arrived_and_what_is_kept_are_the_sum_of_the_updates(
    size: int, fraction: float, away: set[int], seed: int
) -> None:
    layer = RandomK(fraction, seed)
    memory: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    arrived, made = torch.zeros(size).double(), torch.zeros(size).double()
    for number in range(1, 9):
        if number in away:
            continue
        update = torch.randn(size, generator=generator, dtype=torch.float64)
        given_ = update.clone()
        sent = layer.encode(update, NodeContext(round=number, memory=memory))
        assert torch.equal(update, given_)
        assert len(sent) == layer.count(size) == max(1, round(fraction * size))
        places = layer.places(size, number)
        arrived[places] += sent
        made += update
    kept = memory.get("unsent", torch.zeros(size).double())
    assert torch.allclose(arrived + kept, made, rtol=0, atol=1e-12)


def test_the_places_are_the_same_for_all_and_others_in_each_round() -> None:
    layer = RandomK(0.1, 7)
    first = layer.places(1000, 1)
    assert torch.equal(first, RandomK(0.1, 7).places(1000, 1)) and len(set(first.tolist())) == 100
    assert not torch.equal(first, layer.places(1000, 2))
    assert not torch.equal(first, RandomK(0.1, 8).places(1000, 1))
    # The words of Philox are the same in every version: these are pinned, so that nodes agree.
    assert RandomK(0.3, 1).places(10, 1).tolist() == PINNED
    # 2,000 rounds of 10 of 100: a count is binomial(2000, 0.1), and 7 standard deviations off
    # has a chance below 3e-12 for each of 100 coordinates.
    counts = torch.zeros(100)
    for number in range(2000):
        counts[RandomK(0.1, 3).places(100, number)] += 1
    assert float((counts - 200).abs().max()) < 7 * (2000 * 0.1 * 0.9) ** 0.5


PINNED = [0, 5, 6]


def compressed(protection: str, fraction: float = 0.5, method: str = "fedavg") -> Stack:
    options = options_of(method, protection)
    layer = layer_of(options)
    first = () if layer is None else (layer,)
    return compose(Stack((*first, RandomK(fraction))), options, lambda: SIZE)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_every_protection_takes_it_and_protects_the_shorter_vector(protection: str) -> None:
    stack = compressed(protection)
    assert stack.layers[0].name == "random-k"
    decided = stack.with_noise(1e-3)
    facts = Facts(SIZE, expected_replies=NODES, max_replies=NODES, population=NODES)
    check_rounds(decided, facts)
    before = facts.replace(round=1)
    places = decided.places(before, decided.init(SIZE))
    assert {place.size for place in places[1:2]} == {SIZE // 2}
    if protection != "plain":
        bounded = next(place for place in places if place.l2_bound is not None)
        assert bounded.size == SIZE // 2, "it is clipped after what was left over was added"
    trial = Run(decided, nodes(), [4] * NODES)
    assert bool(torch.isfinite(trial.rounds(4)).all())
    if protection in ("central", "local"):  # noise in whole numbers counts coordinates too
        claims = decided.claims(decided.check(before, decided.init(SIZE)))
        plain = compose(Stack(), options_of("fedavg", protection), lambda: SIZE).with_noise(1e-3)
        assert [c.event for c in claims] == [
            c.event for c in plain.claims(plain.check(before, plain.init(SIZE)))
        ], "a round costs what it costs without compression"


def test_one_update_moves_the_sum_under_noise_by_no_more_than_the_bound() -> None:
    """Also where a node has kept a lot: the clip is behind the memory."""
    stack = Stack((RandomK(0.5), Clip(1.0), Gaussian(1.0)))
    memory = {"unsent": torch.full((SIZE,), 1e6)}
    sent = stack.layers[0].encode(torch.ones(SIZE), NodeContext(round=1, memory=memory))
    assert float(sent.norm()) > 1e5
    clipped = stack.layers[1].encode(sent, NodeContext(config={"norm": 1.0}, round=1))
    assert float(clipped.norm()) <= 1 + 1e-6


def test_it_finds_the_optimum_that_federated_averaging_finds() -> None:
    plain = Run(Stack(), nodes(), [1] * NODES).rounds(300)
    assert near(plain, optimum(nodes()), 1e-4)
    assert near(Run(compressed("plain"), nodes(), [1] * NODES).rounds(500), plain, 1e-2)


@pytest.mark.parametrize("method", ["scaffold", "fednova", "fedexp", "q-fedavg"])
def test_methods_that_send_more_than_the_update_are_refused(method: str) -> None:
    with pytest.raises(StackError, match="has to arrive whole; leave out the compression"):
        stack = compressed("plain", method=method)
        stack.check(Facts(SIZE, round=1), stack.init(SIZE))


def test_what_it_cannot_do_is_refused_with_a_sentence() -> None:
    with pytest.raises(ConfigError, match="nothing is compressed; give compression=random-k"):
        CompressionOptions(compression_fraction=0.5)
    with pytest.raises(ConfigError, match="compression-fraction"):
        CompressionOptions("random-k", 0.0)
    with pytest.raises(StackError, match="give 0 < f <= 1"):
        RandomK(1.5)
    with pytest.raises(RunError, match="was not told the round"):
        RandomK().encode(torch.ones(3), NodeContext())
    with pytest.raises(ConfigError, match="random-k sends other coordinates in each"):
        AsyncOptions("async").check(RunOptions(), Stack((RandomK(),)), promised=False)


def digits(node: Any, _: Any) -> Examples:
    """Handwritten digits, dealt out to the nodes."""
    x, y = load_digits(return_X_y=True)
    mine = slice(node.partition, None, node.partitions)
    return Examples(torch.tensor(x[mine] / 16, dtype=torch.float32), torch.tensor(y[mine]))


def perceptron() -> torch.nn.Module:
    layers = torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10)
    return torch.nn.Sequential(*layers)


def test_a_run_sends_so_much_less_and_learns(tmp_path: Path) -> None:
    federation = Federation(
        TorchTrainer(perceptron, learning_rate=0.3, local_epochs=4),
        digits,
        test=lambda options: digits(Node(0, 4, {}), options),
    )
    up, found = {}, {}
    ways: dict[str, dict[str, Any]] = {
        "whole": {},
        "part": {"compression": "random-k", "compression-fraction": 0.05},
        "secure": {"compression": "random-k", "compression-fraction": 0.05, "secure": True},
        "private": {"compression": "random-k", "compression-fraction": 0.05, "epsilon": 1e4},
    }
    for name, options in ways.items():
        result = run(federation, options={"rounds": 8, **options}, nodes=4, out=tmp_path / name)
        lines = RunDirectory.open(tmp_path / name).rounds()
        up[name], found[name] = lines[-1]["bytes_up"], result.metrics["accuracy"]
    assert up["part"] < up["whole"] / 10 and up["secure"] < up["whole"] / 5
    assert up["private"] < up["whole"] / 10
    assert found["whole"] > 0.9
    assert found["part"] > 0.75 and found["secure"] > 0.75, found
