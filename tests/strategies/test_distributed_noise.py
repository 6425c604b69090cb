"""Distributed noise: the sum has at least the noise that is claimed, whoever drops out."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from umbel.benchmarks.speed.apps import write_federation
from umbel.clients.data.examples import Node
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import ConfigError, RunError, StackError
from umbel.federation import Federation
from umbel.privacy.noise.skellam import SkellamDpEvent
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.rounds import Rounds
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.secure.distributed_skellam import (
    DistributedDiscreteGaussian,
    DistributedSkellam,
)
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum, modulus_bits
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, NodeContext

SIZE = 4096


def initial(options: Any) -> dict[str, Any]:  # noqa: ARG001
    return {"w": np.zeros(SIZE)}


def train(arrays: dict[str, Any], examples: Any, job: Any) -> Any:  # noqa: ARG001
    if examples < 0:
        raise RuntimeError("gone")
    return arrays, 1, {"loss": 3.5}  # no update at all: what comes out is noise


def federate(
    folder: Path, stack: Stack, nodes: int, lost: int = 0, options: dict[str, Any] | None = None
) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    def data(node: Node, _: Any) -> int:
        return -1 if node.partition < lost else 1

    federation = Federation(FunctionTrainer(initial, train), data, stack=stack)
    given = federation.complete({"rounds": 1, "client-eval-every": -1, **(options or {})})
    grid = EmbeddedGrid(federation.client_app(), nodes, run_config={"seed": 0})
    run = RunDirectory.create(None, "noise", {}, out=folder)
    rounds = Rounds(federation.job(given), grid, grid.roster(), run, SilentProgress())
    return rounds.fit().parameters["w"], run.rounds()


def stack(noise: Any, collect: Any = None) -> Stack:
    layers = (Clip(1.0), Rotate(), Quantize(64, "stochastic"), noise)
    return Stack(layers, collect or SecureSum(weighting="fixed"))


@pytest.mark.parametrize("lost", [0, 3])
@pytest.mark.parametrize("make", [DistributedSkellam, DistributedDiscreteGaussian])
def test_the_noise_of_the_sum_with_and_without_drop_outs(
    tmp_path: Path, make: Any, lost: int
) -> None:
    """Nine nodes, shares for six: with all of them 9/6 of the variance, with six of them 6/6.

    Mean and standard deviation within six standard errors, and the shape by Kolmogorov-Smirnov
    at 1e-7.
    """
    model, lines = federate(tmp_path, stack(make(0.5, min_cohort=6)), 9, lost)
    noise = model.numpy() * 9  # the denominator is the expected cohort
    expected = 0.5 * math.sqrt((9 - lost) / 6)
    assert abs(noise.mean()) < 6 * expected / math.sqrt(SIZE)
    assert abs(noise.std() / expected - 1) < 6 / math.sqrt(2 * SIZE) + 1e-3
    assert stats.kstest(noise / expected, "norm").pvalue > 1e-7
    assert lines[-1]["clients"] == 9 - lost


def test_below_the_smallest_cohort_nothing_is_released(tmp_path: Path) -> None:
    """Fail closed: with fewer shares the noise would be less than claimed."""
    with pytest.raises(Exception, match="given up"):
        federate(tmp_path, stack(DistributedSkellam(0.5, min_cohort=8)), 9, 2, {"rounds": 3})
    lines = RunDirectory.open(tmp_path).rounds()
    assert all(line["clients"] == 0 for line in lines)


def test_colluders_make_everybody_elses_share_larger() -> None:
    facts = Facts(size=64, l2_bound=1.0, grid=2.0**-6, expected_replies=9, max_replies=9)
    alone = DistributedSkellam(1.0, 6)
    wary = DistributedSkellam(1.0, 6, colluders=2)
    assert (alone.shares(facts), wary.shares(facts)) == (6, 4)
    assert wary.check(facts, None).noise == pytest.approx(1.0 * math.sqrt(9 / 4), rel=1e-4)
    with pytest.raises(StackError, match="lower colluders"):
        DistributedSkellam(1.0, 3, colluders=3).check(facts, None)


def test_the_smallest_cohort_follows_from_the_expected_one() -> None:
    facts = Facts(size=64, l2_bound=1.0, grid=2.0**-6, expected_replies=10.0, max_replies=14)
    checked = DistributedSkellam(1.0).check(facts, None)
    assert checked.min_replies == 7
    assert SecureSum().check(checked).min_replies == 7


def test_the_claim_is_on_the_widened_bound_and_says_against_whom() -> None:
    layers = stack(DistributedSkellam(1.5, 6))
    facts = Facts(size=1000, expected_replies=9, max_replies=9, round=1)
    bottom = layers.check(facts, layers.init(1000))
    (claim,) = layers.claims(bottom)
    assert isinstance(claim.event, SkellamDpEvent)
    assert bottom.l2_bound is not None and bottom.l2_bound > 1.0
    assert claim.event.l2 == pytest.approx(bottom.l2_bound / (bottom.grid or 0))
    assert math.sqrt(claim.event.variance) == pytest.approx(1.5 * claim.event.l2, rel=1e-5)
    assert (claim.against, claim.sampled, claim.seen_in_sum_only) == ("server", False, True)
    assert 0 < claim.extra_delta < 1e-20


def test_the_modulus_has_room_for_the_noise_and_the_sum() -> None:
    """A hundred nodes and a million parameters fit in about twenty bits."""
    layers = stack(DistributedSkellam(1.0))
    facts = Facts(size=1_000_000, expected_replies=100, max_replies=100, round=1)
    bottom = layers.check(facts, layers.init(1_000_000))
    assert 18 <= modulus_bits(bottom, 100) <= 21


@pytest.mark.parametrize(
    ("layers", "collect", "cure"),
    [
        ((Clip(1.0), DistributedSkellam(1.0)), SecureSum(weighting="equal"), "weighting"),
        ((Clip(1.0), Quantize(), DistributedSkellam(1.0)), PlainSum("fixed"), "over SecureSum"),
        ((Quantize(), DistributedSkellam(1.0)), SecureSum(), "put Clip before it"),
        ((DistributedSkellam(1.0),), SecureSum(), "put Clip before it"),
    ],
)
def test_stacks_that_would_not_be_private_are_refused(layers: Any, collect: Any, cure: str) -> None:
    built = Stack(layers, collect)
    facts = Facts(size=4, expected_replies=9, max_replies=9)
    with pytest.raises(StackError, match=cure):
        built.claims(built.check(facts, built.init(4)))


def test_a_node_without_noise_to_make_gets_none_to_leave_out() -> None:
    facts = Facts(size=4, l2_bound=1.0, grid=0.25, expected_replies=9)
    with pytest.raises(StackError, match="no noise yet"):
        DistributedSkellam().broadcast(None, facts)
    for bad in ({"min_cohort": -1}, {"colluders": -1}, {"noise_multiplier": 0.0}):
        with pytest.raises(StackError):
            DistributedSkellam(**bad)


def test_a_share_is_whole_steps_added_to_the_update() -> None:
    layer = DistributedSkellam(1.0)
    config = {"step": 0.125, "bound": 1.0, "noise-multiplier": 1.0, "shares": 4, "round": 1}
    update = torch.zeros(1000)
    update[:4] = 0.5
    out = layer.encode(update, NodeContext(config))
    steps = (out / 0.125).numpy()
    assert np.array_equal(steps, np.rint(steps))
    assert 0.3 < float((out - update).std()) < 0.7
    assert not torch.equal(out, layer.encode(update, NodeContext(config)))


@pytest.mark.parametrize("lie", [{"bound": 0.5}, {"step": 0.75}, {"bound": math.nan}])
def test_a_server_that_tells_too_small_a_bound_or_too_coarse_a_step_gets_nothing(
    lie: dict[str, float],
) -> None:
    layer = DistributedSkellam(1.0)
    config = {"step": 0.125, "bound": 1.0, "noise-multiplier": 1.0, "shares": 4, "round": 1}
    update = torch.tensor([0.5, 0.5, 0.5, 0.5])
    layer.encode(update, NodeContext(config))
    with pytest.raises(RunError, match="no update is sent"):
        layer.encode(update, NodeContext(config | lie))


def test_epsilon_alone_with_secure_makes_the_whole_private_run(tmp_path: Path) -> None:
    """Options to certificate: the noise is calibrated, charged, and checked again by verify."""
    from umbel.running import run
    from umbel.server.private.verify import verify

    app = Path(__file__).parents[2] / "examples" / "clinics"
    options = {"secure": True, "epsilon": 6.0, "delta": 1e-3, "rounds": 3}
    result = run(app, options=options, workers=0, out=tmp_path / "run", progress=SilentProgress())
    assert result["epsilon_against"]["server"] == pytest.approx(6.0, rel=1e-3)
    assert result["epsilon_against"]["model-user"] <= 6.0
    certificate = json.loads((tmp_path / "run" / "certificate.json").read_text())
    rows = {row["event"]["mechanism"]: row["times"] for row in certificate["events"]}
    assert rows == {"skellam": 3}
    assert {g["relation"] for g in certificate["guarantees"]} == {"zero-out-one"}
    assert not verify(tmp_path / "run")


FAILING = """
import numpy as np

