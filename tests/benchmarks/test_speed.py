"""The speed benchmark measures what it says; how fast anything is, it is not asked here."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from umbel.benchmarks.figures import Figure, plot, rows
from umbel.benchmarks.speed import aggregation, apps, bare, link, messages
from umbel.benchmarks.speed import suite as speed
from umbel.benchmarks.speed.processes import proportional, tree, watch
from umbel.benchmarks.speed.training import Case
from umbel.core.errors import ConfigError, RunError
from umbel.core.flower import take_identity

FIGURES = [
    Figure("messages", "ten floats", 0.1, "ms", 0.3, {"Flower": 14.0}),
    Figure("training", "a round", 2.0, "s", 1.1),
    Figure("training", "no promise", 5000.0, "MB"),
]


def test_a_target_is_met_missed_or_not_there() -> None:
    assert [figure.met for figure in FIGURES] == [True, False, None]
    cells = rows(FIGURES)
    assert cells[0][2:] == ("0.1 ms", "<= 0.3  met", "Flower 14")
    assert cells[1][3] == "<= 1.1  missed"
    assert cells[2][2:4] == ("5,000 MB", "")


def test_a_plot_of_figures(tmp_path: Path) -> None:
    assert plot(FIGURES, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_policy_and_the_contract_take_time_for_each_message() -> None:
    take_identity(1)
    found = messages.gate(repeats=3)
    assert found.keys() == {"plain sum", "secure sum"}
    assert all(seconds > 0 for seconds in found.values())


def test_messages_come_back_and_take_time(tmp_path: Path) -> None:
    app = apps.write_echo(tmp_path / "echo")
    assert messages.exchange(app, 5, 3, 10, 0, repeats=2) > 0
    assert messages.memcpy(1 << 20) > 0
    assert 0 < messages.node(repeats=3) < 1


def test_aggregation_is_measured_beside_flower_and_the_memory() -> None:
    time, memory = aggregation.measure(quick=True)
    assert set(time.beside) == {"Flower's FedAvg", "additions alone"}
    assert 0 < time.beside["additions alone"] < time.value
    assert memory.unit == "MB"


def test_rounds_are_timed_from_the_outside(tmp_path: Path) -> None:
    script = (
        "import time\nfor i in range(1, 4): print(f'round {i}/3', flush=True); x = bytes(1<<24)"
    )
    seen = watch([sys.executable, "-c", script], tmp_path)
    assert len(seen.ends) == 3 and list(seen.ends) == sorted(seen.ends)
    assert seen.seconds >= seen.ends[-1] and seen.peak_bytes == 0
    with pytest.raises(RunError, match="status 5"):
        watch([sys.executable, "-c", "print('round 1/3'); raise SystemExit(5)"], tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_process_tree_is_seen() -> None:
    import os

    held = np.ones(4_000_000)
    assert os.getpid() in tree(os.getpid())
    assert proportional(os.getpid()) > held.nbytes


def test_the_bare_loop_learns(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        plan = bare.Plan("digits", "digits", 10, 10, 4, 1.0, 0.2, 0.2, epochs=3, evaluate=True)
        bare.main(plan)
    finally:
        torch.set_num_threads(before)
    accuracies = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(accuracies) == 4 and accuracies[-1] > 0.8


def test_both_sides_train_the_same_model(tmp_path: Path) -> None:
    """Else the comparison would be of two different things."""
    from umbel.core.app_folder import load
    from umbel.opening import example

    server = load(example(), "server_app:app", object)
    federation = server.federation  # type: ignore[attr-defined]
    theirs = federation.trainer_for({}).initial(federation.complete({}), 0).parameters.values()
    ours = bare.model_named("cnn").parameters()
    assert [tuple(p.shape) for p in ours] == [tuple(p.shape) for p in theirs]
    case = Case("digits", tmp_path, replace(bare.Plan(), nodes=3))
    assert json.loads(case.bare()[-1])["nodes"] == 3
    command = case.umbel(batched="off")
    assert command[-4:] == ["--nodes", "3", "--workers", "2"] and "batched='off'" in command[-5]


def test_a_run_of_the_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apps = speed.Apps(tmp_path, tmp_path, tmp_path)
    speed.main(apps, tmp_path / "out", ["aggregation"], quick=True, as_json=True)
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == json.loads((tmp_path / "out" / "speed.json").read_text())
    assert said["machine"]["cpus"] > 0 and len(said["figures"]) == 2
    assert (tmp_path / "out" / "speed.png").is_file()
    with pytest.raises(ConfigError, match="take messages, aggregation"):
        speed.measure(apps, ["speed"])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_link_is_measured_beside_the_superlink() -> None:
    made = {figure.what: figure for figure in link.figures(quick=True, flower=True)}
    small = made["a round of ten floats, 2 nodes"]
    assert 0 < small.value < small.beside["Flower's SuperLink"]
    assert any("20 idle nodes" in what for what in made)
