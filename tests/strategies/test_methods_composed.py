"""Every method with every protection: it works, or is refused with a sentence."""

from typing import Any

import pytest
import torch

from tests.strategies.quadratics import (
    NODES,
    RATE,
    SIZE,
    Run,
    curvature,
    near,
    nodes,
    optimum,
    slope,
)
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.base import check_honours
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.clients.trainers.softmax import SoftmaxTrainer
from umbel.core.errors import ConfigError, RunError, StackError
from umbel.core.registry import make, names
from umbel.strategies.composition import check_rounds, compose
from umbel.strategies.facts import Facts
from umbel.strategies.methods.ditto import Ditto
from umbel.strategies.methods.fedprox import FedProx
from umbel.strategies.methods.fedrep import FedRep
from umbel.strategies.methods.named import KIND
from umbel.strategies.methods.options import MethodOptions
from umbel.strategies.methods.personal_parts import PersonalParts, named_parts
from umbel.strategies.methods.scaffold import Scaffold
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.protection import Outlook
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.stack import Stack

PROTECTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "secure": {"secure": True, "secure-metrics": "", "secure-weighting": "equal"},
    "central": {"epsilon": 50.0, "clipping-norm": 3.0},
    "secure and central": {"epsilon": 50.0, "clipping-norm": 3.0, "secure": True},
    "local": {"epsilon": 50.0, "clipping-norm": 3.0, "mechanism": "local"},
}
OWN = {"fedprox": {"proximal-mu": 0.5}, "fedper": {"personal-layers": "head*"}}
OWN["fedrep"] = OWN["fedper"]
OWN["afl"] = {"afl-rate": 0.01}  # local noise may throw a model far, and its loss with it
MODEL = {"body": torch.zeros(3), "head.weight": torch.zeros(1)}
BUFFERS = {"head.running_mean": torch.zeros(1)}
MORE = {
    "scaffold": SIZE,
    "fednova": 1,
    "fedexp": 1,
    "q-fedavg": 1,
    "fedper": -1,
    "fedbn": -1,
    "afl": 1,
}
MORE["fedrep"] = -1


def options_of(method: str, protection: str) -> dict[str, Any]:
    return {
        **RunOptions.defaults(),
        **PrivacyOptions.defaults(),
        **SecureOptions.defaults(),
        **MethodOptions.defaults(),
        "rounds": 4,
        "method": method,
        **OWN.get(method, {}),
        **PROTECTIONS[protection],
    }


METHODS = names(KIND)


def layer_of(options: dict[str, Any], buffers: Any = BUFFERS) -> Any:
    RunOptions.read(options)
    return make(KIND, options["method"], options, lambda: (MODEL, buffers))


def stack_of(method: str, protection: str) -> Stack:
    options = options_of(method, protection)
    layer = layer_of(options)
    return compose(Stack(() if layer is None else (layer,)), options, lambda: SIZE)


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("method", METHODS)
def test_every_pair_works(method: str, protection: str) -> None:
    """The vector is bounded as a whole, and both halves make a round of it."""
    stack = stack_of(method, protection)
    assert method == "fedavg" or stack.layers[0].name == method
    decided = stack.with_noise(1e-3)
    facts = Facts(SIZE, expected_replies=NODES, max_replies=NODES, population=NODES)
    check_rounds(decided, facts)
    before = facts.replace(round=1)
    places = decided.places(before, decided.init(SIZE))
    if protection != "plain":
        assert places[1 + (method != "fedavg")].l2_bound is not None
        size = SIZE + MORE.get(method, 0)
        bounded = next(place for place in places if place.l2_bound is not None)
        assert bounded.size == size, "the bound is that of all segments together"
    trial = Run(decided, nodes(), [4] * NODES)
    assert bool(torch.isfinite(trial.rounds(2)).all())
    if protection == "secure" and method not in (
        "q-fedavg",
        "afl",
    ):  # whose longer vectors are clipped
        assert near(
            trial.model, Run(stack_of(method, "plain"), nodes(), [4] * NODES).rounds(2), 1e-2
        )
    if "central" in protection or protection == "local":
        assert decided.claims(decided.check(before, decided.init(SIZE)))