from umbel import Federation, FunctionTrainer


def train(arrays, examples, job):
    if job.round == 2 and examples < 3:
        raise RuntimeError("gone")
    return arrays, 1, {}


def initial(options):
    return {"w": np.zeros(8)}


federation = Federation(FunctionTrainer(initial, train), lambda node, _: node.partition)
"""


def test_a_round_that_was_given_up_is_not_charged_and_the_next_goes_on(tmp_path: Path) -> None:
    from umbel.running import run

    app = write_federation(tmp_path / "app", FAILING, name="failing", config="rounds = 3")
    options = {"secure": True, "noise-multiplier": 2.0, "delta": 1e-3}
    out = tmp_path / "run"
    run(app, options=options, nodes=6, workers=0, out=out, progress=SilentProgress())
    lines = [line for line in RunDirectory.open(out).rounds() if line["round"]]
    assert [line["clients"] for line in lines] == [6, 0, 6]
    certificate = json.loads((out / "certificate.json").read_text())
    assert [row["times"] for row in certificate["events"]] == [2]
    assert certificate["secure_sum"]["nodes"] == 6
    assert certificate["secure_sum"]["identities"] == "first-use"


@pytest.mark.parametrize(
    "options", [{"mechanism": "local"}, {"clipping": "adaptive"}, {"secure-noise": "laplace"}]
)
def test_options_that_do_not_go_together(options: dict[str, Any]) -> None:
    federation = Federation(FunctionTrainer(initial, train), lambda node, _: node)
    with pytest.raises(ConfigError):
        federation.stack_for(federation.complete({"secure": True, "epsilon": 3.0, **options}))
