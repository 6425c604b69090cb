"""An export gives what the trained model gives, says what it takes, or says why it cannot be."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import LinearRegression, LogisticRegression, SGDClassifier
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import KBinsDiscretizer, MinMaxScaler, StandardScaler

from tests.deliver.conftest import digits
from umbel import ConfigError, Examples, Federation, FunctionTrainer, TorchTrainer, run
from umbel.clients.data.datasets import load
from umbel.clients.data.inputs import Columns, Pixels
from umbel.clients.trainers.sklearn_module import module_of
from umbel.deliver.export import Exported, export
from umbel.deliver.predictor import open_delivered
from umbel.deliver.signature import Signature
from umbel.deliver.trained import TrainedModel
from umbel.delivering import trained_model


def test_onnx_gives_what_the_trained_model_gives(trained: TrainedModel, onnx: Exported) -> None:
    assert onnx.difference is not None and onnx.difference <= 1e-4
    assert onnx.checked == "on 360 held-out examples"
    judged = trained.trainer.evaluate(trained.weights, trained.examples, trained.options)
    assert onnx.metrics["accuracy"] == pytest.approx(judged.metrics["accuracy"], abs=0.003)
    model = open_delivered(onnx.path)
    module = trained.exported().module
    for rows in (1, 7, 360):  # any number of examples at a time
        x = trained.examples.x[:rows]
        with torch.no_grad():
            wanted = module(torch.from_numpy(x)).numpy()
        assert np.abs(model.predict(x) - wanted).max() < 1e-4


def test_torch_export_and_tensors_hold_the_same_model(trained: TrainedModel, places: Path) -> None:
    made = export(trained, "torch-export", places / "pt2")
    assert made.difference is not None and made.difference <= 1e-6
    assert made.metrics == pytest.approx(
        {"accuracy": trained.run.result()["metrics"]["accuracy"]}, abs=0.003
    )
    plain = export(trained, "safetensors", places / "tensors")
    found = load_file(plain.path / "model.safetensors")
    assert found.keys() == trained.weights.parameters.keys()
    assert all(torch.equal(found[n], v) for n, v in trained.weights.parameters.items())
    assert Signature.read(plain.path).labels == tuple(map(str, range(10)))


def test_the_readmes_three_lines_load_it(
    onnx: Exported, trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (onnx.path / "README.md").read_text()
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found is not None and len(found.group(1).splitlines()) == 3
    monkeypatch.chdir(onnx.path)
    names = {"x": trained.examples.x[:3]}
    exec(found.group(1), names)
    assert np.asarray(names["outputs"]).shape == (3, 10)


def test_the_signature_makes_inputs_of_what_people_have(onnx: Exported) -> None:
    """Raw rows of the data set become the very numbers that the model was judged on."""
    from sklearn.datasets import load_digits

    signature = Signature.read(onnx.path)
    raw = load_digits().data[:5]
    assert np.allclose(signature.inputs.ready_all(raw), raw / 16, atol=1e-6)
    assert json.loads((onnx.path / "signature.json").read_text())["labels"][3] == "3"


@pytest.mark.parametrize("name", ["digits", "breast-cancer", "wine", "diabetes"])
def test_data_sets_say_how_their_inputs_are_made(name: str) -> None:
    from sklearn import datasets

    raw = getattr(datasets, f"load_{name.replace('-', '_')}")().data
    data = load(name)
    assert data.inputs is not None
    ready = {row.tobytes() for row in data.inputs.ready_all(raw).round(4) + 0.0}
    assert (
        all(row.tobytes() in ready for row in np.asarray(data.test.x).round(4)[:3] + 0.0)
        or (
            np.abs(data.inputs.ready_all(raw)[:, None] - np.asarray(data.test.x)[None, :3])
            .max(-1)
            .min(0)
            < 1e-4
        ).all()
    )


ROWS = np.random.default_rng(0).normal(size=(60, 5))
THREE = np.arange(60) % 3
ESTIMATORS = [
    LogisticRegression().fit(ROWS, THREE),
    LogisticRegression().fit(ROWS, THREE > 0),
    SGDClassifier(loss="hinge", random_state=0).fit(ROWS, THREE),
    SGDClassifier(loss="log_loss", random_state=0).fit(ROWS, THREE),
    LinearRegression().fit(ROWS, ROWS @ [1, 2, 3, 4, 5]),
    MLPClassifier((4,), max_iter=20, random_state=0, early_stopping=False),
    MLPClassifier((4,), activation="tanh", random_state=0),
    MLPRegressor(hidden_layer_sizes=(4, 3), activation="logistic", random_state=0),
    make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, THREE),
    make_pipeline(MinMaxScaler(), LinearRegression()).fit(ROWS, ROWS[:, 0]),
]


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_estimators_become_matrices(estimator: object) -> None:
    model: object = estimator
    if not hasattr(model, "n_features_in_"):
        model = model.fit(ROWS, THREE > 0 if "Class" in type(model).__name__ else ROWS[:, 0])  # type: ignore[attr-defined]
    made = module_of(model, 5)
    with torch.no_grad():
        found = made.module(torch.from_numpy(ROWS.astype(np.float32))).numpy()
    wanted = np.asarray(model.predict(ROWS))  # type: ignore[attr-defined]
    if made.output == "number":
        assert np.allclose(found[:, 0], wanted, atol=1e-3)
    else:
        assert (found.argmax(1) == wanted).mean() > 0.98


def test_a_step_that_is_no_matrix_is_named() -> None:
    with pytest.raises(ConfigError, match="GaussianNB has no coefficients"):
        module_of(GaussianNB().fit(ROWS, THREE), 5)
    model = make_pipeline(KBinsDiscretizer(3, encode="ordinal"), LinearRegression())
    with pytest.raises(ConfigError, match=r"the step KBinsDiscretizer .* has no form as a matrix"):
        module_of(model.fit(ROWS, ROWS[:, 0]), 5)


class Odd(torch.nn.Module):
    """Uses an operator that ONNX does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x) @ self.weight


