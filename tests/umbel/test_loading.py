"""A finished run's model can be had back, of every trainer, or a sentence says why not."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model

import umbel
from tests.written import write_app
from umbel.clients.trainers.base import Weights
from umbel.core.errors import ConfigError
from umbel.running import run
from umbel.server.output.progress import SilentProgress
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory

TASK = """
import numpy as np
import torch
from sklearn.linear_model import SGDClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from umbel import (
    ChosenTrainer, Examples, Federation, FunctionTrainer, OneStep, PrivateSgd, SklearnTrainer,
    SoftmaxTrainer, Split, TorchTrainer,
)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.drop, self.two = nn.Linear(6, 6), nn.Dropout(0.9), nn.Linear(6, 6)
        self.two.weight = self.one.weight
    def forward(self, x):
        return self.two(self.drop(torch.tanh(self.one(x))))[:, :3]

def make(seed, n=40):
    random = np.random.default_rng(seed)
    y = random.integers(0, 3, n)
    return Examples(np.float32(random.normal(size=(n, 6)) + y[:, None]), y)

def data(node, options):
    return Split(make(node.partition))

def step(arrays, examples, job):
    return {"w": arrays["w"] + examples.x.mean(0), "n": arrays["n"] + 1}, len(examples), {}

known = SGDClassifier(loss="log_loss").fit(make(5).x, np.array(["ape", "bee", "cat"])[make(5).y])
trainer = ChosenTrainer("kind", {
    "torch": TorchTrainer(Tied),
    "step": OneStep(TorchTrainer(lambda: nn.Linear(6, 3))),
    "records": PrivateSgd(TorchTrainer(lambda: nn.Linear(6, 3)), example_noise=1.0),
    "sklearn": SklearnTrainer(known),
    "pipeline": SklearnTrainer(make_pipeline(StandardScaler().fit(make(5).x), known)),
    "softmax": SoftmaxTrainer(6, classes=3),
    "function": FunctionTrainer(
        lambda options: {"w": np.zeros(6), "n": np.zeros(1, int)}, step,
    ),
})
federation = Federation(
    trainer, data, lambda options: make(999, 300), options={"kind": "torch"}, name="any"
)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = write_app(tmp_path / "any", TASK, "rounds = 2")
    before = sys.path[:]
    yield path
    sys.path[:] = before


def done(folder: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    out = folder.parent / f"run-{'-'.join(map(str, options.values()))}"
    quiet = SilentProgress()
    return out, run(folder, options=options, nodes=2, workers=0, out=out, progress=quiet)


def right(predicted: Any, y: Any) -> float:
    return float((np.asarray(predicted) == np.asarray(y)).mean())


def test_every_trainer_gives_its_model_back(folder: Path) -> None:
    runs = {
        kind: done(folder, kind=kind)
        for kind in ("torch", "step", "records", "sklearn", "pipeline", "softmax", "function")
    }
    import task

    held = task.make(999, 300)
    for kind in ("torch", "step", "records"):
        path, result = runs[kind]
        model = umbel.load(path)
        assert isinstance(model, torch.nn.Module) and not model.training
        with torch.no_grad():
            found = model(torch.as_tensor(held.x)).argmax(1)
        assert right(found, held.y) == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
    names = np.array(["ape", "bee", "cat"])[held.y]
    for kind in ("sklearn", "pipeline"):
        path, result = runs[kind]
        classifier = umbel.load(path)  # takes what the nodes' data were, before the scaler
        assert right(classifier.predict(held.x), names) == result["metrics"]["accuracy"] > 0.5
    uses = {
        kind: RunDirectory.open(path).config()["model"]["use"] for kind, (path, _) in runs.items()
    }
    assert uses["torch"] == uses["step"] == uses["records"] == "model(x)"
    assert uses["sklearn"] == uses["softmax"] == "model.predict(x)"
    assert uses["function"] == "model"
    path, result = runs["softmax"]
    softmax = umbel.load(str(path))
    assert right(softmax.predict(held.x), held.y) == pytest.approx(result["metrics"]["accuracy"])
    assert softmax.predict_proba(held.x).sum(1).allclose(torch.ones(300))
    arrays = umbel.load(runs["function"][0])
    assert (sorted(arrays), arrays["w"].shape) == (["n", "w"], (6,))


def test_a_model_with_tied_weights_is_loaded_as_the_page_says(folder: Path) -> None:
    path, _ = done(folder, kind="torch")
    import task

    loaded = umbel.load(path)
    assert loaded.one.weight is loaded.two.weight
    module = task.Tied()
    load_model(module, path / "model.safetensors")
    assert torch.equal(module.two.weight, loaded.two.weight)
    page = write_report(path).read_text()
    assert "import umbel" in page and f"umbel.load(&#39;{path}" in page


def test_an_app_that_is_gone_or_has_changed_is_refused(folder: Path) -> None:
    path, _ = done(folder, kind="step")
    moved = folder.with_name("moved")
    shutil.copytree(folder, moved)
    (folder / "task.py").write_text(TASK.replace("tanh", "relu"))
    with pytest.raises(ConfigError, match=r"has changed since .*give the folder of that version"):
        umbel.load(path)
    assert isinstance(umbel.load(path, app=moved), torch.nn.Module)
    shutil.rmtree(folder)
    with pytest.raises(ConfigError, match="which is gone; say where it is now"):
        umbel.load(path)
    from task import federation

    assert isinstance(umbel.load(path, app=federation), torch.nn.Module)
    (path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"has no model.safetensors: the run has not ended"):
        umbel.load(path, app=moved)
    with pytest.raises(ConfigError, match="is not a directory"):
        umbel.load(path / "nothing")


def test_a_trainer_that_makes_no_model_gives_its_weights(tmp_path: Path) -> None:
    from tests.fakes import APPS

    before = sys.path[:]
    run(APPS / "slope", nodes=2, workers=0, out=tmp_path / "run", progress=SilentProgress())
    loaded = umbel.load(tmp_path / "run")
    sys.path[:] = before
    assert isinstance(loaded, Weights)
    assert loaded.parameters["slope"].shape == (3,)
