"""Private means beside training: released, charged, resumed; pools give what single nodes give."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import umbel.federation
from umbel.privacy.budget.accounting import spent
from umbel.running import Interrupted, run
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.ledger import entries
from umbel.server.private.verify import charges_in, verify

TASK = """
import numpy as np
import torch
from umbel import (
    FeatureMap, Federation, PrecomputedFeatures, PrivateMean, SoftmaxTrainer, features_of,
    private_histogram, private_second_moment,
)
from umbel.clients.data.examples import Examples
from umbel.clients.data.datasets import DataSet

NODES, WIDTH = 120, 6
source = np.random.default_rng(0)
y = source.integers(0, 3, NODES)
x = (source.normal(size=(NODES, WIDTH)) + 2 * np.eye(3, WIDTH)[y]).astype(np.float32)
examples = Examples(x, y)
data = DataSet("blobs", train=examples, test=examples)

def unit(examples, public):
    rows = features_of(examples)
    return rows / rows.norm(dim=1, keepdim=True)

def centred(examples, public):
    return (unit(examples, public) - public["centre"])[:, :, None]

def labels(examples, public):
    return torch.as_tensor(np.asarray(examples.y))

def questions(options):
    if not options["ask"]:
        return ()
    noise = options["question-noise"]
    return (
        PrivateMean("centre", unit, (WIDTH,), noise),
        private_second_moment("spread", centred, WIDTH, noise, after=1),
        private_histogram("kinds", labels, 3, noise, after=-1),
    )

def prepare(features, buffers):
    return features - buffers["centre"]

federation = Federation(
    name="blobs",
    trainer=SoftmaxTrainer(
        WIDTH, classes=3, prepare=prepare, buffers=lambda options: {"centre": torch.zeros(WIDTH)}
    ),
    data=PrecomputedFeatures(data, FeatureMap("blobs", WIDTH, torch.from_numpy)),
    questions=questions,
    options={"ask": True, "question-noise": 20.0},
)
"""

PYPROJECT = """
[project]
name = "blobs"
version = "1.0.0"

[tool.flwr.app]
publisher = "umbel"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
rounds = 3
cohort = "poisson"
cohort-size = 40
learning-rate = 5.0
seed = 0

[tool.umbel]
nodes = 120
"""


class Blobs:
    """The app, and a way to run it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.app = folder / "app"
        self.app.mkdir()
        (self.app / "task.py").write_text(TASK)
        (self.app / "pyproject.toml").write_text(PYPROJECT)
        for half in ("server", "client"):
            text = f"from task import federation\n\napp = federation.{half}_app()\n"
            (self.app / f"{half}_app.py").write_text(text)

    def run(self, name: str = "run", nodes: int | None = None, **options: Any) -> dict[str, Any]:
        changes = {key.replace("_", "-"): value for key, value in options.items()}
        out = self.folder / "runs" / name
        return run(
            self.app, options=changes, nodes=nodes, workers=0, out=out, progress=SilentProgress()
        )

    def directory(self, name: str = "run") -> RunDirectory:
        return RunDirectory.open(self.folder / "runs" / name)

    def model(self, name: str = "run") -> dict[str, torch.Tensor]:
        return load_file(self.directory(name).model_path)


@pytest.fixture
def blobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    monkeypatch.setenv("UMBEL_KEY", str(tmp_path / "coordinator.pem"))
    monkeypatch.setenv("UMBEL_CACHE", str(tmp_path / "cache"))
    return Blobs(tmp_path)


def test_answers_and_training_share_one_budget_and_one_ledger(blobs: Blobs) -> None:
    result = blobs.run(epsilon=3.0)
    assert 2.99 < result["epsilon"] <= 3
    assert verify(blobs.directory().path) == []
    written = entries(blobs.directory().ledger_path)
    charges = [entry for entry in written if entry.body["kind"] == "charge"]
    order = [entry.body["what"] for entry in charges]
    assert order == ["centre", "round 1", "spread", "round 2", "round 3", "kinds"]
    plain = [entry for entry in charges if entry.body["what"] in ("centre", "spread", "kinds")]
    assert [entry.charge().event.noise_multiplier for entry in plain] == [20.0] * 3
    total = spent(charges_in(written)["model-user"], 1e-5).epsilon
    assert total == pytest.approx(result["epsilon"], abs=1e-6)
    certificate = json.loads(blobs.directory().certificate_path.read_text())
    asked = certificate["mechanism"]["questions"]
    assert [(q["name"], q["noise_multiplier"]) for q in asked] == [
        ("centre", 20.0), ("spread", 20.0), ("kinds", 20.0)
    ]  # fmt: skip


