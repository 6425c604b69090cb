"""Weighted secure sums: McMahan's mean, with nobody's number of examples on the wire."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from umbel.clients.data.examples import Node
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import StackError
from umbel.federation import Federation
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.rounds import Rounds
from umbel.strategies.secure.weigh import Weigh
from umbel.strategies.transform import Facts, NodeContext

EXAMPLES = (1, 10, 100, 1000, 40, 7)


def train(arrays: dict[str, Any], examples: Any, job: Any) -> Any:  # noqa: ARG001
    rng = np.random.default_rng(int(examples))
    return {"w": arrays["w"] + rng.normal(0, 1, 30)}, int(examples), {"loss": examples / 500}


def initial(options: Any) -> dict[str, Any]:  # noqa: ARG001
    return {"w": np.zeros(30)}


def federate(folder: Path, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    def data(node: Node, _: Any) -> int:
        return EXAMPLES[node.partition]

    federation = Federation(FunctionTrainer(initial, train), data)
    changes = {k.replace("_", "-"): v for k, v in options.items()}
    given = federation.complete({"rounds": 1, "client-eval-every": -1, **changes})
    grid = EmbeddedGrid(federation.client_app(), len(EXAMPLES), run_config=given)
    run = RunDirectory.create(None, "weigh", {}, out=folder / str(len(list(folder.iterdir()))))
    rounds = Rounds(federation.job(given), grid, grid.roster(), run, SilentProgress())
    return rounds.fit().parameters["w"], run.rounds()[-1]


def test_the_weighted_mean_is_that_of_a_plain_sum(tmp_path: Path) -> None:
    secure, line = federate(tmp_path, secure=True, secure_metrics="loss:4")
    plain, open_line = federate(tmp_path, max_examples=10_000)
    assert float((secure - plain).abs().max()) < 2e-3
    assert line["train"]["weigh.loss"] == pytest.approx(open_line["train"]["loss"], rel=2e-2)
    assert set(line["train"]) == {"weigh.loss"}


def test_the_cap_is_the_largest_influence(tmp_path: Path) -> None:
    capped, _ = federate(tmp_path, secure=True, secure_weight_cap=10.0)
    rows = [np.random.default_rng(n).normal(0, 1, 30) for n in EXAMPLES]
    weights = np.minimum(EXAMPLES, 10)
    expected = np.average(rows, axis=0, weights=weights)
    assert float((capped - torch.from_numpy(expected)).abs().max()) < 2e-3


def test_equal_weights_without_any_metric(tmp_path: Path) -> None:
    equal, line = federate(tmp_path, secure=True, secure_weighting="equal", secure_metrics="")
    rows = [np.random.default_rng(n).normal(0, 1, 30) for n in EXAMPLES]
    assert float((equal - torch.from_numpy(np.mean(rows, axis=0))).abs().max()) < 2e-3
    assert line["train"] == {}


def test_weights_count_in_the_bound() -> None:
    facts = Weigh(10.0, {"loss": 1.0}).check(Facts(size=8, l2_bound=3.0), None)
    assert facts.size == 10
    layer = Weigh(10.0, {"loss": 1.0})
    update = torch.full((8,), 3.0 / 8**0.5)
    measured = {"num-examples": 1e9, "loss": float("inf")}
    out = layer.encode(update, NodeContext({"bound": 3.0}, metrics=measured))
    assert float(out.norm()) <= (facts.l2_bound or 0) * (1 + 1e-9)
    nothing = layer.encode(
        update,
        NodeContext({"bound": 3.0}, metrics={"num-examples": -5.0, "loss": float("nan")}),
    )
    assert not bool(nothing.any())


def test_values_out_of_range() -> None:
    with pytest.raises(StackError, match="weight cap"):
        Weigh(-1.0)
    with pytest.raises(StackError, match="limit of loss"):
        Weigh(limits={"loss": float("inf")})
    with pytest.raises(StackError, match="put Clip before it"):
        Weigh().check(Facts(size=3), None)
