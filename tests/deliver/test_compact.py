"""Models that are trained small are small, learn, and travel like all others."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.deliver.conftest import digits, net
from umbel import ConfigError, TorchTrainer, compact, run
from umbel.clients.pytorch.compact import Largest, OnGrid
from umbel.delivering import trained_model


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    weight = torch.randn(4, 6, requires_grad=True)
    for part in (Largest(0.5), OnGrid(4)):
        weight.grad = None
        part(weight).pow(2).sum().backward()
        assert torch.allclose(weight.grad, 2 * part(weight).detach())  # type: ignore[arg-type]


def test_the_largest_stay_and_the_grid_is_as_fine_as_it_says() -> None:
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    sparse = Largest(0.75)(weight)
    assert int((sparse == 0).sum()) == 30
    assert weight.abs()[sparse == 0].max() <= weight.abs()[sparse != 0].min()
    rounded = OnGrid(3)(weight)
    assert all(len(row.unique()) <= 7 for row in rounded)
    step = weight.abs().amax(1, keepdim=True) / 3
    assert ((rounded - weight).abs() <= step / 2 + 1e-6).all()


def test_a_compact_model_learns_in_rounds_and_is_exported_small(tmp_path: Path) -> None:
    trainer = TorchTrainer(compact(net, sparsity=0.8, bits=8), learning_rate=0.2)
    federation = replace(digits(), trainer=trainer)
    options = {"rounds": 5, "local-epochs": 2}
    result = run(federation, options=options, nodes=4, out=tmp_path / "run")
    assert result.metrics["accuracy"] > 0.7
    module = trained_model(tmp_path / "run", federation).exported().module
    weights = [layer.weight for layer in module.modules() if isinstance(layer, nn.Linear)]
    for weight in weights:
        assert float((weight == 0).float().mean()) > 0.799
        step = weight.detach().abs().amax(1, keepdim=True) / 127
        whole = (weight / step.clamp_min(1e-12)).detach().numpy()
        assert np.abs(whole - whole.round()).max() < 1e-3


def test_what_cannot_be_compact_is_said() -> None:
    with pytest.raises(ConfigError, match="sparsity is 1; give a share from 0"):
        compact(net, sparsity=1.0)
    with pytest.raises(ConfigError, match="bits is 1; give 2 to 8"):
        compact(net, bits=1)
    with pytest.raises(ConfigError, match="without linear or convolutional layers"):
        compact(lambda: nn.LayerNorm(3), bits=8)({})
