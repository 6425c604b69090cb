"""Server optimisers give what Flower's own strategies give for the same replies."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower

from tests.fakes import collected, gathering, reply, request
from umbel.core.errors import ConfigError
from umbel.core.flower import take_identity
from umbel.core.registry import make
from umbel.strategies.collect import PlainSum
from umbel.strategies.optimizers import Adaptive, FedAvg, FedAvgM, ServerOptimizer
from umbel.strategies.run_options import RunOptions

SIZE, NODES, ROUNDS = 12, (1001, 1002, 1003, 1004), 6
Pair = tuple[Callable[[], Any], ServerOptimizer]
PAIRS: dict[str, Pair] = {
    "fedavg": (lambda: flower.FedAvg(), FedAvg()),
    "fedavgm": (
        lambda: flower.FedAvgM(server_learning_rate=0.7, server_momentum=0.8),
        FedAvgM(0.7, 0.8),
    ),
    "fedadam": (
        lambda: flower.FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-3),
        Adaptive("fedadam", 0.05, 0.8, 0.95, 1e-3),
    ),
    "fedyogi": (
        lambda: flower.FedYogi(eta=0.05, beta_1=0.8, beta_2=0.95, tau=1e-3),
        Adaptive("fedyogi", 0.05, 0.8, 0.95, 1e-3),
    ),
    "fedadagrad": (
        lambda: flower.FedAdagrad(eta=0.05, tau=1e-3),
        Adaptive("fedadagrad", 0.05, epsilon=1e-3),
    ),
}


class FourNodes(Grid):
    """What a strategy needs of a grid to choose its nodes."""

    set_run = run = create_message = get_nodes = None
    push_messages = pull_messages = send_and_receive = None

    def get_node_ids(self) -> list[int]:
        return list(NODES)


def updates(number: int) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(number)
    return [(torch.randn(SIZE, generator=generator) * 0.3, 7 * i + 1) for i in range(len(NODES))]


def flowers_way(strategy: Any) -> list[np.ndarray[Any, Any]]:
    """The models of each round when Flower's strategy gets whole models from its nodes."""
    take_identity(1)
    model, models = torch.linspace(-1, 1, SIZE).numpy(), []
    for number in range(1, ROUNDS + 1):
        arrays = ArrayRecord({"w": Array(model)})
        list(strategy.configure_train(number, arrays, ConfigRecord(), FourNodes()))
        replies = []
        for node, (update, examples) in zip(NODES, updates(number), strict=True):
            trained = ArrayRecord({"w": Array(model + update.numpy())})
            metrics = MetricRecord({"num-examples": examples})
            content = RecordDict({"arrays": trained, "metrics": metrics})
            replies.append(Message(content, reply_to=request(node)))
        after, _ = strategy.aggregate_train(number, replies)
        model = after["w"].numpy()
        models.append(model)
    return models


def our_way(optimizer: ServerOptimizer) -> list[np.ndarray[Any, Any]]:
    model = torch.linspace(-1, 1, SIZE)
    slots, models = optimizer.init(model), []
    for number in range(1, ROUNDS + 1):
        rows = zip(NODES, updates(number), strict=True)
        replies = [reply(node, update, examples) for node, (update, examples) in rows]
        total = collected(PlainSum(), replies, NODES, gathering(SIZE))
        model, slots = optimizer.step(model, total.total / total.denominator, slots)
        models.append(model.numpy())
    return models


@pytest.mark.parametrize("name", PAIRS)
def test_it_agrees_with_flower(name: str) -> None:
    strategy, optimizer = PAIRS[name]
    for number, (theirs, ours) in enumerate(
        zip(flowers_way(strategy()), our_way(optimizer), strict=True), start=1
    ):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6, err_msg=f"round {number}")


@pytest.mark.parametrize("name", PAIRS)
def test_inputs_are_not_mutated_and_names_agree(name: str) -> None:
    options = RunOptions.defaults() | {"server-learning-rate": 0.1}
    optimizer: ServerOptimizer = make("optimizer", name, options)
    assert optimizer.name == name
    model, update = torch.ones(3), torch.full((3,), 0.5)
    slots = optimizer.init(model)
    before = {key: value.clone() for key, value in slots.items()}
    after, next_slots = optimizer.step(model, update, slots)
    assert (model.tolist(), update.tolist()) == ([1.0] * 3, [0.5] * 3)
    assert all(torch.equal(slots[key], before[key]) for key in before)
    assert next_slots.keys() == slots.keys()
    assert (after > model).all()
    double, _ = optimizer.step(model.double(), update, optimizer.init(model.double()))
    assert double.dtype == torch.float64


def test_momentum_without_momentum_is_the_average() -> None:
    model, update = torch.ones(3), torch.randn(3)
    plain, _ = FedAvg().step(model, update, {})
    momentum, _ = FedAvgM(1.0, 0.0).step(model, update, FedAvgM().init(model))
    assert torch.equal(plain, momentum)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"'fedadan'.*fedavg, fedavgm, fedadam"):
        RunOptions(optimizer="fedadan")
