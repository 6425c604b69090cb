"""Methods by name through the whole of a run: engine, nodes, memories, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import umbel
from umbel import ConfigError, Examples, Federation, Split, TorchTrainer
from umbel.core.registry import names
from umbel.strategies.methods.named import KIND


class Net(nn.Module):
    """A body with batch normalisation, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(torch.relu(self.norm(self.body(x))))


def data(node: Any, options: Any) -> Split:  # noqa: ARG001
    """Two groups of nodes, which call the same inputs by opposite labels."""
    generator = torch.Generator().manual_seed(node.partition)
    x = torch.randn(24, 3, generator=generator)
    y = ((x[:, 0] > 0).long() + node.partition) % 2
    return Split(Examples(x[:16], y[:16]), Examples(x[16:], y[16:]))


FEDERATION = Federation(TorchTrainer(Net, batch_size=8, learning_rate=0.2), data)
OWN = {"fedprox": {"proximal-mu": 0.1}, "fedper": {"personal-layers": "head.*"}}
OWN["fedrep"] = OWN["fedper"]


def run(folder: Path, method: str, rounds: int = 2, **options: Any) -> umbel.Result:
    given = {"rounds": rounds, "method": method, **OWN.get(method, {}), **options}
    return umbel.run(FEDERATION, options=given, nodes=4, out=folder)


@pytest.mark.parametrize("method", names(KIND))
def test_every_method_runs_by_its_name(method: str, tmp_path: Path) -> None:
    result = run(tmp_path / "run", method)
    assert result["rounds"] == 2 and "accuracy" in result["metrics"]


def test_models_of_their_own_serve_nodes_that_disagree(tmp_path: Path) -> None:
    """No common model suits both groups; a head of one's own does, and so does Ditto."""
    plain = run(tmp_path / "a", "fedavg", 12)
    common = plain["metrics"]["accuracy"]
    for method in ("fedper", "fedrep", "ditto"):
        assert run(tmp_path / method, method, 12)["metrics"]["accuracy"] > common + 0.15
    tuned = run(tmp_path / "tuned", "fedavg", 12, **{"fine-tune-epochs": 8})
    assert tuned["metrics"]["accuracy"] > common + 0.15
    models = [one.model().state_dict()["head.weight"] for one in (plain, tuned)]
    assert torch.equal(*models), "nothing of the tuned models leaves the nodes"


@pytest.mark.parametrize("method", ["scaffold", "fedper", "fedrep", "ditto"])
def test_memories_survive_a_stop(method: str, tmp_path: Path) -> None:
    """A run that goes on from its directory ends with the bits of one that was not stopped."""
    whole = run(tmp_path / "whole", method, 4)
    folder = tmp_path / "stopped"
    run(folder, method, 2)
    went_on = umbel.run(FEDERATION, options={"rounds": 4}, resume=folder)
    one, other = whole.model().state_dict(), went_on.model().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert went_on["metrics"] == whole["metrics"]
    with pytest.raises(ConfigError, match=rf"method=fedavg \(it was {method}\) cannot change"):
        umbel.run(FEDERATION, options={"rounds": 6, "method": "fedavg"}, resume=folder)


def test_an_app_brings_its_own_by_name(tmp_path: Path) -> None:
    umbel.register("objective", "strong-pull", umbel.FedProx(5.0))
    near = run(tmp_path / "near", "strong-pull").model().state_dict()
    free = run(tmp_path / "free", "fedavg").model().state_dict()
    assert not torch.equal(near["body.weight"], free["body.weight"])


def test_what_cannot_be_had_is_a_sentence(tmp_path: Path) -> None:
    for given, words in (
        ({"method": "scafold"}, "method is 'scafold'; it can be fedavg, fedprox, scaffold"),
        ({"method": "scaffold", "feddyn-alpha": 0.5}, "give method=feddyn"),
        ({"fine-tune-epochs": 1, "client-eval-every": -1}, "none is tuned, because client-eval"),
        ({"fine-tune-epochs": 1, "secure": True}, "none is tuned, because updates are hidden"),
        ({"method": "fedper", "personal-layers": "tail"}, "no parameter of the model"),
        ({"method": "fedper", "personal-layers": "head.*", "keep-model": "best"}, "keep"),
    ):
        with pytest.raises(ConfigError, match=words):
            umbel.run(FEDERATION, options=given, nodes=4, out=tmp_path / "refused")
