"""A node that claims to have more examples than the others may count for is named, once."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from umbel.clients.data.examples import Node
from umbel.clients.trainers.function import FunctionTrainer
from umbel.federation import Federation
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.rounds import Rounds

CLAIMS = (12, 10, 2**50, 14, 11)


class Heard(SilentProgress):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def train(arrays: Mapping[str, Any], claim: Any, job: Any) -> Any:  # noqa: ARG001
    return {"w": arrays["w"] + (1.0 if int(claim) > 100 else 0.0)}, int(claim), {}


def fit(folder: Path, **options: Any) -> tuple[float, list[dict[str, Any]], list[str]]:
    def data(node: Node, _: Any) -> int:
        return CLAIMS[node.partition]

    federation = Federation(FunctionTrainer(lambda _: {"w": np.zeros(2)}, train), data)
    given = federation.complete({"rounds": 2, "client-eval-every": -1, **options})
    grid = EmbeddedGrid(federation.client_app(), len(CLAIMS), run_config=given)
    run = RunDirectory.create(None, "limited", {}, out=folder)
    heard = Heard()
    outcome = Rounds(federation.job(given), grid, grid.roster(), run, heard).fit()
    return float(outcome.parameters["w"][0]), list(run.rounds()), heard.lines


def test_a_claim_moves_the_model_by_its_limit_and_is_said_once(tmp_path: Path) -> None:
    model, lines, heard = fit(tmp_path / "run")
    part = 120 / (120 + 12 + 10 + 14 + 11)
    assert model == pytest.approx(2 * part, rel=1e-6)
    for line in lines[-2:]:
        assert line["limited"] == [{"node": "2", "said": 2.0**50, "counted": 120.0}]
    (said,) = [line for line in heard if "counts for" in line]
    assert "round 1: node 2 says that it has 1,125,899,906,842,624 examples" in said
    assert "10 times the median of its round, which is 12; max-examples=N" in said


def test_max_examples_is_another_limit(tmp_path: Path) -> None:
    model, _, heard = fit(tmp_path / "run", **{"max-examples": 13})
    assert model == pytest.approx(2 * 13 / (13 + 12 + 10 + 13 + 11), rel=1e-6)
    assert sum("max-examples is 13" in line for line in heard) == 2
