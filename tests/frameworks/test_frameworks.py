"""Keras on its backends, and JAX: their laws, the same model as elsewhere, and whole runs.

Keras has one backend a process, so each test starts its own; a backend that is not installed is
skipped. `make test-frameworks` installs all of them.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from umbel.scaffold import OPTIONS, new_app

pytestmark = [pytest.mark.frameworks, pytest.mark.timeout(1200)]
HERE = Path(__file__).parent
FRAMEWORKS = ["jax", "keras-jax", "keras-torch", "keras-tensorflow"]


def python(framework: str, *words: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    """Run Python with this framework (and backend), or skip."""
    name, _, backend = framework.partition("-")
    for module in filter(None, (name, backend)):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("KERAS_BACKEND", None)
    if backend:
        environment["KERAS_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1000,
        check=False,
    )


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_trainer_keeps_its_laws(framework: str, tmp_path: Path) -> None:
    ended = python(framework, str(HERE / "laws.py"), framework.partition("-")[0], cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "kept" in ended.stdout


@pytest.fixture(scope="module")
def in_torch(tmp_path_factory: pytest.TempPathFactory) -> "np.lib.npyio.NpzFile":
    where = tmp_path_factory.mktemp("torch")
    return linear("torch", where)


def linear(framework: str, where: Path, *options: str) -> "np.lib.npyio.NpzFile":
    """The federated linear model of `linear_model.py`."""
    out = where / "model.npz"
    name = framework.partition("-")[0]
    words = [str(HERE / "linear_model.py"), name, str(out), *options]
    ended = python(framework, *words, cwd=where)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return np.load(out)


@pytest.mark.parametrize("framework", ["numpy", *FRAMEWORKS])
def test_the_same_linear_model_is_the_same_federated_model(
    framework: str, in_torch: "np.lib.npyio.NpzFile", tmp_path: Path
) -> None:
    found = linear(framework, tmp_path)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(found[name], in_torch[name], atol=1e-5, err_msg=name)
    assert np.abs(found["weight"]).max() > 0.1  # it has been trained


@pytest.mark.parametrize("option", ["scaffold=true", "proximal-mu=0.5"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_local_objectives_reach_the_gradients_of_every_framework(
    framework: str, option: str, tmp_path: Path
) -> None:
    (tmp_path / "torch").mkdir()
    expected = linear("torch", tmp_path / "torch", option)
    found = linear(framework, tmp_path, option)
    for name in ("weight", "bias"):
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("options", ["", "secure=true", "epsilon=8"])
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_an_app_of_the_template_runs_on_worker_processes(
    framework: str, options: str, tmp_path: Path
) -> None:
    """Workers are forked, and load the framework afterwards: TensorFlow would hang otherwise."""
    new_app(tmp_path / "app", framework.partition("-")[0])
    given = f"rounds=2 {options}".strip()
    command = "from umbel.commands.cli import main; main()"
    words = ["-c", command, "run", "app", "-c", given, "--workers", "2", "--json"]
    ended = python(framework, *words, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    result = json.loads(ended.stdout.splitlines()[-1])
    assert result["rounds"] == 2
    assert (result["epsilon"] is not None) == ("epsilon" in options)
    if not options:
        assert result["metrics"]["accuracy"] > 0.5


@pytest.mark.parametrize("name", ["flax", "jax", "keras-tensorflow", "numpy", "sklearn", "torch"])
def test_the_examples_learn_digits(name: str, tmp_path: Path) -> None:
    framework = {"flax": "jax"}.get(name, name)
    module = f"umbel.examples.frameworks.{name.partition('-')[0]}_digits"
    ended = python(framework, "-m", module, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    accuracy = json.loads(ended.stdout.splitlines()[-1].replace("'", '"'))["accuracy"]
    assert accuracy > 0.9


def test_every_template_has_a_test() -> None:
    assert {name.partition("-")[0] for name in FRAMEWORKS} | {"torch", "sklearn", "numpy"} == set(
        OPTIONS
    )
