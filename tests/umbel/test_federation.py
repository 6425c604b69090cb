"""One object, two apps: options, stacks, and the same model on Flower's own engine."""

import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fakes import APPS, PlusOne, Times
from umbel.core.app_folder import load
from umbel.core.errors import ConfigError
from umbel.federation import Federation
from umbel.running import run
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.stack import Stack


@pytest.fixture
def slope() -> Iterator[Federation]:
    path = sys.path[:]
    yield load(APPS / "slope", "task:federation", Federation)
    sys.path[:] = path


def test_options_are_those_of_umbel_the_trainer_and_the_app(slope: Federation) -> None:
    known = replace(slope, options={"own": "x", "rounds": 7}).known_options()
    assert (known["own"], known["rounds"], known["learning-rate"]) == ("x", 7, 0.1)
    assert known["cohort"] == "all"
    complete = slope.complete({"rounds": 3, "from-elsewhere": 1})
    assert (complete["rounds"], complete["from-elsewhere"]) == (3, 1)
    with pytest.raises(ConfigError, match="rounds is 'x'"):
        slope.complete({"rounds": "x"})


def test_a_stack_may_be_a_function_of_the_options(slope: Federation) -> None:
    def stack(options: Any) -> Stack:
        return Stack([PlusOne()] if options["rounds"] > 3 else [PlusOne(), Times()])

    federation = replace(slope, stack=stack)
    assert str(federation.stack_for(federation.complete({"rounds": 3}))) == (
        "plus-one -> times -> plain-sum"
    )
    assert str(federation.job(federation.complete({"rounds": 4})).stack) == "plus-one -> plain-sum"


def test_the_job_is_what_the_options_say(slope: Federation) -> None:
    job = slope.job(slope.complete({"seed": 4, "learning-rate": 0.3}))
    assert job.learning_rate == 0.3
    again = slope.job(slope.complete({"seed": 4}))
    assert torch.equal(job.parameters["slope"], again.parameters["slope"])
    other = slope.job(slope.complete({"seed": 5}))
    assert not torch.equal(job.parameters["slope"], other.parameters["slope"])
    assert job.evaluate is not None
    assert set(job.evaluate(job.parameters, job.buffers)) == {"loss", "visits"}
    assert replace(slope, test=None).job(slope.complete({})).evaluate is None


def test_a_run_from_python(tmp_path: Path) -> None:
    """The same as the command, without one."""
    result = run(
        APPS / "slope",
        options={"rounds": 2},
        nodes=3,
        workers=0,
        out=tmp_path / "run",
        progress=SilentProgress(),
    )
    assert (result["rounds"], result["run"]) == (2, str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"already holds a run; choose another .* --resume"):
        run(APPS / "slope", out=tmp_path / "run", workers=0)


@pytest.mark.slow
def test_the_same_app_gives_the_same_model_under_ray(
    slope: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """flwr.simulation starts processes of Ray; nothing of the app is told which engine runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(APPS / "slope"))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import ray
        from flwr.simulation import run_simulation

        level = logging.getLogger("flwr").level
        run_simulation(
            server_app=slope.server_app(),
            client_app=slope.client_app(),
            num_supernodes=6,
            backend_config={
                "client_resources": {"num_cpus": 1, "num_gpus": 0},
                "init_args": {"num_cpus": 2, "include_dashboard": False},
            },
        )
        ray.shutdown()
        logging.getLogger("flwr").setLevel(level)
    (simulated,) = (tmp_path / "runs").iterdir()
    assert RunDirectory(simulated).config()["app"] == "slope", "the app's files say its name"
    plain = run(APPS / "slope", options={"rounds": 10}, workers=0, progress=SilentProgress())
    one, other = (load_file(Path(p) / "model.safetensors") for p in (simulated, plain["run"]))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_what_a_choice_implies_follows_it_and_yields_to_what_is_given(slope: Federation) -> None:
    plans = {"a": {"rounds": 30, "tau": 0.5}, "b": {"rounds": 40, "adaptive-epsilon": 0.25}}
    chosen = replace(slope, options={"way": "a"}, tuned=lambda options: plans[str(options["way"])])
    plain = chosen.complete({"rounds": 0})  # 0 rounds are none, so the choice decides
    assert (plain["rounds"], plain["adaptive-epsilon"]) == (30, 0.5)
    other = chosen.override(plain, {"way": "b"})
    assert (other["rounds"], other["adaptive-epsilon"]) == (40, 0.25)
    assert chosen.complete(other) == other, "a node or another engine completes it once more"
    by_hand = chosen.override(chosen.complete({"rounds": 7}), {"way": "b", "tau": 1.0})
    assert (by_hand["rounds"], by_hand["adaptive-epsilon"]) == (7, 1.0)
    assert chosen.complete({"way": "b", "rounds": 0})["rounds"] == 40