def test_scaffold_finds_the_optimum_under_a_secure_sum() -> None:
    trial = Run(stack_of("scaffold", "secure"), nodes(), [10] * NODES)
    assert near(trial.rounds(150), optimum(nodes()), 1e-2)
    assert not near(Run(Stack(), nodes(), [10] * NODES).rounds(150), optimum(nodes()), 2e-2)


TORCH = TorchTrainer(lambda: torch.nn.Linear(2, 2))


def test_trainers_that_would_leave_out_what_a_method_asks_for_are_refused() -> None:
    private = PrivateSgd(trainer=TORCH)
    deaf = SoftmaxTrainer(width=2)
    beyond = {"fedrep", "per-fedavg"}
    for method in METHODS:
        layer = layer_of(options_of(method, "plain"))
        stack = Stack(() if layer is None else (layer,))
        if method == "fedprox":
            stack = Stack((FedProx(0.1),))
        check_honours(TORCH, stack)
        for trainer, refused in (
            (private, {"q-fedavg", "afl", "ditto", *beyond}),
            (deaf, {"fedprox", "scaffold", "feddyn", "fednova", "ditto", *beyond}),
        ):
            if method in refused:
                with pytest.raises(ConfigError, match=r"; take|, or leave"):
                    check_honours(trainer, stack)
            else:
                check_honours(trainer, stack)


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("scafold", {}, "it can be .*fedavg, fedprox, scaffold"),
        ("fedprox", {"proximal-mu": 0.0}, "needs proximal-mu above 0"),
        ("fedper", {"personal-layers": ""}, "does not say which"),
        ("fedrep", {"personal-layers": ""}, "method=fedrep keeps parts.* does not say which"),
        ("fedrep", {"fedrep-head-epochs": 0}, "fedrep-head-epochs is 0"),
        ("afl", {"afl-rate": 0.0}, "afl-rate is 0.0; it must be above 0"),
        ("per-fedavg", {"perfedavg-alpha": 0.0}, "perfedavg-alpha is 0.0; it must be above 0"),
        ("fedper", {"personal-layers": "tail"}, "which is no parameter of the model"),
        ("fedper", {"personal-layers": "*"}, "nothing is learned together"),
        ("feddyn", {"feddyn-alpha": 0.0}, "feddyn-alpha is 0.0; it must be above 0"),
        ("q-fedavg", {"qfedavg-q": -1.0}, "qfedavg-q is -1"),
    ],
)
def test_bad_input_is_a_sentence(method: str, more: dict[str, Any], words: str) -> None:
    with pytest.raises((ConfigError, StackError), match=words):
        layer_of(options_of(method, "plain") | more)


def test_batch_normalisation_is_asked_for_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="the model has none"):
        layer_of(options_of("fedbn", "plain"), {})


# ---- what stays on the nodes


def test_dittos_personal_models_are_the_closed_form() -> None:
    """(H_i + lambda) v = H_i w_i + lambda w, w the common model where that stops."""
    strength = 0.4
    layer = Ditto(strength)
    trial = Run(Stack((layer,)), nodes(), [10] * NODES)
    common = trial.rounds(150)
    assert near(common, Run(Stack(), nodes(), [10] * NODES).rounds(150), 1e-12)
    for node, part in enumerate(nodes()):
        eye = torch.eye(SIZE, dtype=torch.float64)
        bent = curvature(part) + strength * eye
        wanted = torch.linalg.solve(bent, slope(part) + strength * common)
        assert near(trial.own(node), wanted)


