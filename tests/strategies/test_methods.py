"""Methods against their mathematics: quadratics in float64, to 1e-8."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from torch import Tensor, nn

from tests.strategies.quadratics import (
    NODES,
    RATE,
    SIZE,
    TRAINER,
    Run,
    curvature,
    descended,
    near,
    nodes,
    optimum,
    slope,
)
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import Job, Weights
from umbel.core.errors import ConfigError, RunError, StackError
from umbel.strategies.contexts import Memory, NodeContext
from umbel.strategies.facts import Facts
from umbel.strategies.methods.afl import AgnosticFL
from umbel.strategies.methods.feddyn import FedDyn
from umbel.strategies.methods.fedexp import FedExP
from umbel.strategies.methods.fednova import FedNova
from umbel.strategies.methods.fedprox import FedProx
from umbel.strategies.methods.needs import effective_steps
from umbel.strategies.methods.perfedavg import PerFedAvg
from umbel.strategies.methods.qfedavg import QFedAvg
from umbel.strategies.methods.scaffold import Scaffold
from umbel.strategies.objective import Correction
from umbel.strategies.stack import Stack
from umbel.testing import check_layer

TEN = [10] * NODES
UNEQUAL = [1, 3, 5, 12, 20]


def run(*layers: Any, steps: Any = TEN, **more: Any) -> Run:
    return Run(Stack(layers), nodes(), steps, **more)


def drifted(steps: Any, *, normalised: bool = False, rate: float = RATE, mu: float = 0.0) -> Tensor:
    """Where averaging after local steps stops: the zero of the mean update.

    Node i's update from w is P_i (H_i w_i - H_i w), P_i = (I - (I - rate B_i)^K) B_i^-1, where B_i
    is H_i + mu I and w_i the node's own optimum.
    """
    eye = torch.eye(SIZE, dtype=torch.float64)
    left, right = (
        torch.zeros(SIZE, SIZE, dtype=torch.float64),
        torch.zeros(SIZE, dtype=torch.float64),
    )
    for part, count in zip(nodes(), steps, strict=True):
        bent = curvature(part) + mu * eye
        pull = (eye - torch.linalg.matrix_power(eye - rate * bent, count)) @ torch.linalg.inv(bent)
        pull = pull / (count * rate) if normalised else pull / rate
        left, right = left + pull @ curvature(part), right + pull @ slope(part)
    return torch.linalg.solve(left, right)


@pytest.mark.parametrize(
    "layer",
    [FedProx(0.1), Scaffold(), FedDyn(), FedNova(), FedExP(), QFedAvg(), PerFedAvg(), AgnosticFL()],
    ids=lambda m: m.name,
)
def test_methods_keep_the_laws_of_layers(layer: Any) -> None:
    check_layer(layer)
    if not isinstance(layer, FedProx):
        with pytest.raises(StackError, match=f"put {layer.name} first"):
            layer.check(_facts().replace(l2_bound=1.0), layer.init(SIZE))
    assert Stack((layer,)).objectives == ((layer,) if hasattr(layer, "begin") else ())


def _facts() -> Facts:
    return Facts(SIZE, round=1, expected_replies=5.0, max_replies=5, kind="sum")


def test_averaging_after_ten_steps_stops_beside_the_optimum() -> None:
    found = run().rounds(150)
    assert near(found, drifted(TEN))
    assert not near(found, optimum(nodes()), 1e-2)


@pytest.mark.parametrize("layer", [Scaffold(), FedDyn(2.0)], ids=lambda m: m.name)
def test_drift_corrections_reach_the_optimum(layer: Any) -> None:
    assert near(run(layer).rounds(250), optimum(nodes()))


def test_scaffold_reaches_it_when_few_take_part() -> None:
    """Two of five nodes a round, in turn; weights that are the same for all."""
    found = run(Scaffold()).rounds(500, sampled=[(0, 1), (2, 3), (4, 0), (1, 2), (3, 4)])
    assert near(found, optimum(nodes()))


def test_scaffold_with_momentum_reaches_it_too() -> None:
    """Momentum makes ten steps reach farther; controls must not be that much longer."""
    rate = RATE / 10
    found = run(Scaffold(0.9), rate=rate, momentum=0.9).rounds(400)
    assert near(found, optimum(nodes()), 1e-6)
    deaf = run(Scaffold(), rate=rate, momentum=0.9).rounds(400)
    assert not near(deaf, optimum(nodes()), 1e-2)


def test_scaffold_of_one_step_with_everybody_is_gradient_descent() -> None:
    trial, model = run(Scaffold(), steps=[1] * NODES), torch.zeros(SIZE, dtype=torch.float64)
    parts = nodes()
    for _ in range(5):
        gradients = [curvature(p) @ model - slope(p) for p in parts]
        model = model - RATE * torch.stack(gradients).mean(0)
        assert near(trial.rounds(1), model, 1e-12)


def test_the_servers_control_is_the_mean_of_the_nodes() -> None:
    trial = run(Scaffold())
    trial.rounds(7)
    own = [_own(trial, node) for node in range(NODES)]
    assert near(trial.states[0]["control"], torch.stack(own).mean(0), 1e-11)
    alone = run(Scaffold())
    alone.rounds(3, sampled=[(0, 1), (2, 3)])
    kept = [_own(alone, node) for node in range(NODES)]
    assert near(alone.states[0]["control"], torch.stack(kept).mean(0), 1e-11)


def _own(trial: Run, node: int) -> Tensor:
    memory = Memory(trial.memories[node], "scaffold")
    return memory["own"] if "own" in memory else torch.zeros(SIZE, dtype=torch.float64)


def test_unequal_steps_move_the_optimum_and_fednova_puts_it_back() -> None:
    """Both stop where their closed forms say, at small rates at the wrong and the right optimum."""
    wrong, right = optimum(nodes(), [float(n) for n in UNEQUAL]), optimum(nodes())
    assert near(run(FedNova(), steps=UNEQUAL).rounds(150), drifted(UNEQUAL, normalised=True))
    assert near(run(steps=UNEQUAL).rounds(150), drifted(UNEQUAL))
    assert near(drifted(UNEQUAL, normalised=True, rate=1e-7), right, 1e-4)
    assert near(drifted(UNEQUAL, rate=1e-7), wrong, 1e-4)
    assert not near(wrong, right, 0.1)


def test_fednova_with_equal_steps_is_averaging() -> None:
    assert near(run(FedNova()).rounds(3), run().rounds(3), 1e-12)


def test_fednova_counts_what_momentum_adds() -> None:
    """a = sum over steps of what one gradient adds: three steps at 0.5 are 1.75 + 1.5 + 1."""
    assert effective_steps(3, 0.5) == pytest.approx(1.75 + 1.5 + 1.0, abs=1e-12)
    assert effective_steps(7, 0.0) == 7


def test_fedprox_stops_where_it_should() -> None:
    mu = 3.0
    assert near(run(FedProx(mu)).rounds(150), drifted(TEN, mu=mu))


def test_the_option_of_fedprox_is_the_layer() -> None:
    options = {**TRAINER.OPTIONS, "proximal-mu": 0.7, "local-steps": 6}
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    weights = Weights({"weight": start.view(1, SIZE)})
    alone = TRAINER.train(weights, nodes()[1], Job(1, 0, options, RATE))
    correction = Stack((FedProx(0.7),)).begin(start, NodeContext(), RecordDict())
    job = Job(1, 0, options, RATE, correction=correction)
    layer = TRAINER.train(weights, nodes()[1], job)
    assert torch.equal(*(t.weights.parameters["weight"] for t in (alone, layer)))
    assert near(
        layer.weights.parameters["weight"][0],
        descended(nodes()[1], start, 6, RATE, correction),
        1e-5,
    )


def test_qfedavg_of_zero_is_averaging_and_more_is_fairer() -> None:
    assert near(run(QFedAvg(0.0)).rounds(4), run().rounds(4), 1e-12)
    spreads = []
    for q in (0.0, 2.0):
        trial = run(QFedAvg(q), steps=[2] * NODES)
        model = trial.rounds(300)
        losses = torch.stack([((p.x @ model - p.y[:, 0]) ** 2).mean() for p in nodes()])
        spreads.append(float(losses.var()))
    assert spreads[1] < 0.8 * spreads[0]


def test_qfedavg_is_algorithm_2() -> None:
    """One round by the paper's own symbols."""
    q, parts = 2.0, nodes()
    start = torch.zeros(SIZE, dtype=torch.float64)
    deltas, weights = [], []
    for part in parts:
        local = start.clone()
        for _ in range(10):
            local = local - RATE * (curvature(part) @ local - slope(part))
        loss = ((part.x @ start - part.y[:, 0]) ** 2).mean()
        delta = (start - local) / RATE
        deltas.append(loss**q * delta)
        weights.append(q * loss ** (q - 1) * delta.square().sum() + loss**q / RATE)
    wanted = start - torch.stack(deltas).sum(0) / torch.stack(weights).sum(0)
    assert near(run(QFedAvg(q)).rounds(1), wanted)