def test_questions_cost_training_some_noise(blobs: Blobs) -> None:
    asked = blobs.run("asked", epsilon=2.0, question_noise=6.0)
    silent = blobs.run("silent", epsilon=2.0, ask=False)
    assert asked["noise_multiplier"] > silent["noise_multiplier"]
    assert asked["epsilon"] == pytest.approx(silent["epsilon"], abs=0.01)


def test_an_answer_becomes_the_buffer_of_its_name(blobs: Blobs) -> None:
    blobs.run(noise_multiplier=1.0, question_noise=1.0, rounds=1)
    source = np.random.default_rng(0)  # as in the task
    y = source.integers(0, 3, 120)
    x = source.normal(size=(120, 6)) + 2 * np.eye(3, 6)[y]
    mean = (x / np.linalg.norm(x, axis=1, keepdims=True)).mean(0)
    error = blobs.model()["centre"].numpy() - mean
    # Six normal errors of standard deviation 1/120: beyond 5.5 of them with probability 2e-7.
    assert np.abs(error).max() < 5.5 / 120
    assert np.abs(error).max() > 1e-6


def test_a_question_that_the_budget_does_not_pay_for_ends_the_run(blobs: Blobs) -> None:
    result = blobs.run(epsilon=1.0, noise_multiplier=30.0, question_noise=2.0)
    assert result["stopped"] == "budget"
    assert result["rounds"] == 0
    assert result["epsilon"] <= 1.0


def test_pools_give_what_single_nodes_give(blobs: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"noise_multiplier": 1.0, "insecure_noise_seed": 1}
    pooled = blobs.run("pooled", **options)
    monkeypatch.setattr(umbel.federation, "can_pool", lambda *_: False)
    single = blobs.run("single", **options)
    assert pooled["epsilon"] == single["epsilon"] == math.inf
    rows = zip(
        blobs.directory("pooled").rounds()[1:], blobs.directory("single").rounds()[1:], strict=True
    )
    for one, other in rows:
        assert one["clients"] == other["clients"]
        assert one["bytes_up"] < other["bytes_up"]
    theirs = blobs.model("single")
    for name, value in blobs.model("pooled").items():
        assert torch.allclose(value, theirs[name], atol=0.02), name


def test_nodes_with_several_examples_answer_for_themselves(blobs: Blobs) -> None:
    result = blobs.run(nodes=30, noise_multiplier=1.0, cohort_size=10)
    assert result["rounds"] == 3
    assert verify(blobs.directory().path) == []


class Impatient(SilentProgress):
    """Presses Ctrl-C after the second round."""

    def round_done(self, line: Mapping[str, Any]) -> None:
        if line["round"] == 2:
            raise KeyboardInterrupt


def test_a_resumed_run_does_not_ask_again(blobs: Blobs) -> None:
    changes = {"noise-multiplier": 1.0, "insecure-noise-seed": 2}
    out = blobs.folder / "runs" / "broken"
    with pytest.raises(Interrupted):
        run(blobs.app, options=changes, workers=0, out=out, progress=Impatient())
    assert run(resume=out, workers=0, progress=SilentProgress())["rounds"] == 3
    asked = [entry.body.get("what") for entry in entries(blobs.directory("broken").ledger_path)]
    assert [asked.count(name) for name in ("centre", "spread", "kinds")] == [1, 1, 1]
    whole = blobs.run("whole", noise_multiplier=1.0, insecure_noise_seed=2)
    assert whole["rounds"] == 3
    for name, value in blobs.model("whole").items():
        assert torch.equal(value, blobs.model("broken")[name]), name
