"""Models with complex parameters, and with buffers of types that NumPy or messages do not have."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clients.tasks import job
from tests.written import write_app
from umbel.clients.data.examples import Examples
from umbel.clients.trainers.function import FunctionTrainer
from umbel.loading import load
from umbel.running import run
from umbel.server.output.progress import SilentProgress

TASK = """
import numpy as np
import torch
from torch import nn
from umbel import Examples, Federation, Split, TorchTrainer

class Wave(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.mix = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))
        self.register_buffer("phase", torch.zeros(2, dtype=torch.complex64))
        self.register_buffer("small", torch.zeros(2, dtype=torch.float8_e4m3fn))
        self.register_buffer("brief", torch.zeros(2, dtype=torch.bfloat16))

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.phase.add_(1j)
                self.small.copy_(self.small.float() + 1)
                self.brief.add_(1)
        steps = [self.phase.imag[0], self.small.float()[0], self.brief.float()[0]]
        assert len({float(step) for step in steps}) == 1
        SEEN.append(float(steps[0]))
        return (x.to(torch.complex128) @ self.mix).abs().float() * self.scale

SEEN = []

def data(node, options):
    random = np.random.default_rng(node.partition)
    y = random.integers(0, 3, 16)
    return Split(Examples(random.normal(size=(16, 6)) + y[:, None], y))

federation = Federation(TorchTrainer(Wave, learning_rate=0.3), data, name="wave")
"""


@pytest.mark.parametrize("buffers", ["never", "mean"])
def test_both_parts_of_complex_numbers_are_trained(
    tmp_path: Path, buffers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_app(tmp_path / "wave", TASK, "rounds = 3")
    monkeypatch.setattr(sys, "path", sys.path[:])
    out = tmp_path / "run"
    options = {"buffers": buffers}
    run(folder, options=options, nodes=2, workers=0, out=out, progress=SilentProgress())
    import task

    model = load(out)
    first = task.federation.trainer.initial({}, 0).parameters["mix"]
    moved = model.mix.detach() - first
    assert model.mix.dtype == torch.complex128
    assert float(moved.real.abs().max()) > 1e-3
    assert float(moved.imag.abs().max()) > 1e-3
    # What a node keeps comes back in the next round, in every type.
    assert task.SEEN.count(3.0) == 2
    assert max(task.SEEN) == 3.0


def test_complex_arrays_of_a_function_are_parameters() -> None:
    trainer = FunctionTrainer(
        lambda options: {"z": np.zeros(3, complex)},  # noqa: ARG005
        lambda arrays, examples, work: ({"z": arrays["z"] + 1j}, len(examples), {}),  # noqa: ARG005
    )
    weights = trainer.initial({}, 1)
    after = trainer.train(weights, Examples(np.ones(2), np.ones(2)), job())
    assert torch.equal(after.weights.parameters["z"], torch.full((3,), 1j, dtype=torch.complex128))