def test_an_operator_that_onnx_lacks_is_named(tmp_path: Path) -> None:
    federation = replace(digits(), trainer=TorchTrainer(Odd))
    run(federation, options={"rounds": 1}, nodes=2, out=tmp_path / "run")
    model = trained_model(tmp_path / "run", federation)
    with pytest.raises(ConfigError, match=r"ONNX has no operator for \w+\.bessel_j0, .*--to torch"):
        export(model, "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_has_no_graph_is_said(tmp_path: Path, trained: TrainedModel) -> None:
    federation = Federation(
        FunctionTrainer(
            lambda _: {"w": np.zeros(3)}, lambda arrays, examples, _: (arrays, len(examples), {})
        ),
        lambda *_: Examples(np.zeros((4, 3)), np.zeros(4)),
    )
    run(federation, options={"rounds": 1}, nodes=2, out=tmp_path / "run")
    model = trained_model(tmp_path / "run", federation)
    with pytest.raises(ConfigError, match="FunctionTrainer gives no module that a graph"):
        export(model, "onnx", tmp_path / "out")
    assert export(model, "safetensors", tmp_path / "out").bytes > 0
    with pytest.raises(ConfigError, match="--to is 'tflite'; it can be onnx, torch-export"):
        export(trained, "tflite", tmp_path / "other")
    with pytest.raises(ConfigError, match="TorchTrainer, which is no Keras model"):
        export(trained, "keras", tmp_path / "other")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="holds other files"):
        export(trained, "safetensors", tmp_path / "full")


def test_a_model_without_signature_is_refused(trained: TrainedModel, tmp_path: Path) -> None:
    nobody_says = replace(trained, examples=None, inputs=None)
    with pytest.raises(ConfigError, match="has no signature: the app says nothing about its inp"):
        export(nobody_says, "onnx", tmp_path / "out")
    other = replace(trained, inputs=Pixels(8, 8))
    with pytest.raises(ConfigError, match=r"said to have the shape \(1, 8, 8\), but .* \(64,\)"):
        export(other, "onnx", tmp_path / "out")
    wrong = replace(trained, examples=None, inputs=Columns(("a", "b")))
    with pytest.raises(ConfigError, match=r"does not take inputs of the shape \(2,\)"):
        export(wrong, "onnx", tmp_path / "out")
