"""A small model: what is taken out is out, what is left is right, and the table tells the truth."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.deliver.conftest import digits
from umbel import CheckError, ConfigError, TorchTrainer, run
from umbel.clients.pytorch.compact import settled
from umbel.compressing import compress
from umbel.deliver.checking import check_delivery
from umbel.deliver.compression.compress import Recipe, Variant, best_of, halves
from umbel.deliver.compression.fine_tuning import fine_tune
from umbel.deliver.compression.pareto import front
from umbel.deliver.compression.pruning import with_low_rank, with_zeros, without_units
from umbel.deliver.compression.target import conditions
from umbel.deliver.predictor import open_delivered
from umbel.deliver.trained import HeldOut, TrainedModel
from umbel.server.output.rundir import RunDirectory


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3)
        self.norm = nn.BatchNorm2d(6)
        self.second = nn.Conv2d(6, 4, 3)
        self.last = nn.Linear(4 * 4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.last(torch.flatten(torch.relu(self.second(x)), 1))


@pytest.fixture
def conv() -> nn.Module:
    torch.manual_seed(0)
    return Conv().eval()


IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_zeros_are_the_smallest_and_stay_in_training(conv: nn.Module) -> None:
    before = copy.deepcopy(conv.state_dict())
    made = with_zeros(conv, 0.75)
    x = IMAGES.numpy()
    fine_tune(made, conv, x, np.zeros(5, np.int64), output="logits", epochs=3)
    plain = settled(copy.deepcopy(made)).eval()
    weights = [m.weight for m in plain.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == round(0.75 * sum(w.numel() for w in weights))
    kept = torch.cat([before[n].abs().flatten() for n in ("first.weight", "last.weight")])
    mask = torch.cat([(m.weight == 0).flatten() for m in (plain.first, plain.last)])
    assert kept[mask].max() <= kept[~mask].min() + 1e-6
    assert torch.equal(plain(IMAGES), made.eval()(IMAGES))
    assert all(torch.equal(v, before[n]) for n, v in conv.state_dict().items())


def test_units_that_do_nothing_go_without_a_trace(conv: nn.Module) -> None:
    """Channels whose weights onward are zero are the ones that go, and nothing changes."""
    with torch.no_grad():
        conv.second.weight[:, [0, 2, 5]] = 0
        conv.last.weight.view(3, 4, 16)[:, [1, 3]] = 0
    made = without_units(conv, 0.5).eval()
    assert made.first.out_channels == made.norm.num_features == made.second.in_channels == 3
    assert made.second.out_channels == 2 and made.last.in_features == 32
    with torch.no_grad():
        assert torch.allclose(made(IMAGES), conv(IMAGES), atol=1e-6)


def test_a_matrix_of_low_rank_is_its_factors(conv: nn.Module) -> None:
    with torch.no_grad():
        conv.second.weight.copy_(
            torch.einsum("o,ikl->oikl", torch.arange(1.0, 5), conv.second.weight[0])
        )
        conv.first.weight.copy_(
            torch.einsum("o,ikl->oikl", torch.arange(1.0, 7), conv.first.weight[0])
        )
    made = with_low_rank(conv, 0.25).eval()
    assert isinstance(made.second, nn.Sequential) and isinstance(made.last, nn.Linear)
    with torch.no_grad():
        assert torch.allclose(made(IMAGES), conv(IMAGES), atol=1e-4)


def test_what_cannot_go_is_said() -> None:
    with pytest.raises(ConfigError, match="no linear or convolutional layer"):
        with_zeros(nn.LayerNorm(3), 0.5)
    with pytest.raises(ConfigError, match="passes its units on to one other layer alone"):
        without_units(nn.Sequential(nn.Linear(3, 2)), 0.5)
    with pytest.raises(ConfigError, match="no layer of the model gets smaller"):
        with_low_rank(nn.Sequential(nn.Linear(3, 2)), 0.9)
    with pytest.raises(ConfigError, match="--prune is 1; give a share from 0 to below 1"):
        Recipe(prune=1.0)


def test_targets_are_read_with_their_units() -> None:
    size, accuracy, latency = conditions("size<1.5MB accuracy>84% latency<=2ms", ["accuracy"])
    assert (size.bound, accuracy.bound, latency.bound) == (1.5e6, 0.84, 0.002)
    assert size.misses({"size": 1e6}) == 0 and size.misses({"size": 3e6}) == pytest.approx(1)
    assert accuracy.misses({"accuracy": 0.42}) == pytest.approx(0.5)
    for text, said in {
        "size=1MB": "write conditions such as",
        "speed<1": "what is measured is size, latency, accuracy",
        "size<1MiB": "has the unit 'MiB' of size",
        " ": "--target is empty",
    }.items():
        with pytest.raises(ConfigError, match=said):
            conditions(text, ["accuracy"])


def variant(size: int, accuracy: float) -> Variant:
    return Variant(Recipe(), Path("x"), (), size, size, 0.001, {"accuracy": accuracy})


def test_the_best_is_the_smallest_that_is_good_enough() -> None:
    original, good, small = variant(100, 0.9), variant(50, 0.895), variant(10, 0.5)
    assert best_of(original, [good, small], []) is good
    assert best_of(original, [good, small], conditions("accuracy>0.4", ["accuracy"])) is small
    assert best_of(original, [good, small], conditions("accuracy>0.95", ["accuracy"])) is None
    worse = variant(60, 0.89)
    assert front([original, good, small, worse], "accuracy", higher=True) == [small, good, original]


def test_halves_share_nothing_and_lose_nothing() -> None:
    whole = HeldOut(np.arange(11.0)[:, None], np.arange(11))
    one, other = halves(whole)
    assert sorted([*one.y.tolist(), *other.y.tolist()]) == list(range(11))


def test_a_models_table_and_the_folder_that_is_delivered(
    trained: TrainedModel, places: Path
) -> None:
    lines: list[str] = []
    recipe = Recipe(units=0.5, int8="static")
    found = compress(
        trained.run.path, recipe=recipe, out=places / "small", app=digits(), epochs=5,
        say=lines.append,
    )  # fmt: skip
    assert found.delivered.bytes < found.original.size
    assert found.chosen.metrics["accuracy"] > found.original.metrics["accuracy"] - 0.1
    table = json.loads((places / "small/compression.json").read_text())
    assert [one["recipe"] for one in table["table"]] == ["units 0.5 + int8 static"]
    assert (places / "small/pareto.png").stat().st_size > 1000 and len(lines) == 2
    assert open_delivered(places / "small").predict(trained.examples.x[:3]).shape == (3, 10)
    assert "quantize-static" in (places / "small/MODEL_CARD.md").read_text()
    assert check_delivery(places / "small").problems == []


def test_rounding_a_private_model_keeps_its_claim_and_shows_it(
    private: TrainedModel, places: Path
) -> None:
    found = compress(
        private.run.path, recipe=Recipe(int8="dynamic"), out=places / "rounded", app=digits()
    )
    assert found.chosen.metrics["accuracy"] == pytest.approx(
        found.original.metrics["accuracy"], abs=0.05
    )
    checked = check_delivery(places / "rounded")
    assert checked.problems == []
    assert (
        "shown here: all 4 tensors of the released model are in it, rounded at most"
        in (checked.claims[-1])
    )


def test_training_on_examples_is_said_on_the_card(private: TrainedModel, places: Path) -> None:
    compress(
        private.run.path, recipe=Recipe(prune=0.5), out=places / "pruned", app=digits(), epochs=1
    )
    checked = check_delivery(places / "pruned")
    assert checked.problems == []
    assert "examples used: held-out" in checked.claims[-1]
    card = (places / "pruned/MODEL_CARD.md").read_text()
    assert "fine-tune saw examples (held-out)" in card.replace("The step ", "")


def test_nodes_train_a_pruned_model_and_are_charged_for_it(
    private: TrainedModel, places: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The zeros stay through noisy rounds, and the ledger has both runs."""
    monkeypatch.setenv("XDG_DATA_HOME", str(places / "data"))
    monkeypatch.chdir(tmp_path)
    compress(
        private.run.path, recipe=Recipe(prune=0.5), data="federated", out=places / "again",
        app=digits(), options={"rounds": 2, "epsilon": 8.0},
    )  # fmt: skip
    (second,) = (tmp_path / "runs").iterdir()
    result = RunDirectory.open(second).result()
    assert result["epsilon"] == pytest.approx(8, rel=0.01)
    assert result["epsilon_in_total"]["model-user"] > 1.2 * result["epsilon"]
    checked = check_delivery(places / "again")
    assert checked.problems == []
    assert "trained on the nodes' data and was charged for it" in checked.claims[-1]
    from umbel.deliver.tensors import tensors_in

    held = [t.values for t in tensors_in(places / "again/model.onnx", "onnx") if t.values.ndim == 2]
    share = sum(int((v == 0).sum()) for v in held) / sum(v.size for v in held)
    assert share == pytest.approx(0.5, abs=0.01)


