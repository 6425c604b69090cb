"""Which running statistics a model is judged and delivered with, and who says how good it is."""

import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.server.conftest import Processes
from tests.server.small_federation import start_nodes
from tests.written import HALVES, NORMED, write_app
from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.records import Manifest
from umbel.federation import Federation
from umbel.loading import load
from umbel.running import run
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.statistics import _pooled
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack
from umbel.summary import lines


def app(folder: Path, held: str) -> Path:
    return write_app(folder, NORMED.replace("HELD", held), "rounds = 6\nlocal-epochs = 2")


@pytest.fixture(autouse=True)
def paths() -> Iterator[None]:
    before = sys.path[:]
    yield
    sys.path[:] = before


def done(folder: Path, **options: Any) -> tuple[dict[str, Any], RunDirectory]:
    out = folder.parent / f"run-{len(list(folder.parent.iterdir()))}"
    quiet = SilentProgress()
    result = run(folder, options=options, nodes=3, workers=0, out=out, progress=quiet)
    return result, RunDirectory.open(out)


def accuracy(model: nn.Module, examples: Examples) -> float:
    with torch.no_grad():
        found = model(torch.as_tensor(examples.x)).argmax(1)
    return float((found == torch.as_tensor(examples.y)).float().mean())


def test_each_node_keeps_its_own_statistics_and_the_model_is_delivered_with_all(
    tmp_path: Path,
) -> None:
    folder = app(tmp_path / "normed", "lambda options: make(999, 300)")
    result, directory = done(folder)
    import task

    model = load(directory.path)
    held = task.make(999, 300)
    assert result["metrics"]["accuracy"] > 0.75
    assert accuracy(model, held) == pytest.approx(result["metrics"]["accuracy"], abs=1e-6)
    assert result["measured"] == "central"
    # The inputs have a mean of 25; the first model's statistics would be 0 and 1.
    whole = np.concatenate([task.make(p, 64 + 8 * p).x for p in range(3)])
    before = model[0](torch.as_tensor(whole)).detach()
    away = (model[1].running_mean - before.mean(0)).abs()
    assert away.mean() < 0.5 * before.std(0).mean()  # momentum: they lag behind the parameters
    never, kept = done(folder, buffers="never")
    assert never["metrics"]["accuracy"] < 0.5
    assert torch.equal(load(kept.path)[1].running_mean, torch.zeros(16))
    assert "use buffers=local or mean" in never["warnings"][0]
    assert any("warning: the model's running statistics" in line for line in lines(never, tmp_path))


def test_without_held_out_examples_the_nodes_measurements_are_the_result(tmp_path: Path) -> None:
    result, directory = done(app(tmp_path / "normed", "None"))
    rows = directory.nodes()
    weights = [row["examples"] for row in rows]
    expected = np.average([row["accuracy"] for row in rows], weights=weights)
    assert len(rows) == 3
    assert result["metrics"]["accuracy"] == pytest.approx(expected)
    assert result["measured"] == "nodes"
    assert any("(on the nodes' own tests)" in line for line in lines(result, tmp_path))
    assert float(load(directory.path)[1].running_mean.abs().max()) > 1


def test_a_node_with_statistics_that_are_no_numbers_is_left_out(tmp_path: Path) -> None:
    """Its update is finite and counts; the model is delivered with what the others measured."""
    folder = app(tmp_path / "normed", "lambda options: make(999, 300)")
    result, directory = done(folder, huge=1, rounds=1)
    assert directory.rounds()[-1]["clients"] == 3
    mean, variance = (load(directory.path)[1].state_dict()[f"running_{k}"] for k in ("mean", "var"))
    assert bool(torch.isfinite(mean).all()) and bool(torch.isfinite(variance).all())
    assert float(mean.abs().max()) < 1e4, "nothing of the huge node's"
    assert math.isfinite(result["metrics"]["loss"])


@pytest.mark.parametrize("huge", [-1, 1])
def test_a_run_that_goes_on_is_delivered_with_the_same_statistics(
    tmp_path: Path, huge: int
) -> None:
    folder = app(tmp_path / "normed", "None")
    _, whole = done(folder, huge=huge, rounds=4)
    _, half = done(folder, huge=huge, rounds=2)
    run(resume=half.path, options={"rounds": 4}, workers=0, progress=SilentProgress())
    one, other = whole.read_model(), half.read_model()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert float(one["1.running_mean"].abs().max()) > 1


def test_statistics_come_over_the_link_as_from_nodes_in_this_process(processes: Processes) -> None:
    task = NORMED.replace("HELD", "None")
    processes.write_app({**HALVES, "task.py": task}, "rounds = 2")
    start_nodes(processes, "n1", "n2")
    processes.server()
    assert processes.wait("server") == 0, processes.log("server")
    linked = RunDirectory(Path(processes.result()["run"])).read_model()
    out = processes.folder / "embedded"
    run(processes.app, nodes=2, workers=0, out=out, progress=SilentProgress())
    embedded = RunDirectory(out).read_model()
    assert float(linked["1.running_mean"].abs().max()) > 1
    torch.testing.assert_close(linked, embedded, rtol=1e-6, atol=1e-7)


def test_variances_are_those_of_all_examples() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(size=(n, 5)) + shift for n, shift in ((30, 0), (70, 4), (10, -9))]
    whole = np.concatenate(parts)
    manifest = Manifest(("a.running_mean", "a.running_var"), ((5,), (5,)), (torch.float64,) * 2)
    values = [np.concatenate([part.mean(0), part.var(0)]) for part in parts]
    weights = [len(part) / len(whole) for part in parts]
    mean = torch.as_tensor(sum(w * v for w, v in zip(weights, values, strict=True)))
    square = torch.as_tensor(sum(w * v**2 for w, v in zip(weights, values, strict=True)))
    found = _pooled(manifest, mean, square)
    np.testing.assert_allclose(found["a.running_mean"], whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found["a.running_var"], whole.var(0), rtol=1e-12)


def test_statistics_are_not_asked_for_where_updates_are_hidden() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.Linear(4, 2))

    def data(node: Node, options: Any) -> Split:  # noqa: ARG001
        return Split(Examples(np.ones((4, 4)), np.zeros(4, int)))

    plain = Federation(TorchTrainer(net), data)
    names = ("0.running_mean", "0.running_var")
    assert plain.job(plain.complete({})).statistics == names
    assert plain.job(plain.complete({"buffers": "mean"})).statistics == ()
    assert plain.job(plain.complete({"buffers": "never"})).statistics == ()
    private = Stack([Clip(1.0), Gaussian(1.0)], PlainSum("fixed"))
    sealed = Stack([Clip(1.0), Quantize()], SecureSum())
    for stack in (private, sealed):
        hidden = replace(plain, stack=stack)
        assert hidden.job(hidden.complete({})).statistics == ()
    records = replace(plain, trainer=PrivateSgd(TorchTrainer(net)))
    assert records.job(records.complete({})).statistics == ()
