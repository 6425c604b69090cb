"""One small run, one private run, and their exports, for all tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("onnx", reason="pip install 'umbel[deliver]'")
pytest.importorskip("onnxruntime", reason="pip install 'umbel[deliver]'")

from torch import nn

from umbel import Dirichlet, Federation, Partitioned, TorchTrainer, run
from umbel.deliver.export import Exported, export
from umbel.deliver.trained import TrainedModel
from umbel.delivering import trained_model


def net() -> nn.Module:
    """64 pixels of a digit to ten classes: 2,410 parameters."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def digits() -> Federation:
    return Federation(
        TorchTrainer(net, learning_rate=0.2), Partitioned("digits", Dirichlet(10.0)), name="digits"
    )


@pytest.fixture(scope="session")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deliver")


@pytest.fixture(scope="session")
def trained(places: Path) -> TrainedModel:
    """A model of ordinary training."""
    out, federation = places / "run", digits()
    run(federation, options={"rounds": 5, "local-epochs": 2}, nodes=4, out=out)
    return trained_model(out, federation)


@pytest.fixture(scope="session")
def private(places: Path) -> Iterator[TrainedModel]:
    """A model that was trained under a promise."""
    out, federation = places / "private", digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(places / "data"))
        run(federation, options={"rounds": 2, "epsilon": 8.0}, nodes=20, out=out)
        yield trained_model(out, federation)


@pytest.fixture(scope="session")
def onnx(trained: TrainedModel, places: Path) -> Exported:
    return export(trained, "onnx", places / "onnx")


@pytest.fixture(scope="session")
def private_onnx(private: TrainedModel, places: Path) -> Exported:
    return export(private, "onnx", places / "private-onnx")