def test_a_smaller_model_of_the_app_learns_from_the_large_one(tmp_path: Path) -> None:
    def sized(options: dict[str, object]) -> nn.Module:
        return nn.Sequential(nn.Linear(64, int(str(options["hidden"]))), nn.ReLU(), nn.Linear(
            int(str(options["hidden"])), 10))  # fmt: skip

    federation = replace(
        digits(), trainer=TorchTrainer(sized, learning_rate=0.2), options={"hidden": 32}
    )
    run(federation, options={"rounds": 3}, nodes=2, out=tmp_path / "run")
    found = compress(
        tmp_path / "run", recipe=Recipe(student={"hidden": 8}), app=federation, epochs=100
    )
    assert found.delivered.bytes < found.original.size
    assert found.chosen.metrics["accuracy"] > found.original.metrics["accuracy"] - 0.15
    with pytest.raises(ConfigError, match="'hiden', which the app does not have"):
        compress(tmp_path / "run", recipe=Recipe(student={"hiden": 8}), app=federation)


def test_what_is_asked_wrongly_gets_one_sentence(trained: TrainedModel, tmp_path: Path) -> None:
    path, app = trained.run.path, digits()
    with pytest.raises(ConfigError, match="does not read these options"):
        compress(path, recipe=Recipe(student={"rounds": 3}), app=app)
    with pytest.raises(ConfigError, match="each model that is tried would do so again"):
        compress(path, data="federated", app=app)
    with pytest.raises(ConfigError, match="--data is 'mine', which is no file"):
        compress(path, data="mine", app=app)
    with pytest.raises(ConfigError, match="-c is for the rounds"):
        compress(path, options={"rounds": 3}, app=app)
    (tmp_path / "bad.npz").write_text("x")
    with pytest.raises(ConfigError, match="cannot be read as public examples"):
        compress(path, data=str(tmp_path / "bad.npz"), app=app)
    with pytest.raises(CheckError, match="none of 1 models meets the target; the nearest is int8"):
        compress(path, recipe=Recipe(int8="dynamic"), target="size<1kB", app=app)


def test_public_examples_may_tune_it(trained: TrainedModel, tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    np.savez(tmp_path / "public.npz", x=bunch.data[:200], y=bunch.target[:200])
    found = compress(
        trained.run.path, recipe=Recipe(prune=0.3), data=str(tmp_path / "public.npz"),
        out=tmp_path / "out", app=digits(), epochs=1,
    )  # fmt: skip
    steps = json.loads((found.delivered.path / "delivery.json").read_text())["steps"]
    assert {"what": "fine-tune", "data": "public", "examples": 200, "epochs": 1} in steps