def test_afl_reaches_the_minimax() -> None:
    """The optimum of a mixture, whose nodes with weight are all as bad and worse than the rest."""
    trial = run(AgnosticFL(0.01), steps=[1] * NODES)
    model, parts = trial.rounds(1000), nodes()
    losses = torch.stack([((p.x @ model - p.y[:, 0]) ** 2).mean() for p in parts])
    logs = torch.stack([trial.memory(node, "afl")["log"] for node in range(NODES)])
    mixture = torch.softmax(logs, 0)
    active = mixture > 1e-3
    assert 1 < int(active.sum()) < NODES
    assert near(losses[active], losses.max().expand(int(active.sum())))
    assert bool((losses[~active] < losses.max() - 1).all())
    assert near(model, optimum(parts, mixture.tolist()))
    assert float(losses.max()) < float(
        torch.stack([((p.x @ optimum(parts) - p.y[:, 0]) ** 2).mean() for p in parts]).max()
    )


def test_afl_keeps_weights_over_rounds_without_a_node() -> None:
    trial = run(AgnosticFL(0.01), steps=[1] * NODES)
    trial.rounds(6, sampled=[(0, 1), (1, 2, 3)])
    with pytest.raises(KeyError):
        trial.memory(4, "afl")["log"]
    before = trial.memory(0, "afl")["log"]
    trial.rounds(1, sampled=[(1, 4)])
    assert torch.equal(trial.memory(0, "afl")["log"], before)
    with pytest.raises(RunError, match="lower afl-rate"):
        run(AgnosticFL(100.0)).rounds(1)