def test_personal_parts_are_each_nodes_and_the_rest_is_everybodys() -> None:
    """With all in one step the shared part descends the sum, each node's own part its loss."""
    layer = PersonalParts(named_parts({"a": 1, "head": 2, "b": 1}, "head"), SIZE)
    assert layer.parts == ((1, 3),)
    trial = Run(Stack((layer,)), nodes(), [1] * NODES)
    trial.rounds(1500)
    assert not bool(trial.model[1:3].any()), "the server never learned the personal part"
    owns = [trial.own(node) for node in range(NODES)]
    gradients = [curvature(p) @ w - slope(p) for p, w in zip(nodes(), owns, strict=True)]
    assert all(near(g[1:3], torch.zeros(2, dtype=torch.float64)) for g in gradients)
    shared = torch.stack(gradients).mean(0)[[0, 3]]
    assert near(shared, torch.zeros(2, dtype=torch.float64))
    assert all(torch.equal(own[[0, 3]], trial.model[[0, 3]]) for own in owns)


def test_fedreps_heads_are_solved_before_the_body_steps() -> None:
    """One round by the paper's own order, and where it stops."""
    layer = FedRep(((1, 3),), SIZE, head_epochs=7)
    assert [phase.trains for phase in layer.phases()] == [((1, 3),), ((0, 1), (3, 4))]
    trial = Run(Stack((layer,)), nodes(), [1] * NODES)
    start = trial.model
    body, bodies = torch.tensor([0, 3]), []
    for part in nodes():
        own = start.clone()
        for _ in range(7):
            own[1:3] -= RATE * (curvature(part) @ own - slope(part))[1:3]
        bodies.append((-RATE * (curvature(part) @ own - slope(part)))[body])
    assert near(trial.rounds(1)[body], torch.stack(bodies).mean(0), 1e-12)
    trial.rounds(800)
    owns = [trial.own(node) for node in range(NODES)]
    gradients = [curvature(p) @ w - slope(p) for p, w in zip(nodes(), owns, strict=True)]
    assert all(near(g[1:3], torch.zeros(2, dtype=torch.float64)) for g in gradients)
    assert near(torch.stack(gradients).mean(0)[body], torch.zeros(2, dtype=torch.float64))


def test_two_layers_cannot_both_say_what_nodes_train_in_turn() -> None:
    first = FedRep(((1, 3),), SIZE)
    with pytest.raises(StackError, match="fedrep and other both say"):
        Stack((first, FedRep(((0, 1),), SIZE, name="other"))).phases  # noqa: B018


def test_a_node_that_remembers_another_model_is_refused() -> None:
    trial = Run(Stack((Scaffold(),)), nodes(), [1] * NODES)
    trial.rounds(1)
    memory = trial.memory(0, "scaffold")
    memory["own"] = torch.zeros(7)
    with pytest.raises(RunError, match="is of another model"):
        trial.rounds(1)


def test_a_run_goes_on_from_its_states_and_memories() -> None:
    whole, first = (Run(Stack((Scaffold(),)), nodes(), [3] * NODES) for _ in range(2))
    model = first.rounds(4)
    second = Run(Stack((Scaffold(),)), nodes(), [3] * NODES, model=model, number=4)
    second.states, second.memories = first.states, first.memories
    assert torch.equal(second.rounds(5), whole.rounds(9))


def test_options_of_another_method_are_refused() -> None:
    for name, value in (("feddyn-alpha", 0.5), ("personal-layers", "head"), ("qfedavg-q", 3.0)):
        own = MethodOptions.read({name: value})
        with pytest.raises(ConfigError, match=f"{name} is {value}, but method is scaffold"):
            own.check_for("scaffold")


def test_policies_are_told_what_methods_take_into_the_update() -> None:
    """A loss is a metric and steps tell of numbers of examples: summed or noised, never none."""
    for method, metrics, counts in (
        ("scaffold", "none", "none"),
        ("q-fedavg", "summed", "none"),
        ("afl", "summed", "none"),
        ("fednova", "none", "summed"),
    ):
        found = Outlook(stack_of(method, "secure"), SIZE).under({})
        assert (found.metrics, found.counts) == (metrics, counts)
