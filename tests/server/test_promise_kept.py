"""A run that goes on, ends or fails keeps what was promised, and what was paid for."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.server.test_private_run import Heard, Lab, ledger_of
from umbel.core.errors import ConfigError, RunError
from umbel.running import Interrupted, run
from umbel.server.output.rundir import RunDirectory
from umbel.server.private import budget
from umbel.server.private.ledger import Ledger, entries
from umbel.server.private.verify import charges_in, verify


class Impatient(Heard):
    """Presses Ctrl-C after the second round."""

    def round_done(self, line: Any) -> None:
        super().round_done(line)
        if line["round"] == 2:
            raise KeyboardInterrupt


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.fixture
def half(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private run that was interrupted after its second round of four."""
    monkeypatch.setattr("umbel.server.observers.checkpoints.EVERY_S", 0.0)
    out = lab.folder / "runs" / "half"
    options = {"noise-multiplier": 4.0, "epsilon": 9.0, "rounds": 4, "population": "people"}
    with pytest.raises(Interrupted):
        run(lab.app, options=options, workers=0, out=out, progress=Impatient())
    return out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("population", "others"),
        ("ledger", "other.sqlite"),
        ("epsilon", 99.0),
        ("delta", 1e-3),
        ("noise-multiplier", 8.0),
        ("sampling", "fixed"),
        ("mechanism", "local"),
        ("clipping-norm", 5.0),
        ("cohort-size", 3.0),
        ("secure", True),
        ("insecure-noise-seed", 1),
    ],
)
def test_what_shapes_a_promise_cannot_change_on_resume(half: Path, name: str, value: Any) -> None:
    before = entries(ledger_of())
    with pytest.raises(ConfigError, match=rf"{name}=.*cannot change"):
        run(resume=half, options={name: value}, workers=0, progress=Heard())
    assert entries(ledger_of()) == before


def test_other_changes_are_said_and_kept(half: Path) -> None:
    heard = Heard()
    result = run(
        resume=half,
        options={"rounds": 3, "learning-rate": 0.5, "epsilon": 9.0},
        workers=0,
        progress=heard,
    )
    assert result["rounds"] == 3
    assert "rounds changed from 4 to 3; the run's config.json keeps both" in heard.lines
    assert sum("changed from" in line for line in heard.lines) == 2
    config = RunDirectory.open(half).config()
    assert config["changed"] == [
        {"what": "learning-rate", "from": 0.1, "to": 0.5},
        {"what": "rounds", "from": 4, "to": 3},
    ]
    assert verify(half) == []


def test_a_run_whose_ledger_is_gone_does_not_go_on(half: Path) -> None:
    ledger_of().unlink()
    with pytest.raises(ConfigError, match="knows nothing of them"):
        run(resume=half, workers=0, progress=Heard())


def test_another_app_in_its_place_does_not_go_on(
    half: Path, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("task", "server_app", "client_app"):
        monkeypatch.delitem(sys.modules, module)  # as in a new process
    task = lab.app / "task.py"
    task.write_text(
        task.read_text().replace(
            "federation = Federation(",
            "from umbel import Clip, Gaussian, PlainSum, Stack\nfederation = Federation(\n"
            '    stack=Stack((Clip(0.5), Gaussian()), PlainSum(weighting="fixed")),',
        )
    )
    with pytest.raises(ConfigError, match=r"promise is made of, but (stack|layers)"):
        run(resume=half, workers=0, progress=Heard())


def test_a_run_that_ended_for_its_budget_keeps_its_last_paid_rounds(lab: Lab) -> None:
    options = {"epsilon": 4.0, "noise_multiplier": 2.0, "cohort_size": 10.0, "rounds": 40}
    first = lab.run(population="people", **options)
    assert first["stopped"] == "budget"
    directory = lab.directory()
    model, lines = directory.read_model()["w"], directory.rounds()
    charged = charges_in(entries(ledger_of()))
    again = run(resume=directory.path, workers=0, progress=Heard())
    assert (again["stopped"], again["rounds"]) == ("budget", first["rounds"])
    assert torch.equal(directory.read_model()["w"], model)
    assert directory.rounds() == lines
    assert charges_in(entries(ledger_of())) == charged
    assert verify(directory.path) == []


def test_a_rival_that_was_faster_ends_the_run_before_it_overspends(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another coordinator charges between the question and the release of round 2."""
    real = budget.Budget.charge

    def late(self: Any, number: int, facts: Any, replies: int) -> None:
        if number == 2:
            with Ledger(ledger_of(), "people") as rival:
                (charge,) = set(self.ledger.spent("model-user"))
                rival.charge("rival", "much", "model-user", [charge] * 2)
        real(self, number, facts, replies)

    monkeypatch.setattr(budget.Budget, "charge", late)
    result = lab.run(epsilon=2.0, population="people", rounds=3)
    assert (result["stopped"], result["rounds"]) == ("budget", 1)
    assert result["epsilon"] <= 2
    assert verify(lab.directory().path) == []


def test_a_run_whose_nodes_all_fail_does_not_spend_its_budget_on_noise(lab: Lab) -> None:
    everyone = " ".join(f"{node}:raise" for node in range(20))
    with pytest.raises(RunError, match=r"all 20 nodes that were asked failed.*this node broke"):
        lab.run(epsilon=3.0, rounds=30, population="people", bad=everyone)
    assert charges_in(entries(ledger_of()))["model-user"] == {}
    with pytest.raises(RunError, match="nodes that were asked failed"):
        lab.run("part", epsilon=3.0, rounds=60, cohort_size=10.0, population="people", bad=everyone)
    assert sum(charges_in(entries(ledger_of()))["model-user"].values()) <= 4


def test_a_node_that_fails_alone_does_not_end_a_private_run(lab: Lab) -> None:
    result = lab.run(noise_multiplier=4.0, cohort_size=1.0, rounds=4, bad="3:raise 4:nan")
    assert result["rounds"] == 4