def test_fedexp_steps_as_far_as_the_paper_says() -> None:
    plain, further = run(), run(FedExP(eps=1e-3))
    mean = plain.rounds(1)
    updates = [run(steps=TEN).rounds(1, sampled=[(node,)]) for node in range(NODES)]
    square = torch.stack(updates).square().sum() / NODES
    rate = max(1.0, float(square / (2 * (mean.square().sum() + 1e-3))))
    assert near(further.rounds(1), rate * mean) and further.metrics["fedexp.rate"] == rate
    alike = Run(Stack((FedExP(),)), nodes()[:1] * 3, [10] * 3)
    assert near(alike.rounds(3), Run(Stack(), nodes()[:1] * 3, [10] * 3).rounds(3), 1e-12)


@pytest.mark.parametrize("steps", [1, 10])
def test_per_fedavg_stops_where_one_step_leads_to_the_optimum(steps: int) -> None:
    """The mean of (I - alpha H_i) (H_i w - r_i), over local steps of B_i = (I - alpha H_i) H_i."""
    alpha, eye = 0.05, torch.eye(SIZE, dtype=torch.float64)
    left = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    right = torch.zeros(SIZE, dtype=torch.float64)
    for part in nodes():
        look = eye - alpha * curvature(part)
        bent = look @ curvature(part)
        way = eye - torch.linalg.matrix_power(eye - RATE * bent, steps)
        pull = way @ torch.linalg.inv(bent) @ look
        left, right = left + pull @ curvature(part), right + pull @ slope(part)
    found = run(PerFedAvg(alpha), steps=[steps] * NODES).rounds(900 // steps + 200)
    assert near(found, torch.linalg.solve(left, right))
    assert not near(found, optimum(nodes()), 1e-2)


def test_trainers_step_ahead_and_leave_parts_as_the_mathematics_does() -> None:
    """The gradient at w - alpha gradient(w), and parameters that a phase does not train."""
    options = {**TRAINER.OPTIONS, "local-steps": 6}
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    for correction in (
        Correction(ahead=0.2),
        Correction(anchor=0 * start, strength=0.3, ahead=0.1),
    ):
        job = Job(1, 0, options, RATE, correction=correction)
        found = TRAINER.train(Weights({"weight": start.view(1, SIZE)}), nodes()[1], job)
        wanted = descended(nodes()[1], start, 6, RATE, correction)
        assert near(found.weights.parameters["weight"][0], wanted, 1e-6)
    two = TorchTrainer(Halves, loss="mse", batch_size=0)
    halves = {"one": start[:2].clone(), "other": start[2:].clone()}
    for correction in (Correction(trains=((2, 4),)), Correction(start, start, 0.4, ((0, 2),))):
        job = Job(1, 0, {**options, "weight-decay": 0.0}, RATE, correction=correction)
        found = two.train(Weights(dict(halves)), nodes()[1], job)
        wanted = descended(nodes()[1], start, 6, RATE, correction)
        assert near(torch.cat(list(found.weights.parameters.values())), wanted, 1e-6)
    with pytest.raises(ConfigError, match="trains 1 of the 2 values of one"):
        job = replace(job, correction=Correction(trains=((1, 4),)))
        two.train(Weights(dict(halves)), nodes()[1], job)


class Halves(nn.Module):
    """The same line, as two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        self.other = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ torch.cat([self.one, self.other]))[:, None]


def test_objectives_of_one_stack_add_up() -> None:
    """Two pulls are the pull of their sum; a pull and a control act together."""
    two = run(FedProx(1.0), FedProx(2.0, name="other")).rounds(3)
    assert near(two, run(FedProx(3.0)).rounds(3), 1e-12)
    assert near(run(FedProx(0.5), Scaffold()).rounds(250), optimum(nodes()))


def test_batched_training_is_training_one_by_one() -> None:
    """Offsets and anchors of their own, another number of steps each."""
    generator = torch.Generator().manual_seed(1)
    options = {**TRAINER.OPTIONS, "batched": "on", "local-epochs": 3, "momentum": 0.5}
    start = Weights({"weight": torch.randn(1, SIZE, generator=generator, dtype=torch.float64)})
    flat = start.parameters["weight"].flatten()

    def vector() -> Tensor:
        return torch.randn(SIZE, generator=generator, dtype=torch.float64)

    kinds = [
        [Correction(vector(), vector(), 0.3 * n) for n in range(NODES)],
        [Correction(anchor=flat, strength=0.7)] * NODES,
        [Correction(offset=vector()) if n % 2 else None for n in range(NODES)],
        [Correction(strength=1.0 + n) for n in range(NODES)],
    ]
    parts = [part.take(slice(0, 12 - n)) for n, part in enumerate(nodes())]
    for corrections in kinds:
        jobs = [
            replace(Job(1, n, options | {"batch-size": 5}, RATE), correction=one)
            for n, one in enumerate(corrections)
        ]
        together = TRAINER.train_cohort([start] * NODES, parts, jobs)
        assert together is not None
        for found, part, job in zip(together, parts, jobs, strict=True):
            alone = TRAINER.train(start, part, job)
            one, other = (t.weights.parameters["weight"] for t in (found, alone))
            assert near(one, other, 1e-5) and found.steps == alone.steps > 0
