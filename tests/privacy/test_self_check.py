"""Models whose examples have gradients of their own are clipped right, others are refused."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from umbel.privacy.bounds import ghost
from umbel.privacy.bounds.examples import call, rows_of
from umbel.privacy.bounds.formed import OneByOne, Vectorised
from umbel.privacy.bounds.ghost import PerExample
from umbel.privacy.bounds.ghost_norms import GhostNorms

D, T, COUNT, NORM = 8, 5, 6, 0.5


def _losses(outputs: Tensor, targets: Tensor) -> Tensor:
    return functional.cross_entropy(outputs, targets, reduction="none")


class Net(nn.Module):
    """A few layers, and a function of them and the inputs."""

    def __init__(self, run: Callable[..., Tensor], **layers: Any) -> None:
        super().__init__()
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            elif isinstance(layer, Tensor):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.run = run

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        return self.run(self, *inputs, **named)


def _recurrent(kind: type[nn.RNNBase], **more: Any) -> nn.Module:
    return Net(
        lambda m, x: m.head(m.inner(x)[0][:, -1]),
        inner=kind(D, 6, batch_first=True, **more),
        head=nn.Linear(6, 3),
    )


def _cells() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = m.cell(x[:, t], state)
        return m.head(state[0])

    return Net(run, cell=nn.LSTMCell(D, 6), head=nn.Linear(6, 3))


def _positions(learned: bool) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        place = m.place if learned else m.place(torch.arange(x.shape[1]))
        return m.head((m.table(x) + place).tanh().mean(1))

    place = nn.Parameter(torch.zeros(T, D)) if learned else nn.Embedding(T, D)
    return Net(run, table=nn.Embedding(20, D), place=place, head=nn.Linear(D, 3))


def _tied_output() -> nn.Module:
    return Net(
        lambda m, x: functional.linear(m.inner(m.table(x)).tanh().mean(1), m.table.weight),
        table=nn.Embedding(20, D),
        inner=nn.Linear(D, D),
    )


def _tied_layers() -> nn.Module:
    table, head = nn.Embedding(20, D), nn.Linear(D, 20, bias=False)
    head.weight = table.weight
    return Net(lambda m, x: m.head(m.table(x).tanh().mean(1)), table=table, head=head)


def _folded() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        rows = m.norm(m.inner(x.reshape(-1, D)))
        return m.head(rows.tanh().view(len(x), -1, 6).mean(1))

    return Net(run, inner=nn.Linear(D, 6), norm=nn.LayerNorm(6), head=nn.Linear(6, 3))


def _attention(*, first: bool = True, frozen: bool = False, dropout: float = 0.0) -> nn.Module:
    inner = nn.MultiheadAttention(D, 2, batch_first=first, dropout=dropout)
    inner.in_proj_weight.requires_grad_(not frozen)

    def run(m: Any, x: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        return m.head(m.inner(x, x, x)[0].mean(1 if first else 0))

    return Net(run, inner=inner, head=nn.Linear(D, 3))


def _lora() -> nn.Module:
    base, up = nn.Linear(D, D).requires_grad_(False), nn.Linear(2, D, bias=False)
    nn.init.zeros_(up.weight)
    return Net(
        lambda m, x: m.head((m.base(x) + m.up(m.down(x))).relu()),
        base=base,
        down=nn.Linear(D, 2, bias=False),
        up=up,
        head=nn.Linear(D, 3),
    )


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = torch.nn.utils.weight_norm(nn.Linear(D, D))
    module = nn.Sequential(layer, nn.Linear(D, 3))
    module(torch.randn(2, D))  # from now on it cannot be copied
    return module


def _frozen_statistics() -> nn.Module:
    module = _perceptron(nn.BatchNorm1d(D))
    module[1].eval()
    return module


def _average(m: Any, x: Tensor) -> Tensor:
    """Keeps a moving average, and does not use it in training."""
    with torch.no_grad():
        m.seen.mul_(0.9).add_(0.1 * x.mean(0))
    return m.head(x)


def _perceptron(inner: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, D), inner, nn.Linear(D, 3))


def _words(**more: Any) -> nn.Module:
    return nn.Sequential(nn.Embedding(20, D, **more), nn.Flatten(), nn.Linear(T * D, 3))


def _two(m: Any, p: Tensor, q: Tensor) -> Tensor:
    return m.left(p) * m.right(q)


def _shared() -> nn.Module:
    layer = nn.Linear(D, D)
    return nn.Sequential(layer, layer, nn.Linear(D, 3))


VECTORS, SEQUENCES, WORDS, IMAGES = (COUNT, D), (COUNT, T, D), "words", (COUNT, 2, 8, 8)
FAST, VMAP, ALONE = GhostNorms, Vectorised, OneByOne

GOOD: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {
    "gru": (lambda: _recurrent(nn.GRU), SEQUENCES, ALONE),
    "rnn": (lambda: _recurrent(nn.RNN), SEQUENCES, ALONE),
    "lstm": (lambda: _recurrent(nn.LSTM), SEQUENCES, ALONE),
    "cells": (_cells, SEQUENCES, ALONE),
    "positions": (lambda: _positions(True), WORDS, VMAP),
    "places": (lambda: _positions(False), WORDS, VMAP),
    "tied output": (_tied_output, WORDS, VMAP),
    "tied layers": (_tied_layers, WORDS, VMAP),
    "folded": (_folded, SEQUENCES, FAST),
    "time first": (
        lambda: Net(
            lambda m, x: m.head(m.inner(x.transpose(0, 1)).tanh().mean(0)),
            inner=nn.Linear(D, 6),
            head=nn.Linear(6, 3),
        ),
        SEQUENCES,
        VMAP,
    ),
    "attention": (_attention, SEQUENCES, VMAP),
    "attention, frozen projection": (lambda: _attention(frozen=True), SEQUENCES, VMAP),
    "attention, time first": (lambda: _attention(first=False), SEQUENCES, VMAP),
    "by frequency": (lambda: _words(scale_grad_by_freq=True), WORDS, VMAP),
    "padding": (lambda: _words(padding_idx=0), WORDS, FAST),
    "sparse": (lambda: _words(sparse=True), WORDS, FAST),
    "lora": (_lora, VECTORS, FAST),
    "list": (
        lambda: Net(
            lambda m, x: m.head(torch.tanh(x @ m.own[0]) @ m.own[1]),
            own=nn.ParameterList([nn.Parameter(torch.randn(D, D)) for _ in range(2)]),
            head=nn.Linear(D, 3),
        ),
        VECTORS,
        VMAP,
    ),
    "unused": (
        lambda: Net(lambda m, x: m.head(x), head=nn.Linear(D, 3), other=nn.Linear(2, 2)),
        VECTORS,
        FAST,
    ),
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, groups=2, dilation=2),
            nn.ConvTranspose2d(4, 3, 2),
            nn.Flatten(),
            nn.Linear(75, 3),
        ),
        IMAGES,
        VMAP,
    ),
    "weight norm": (
        lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, D)), nn.Linear(D, 3)),
        VECTORS,
        VMAP,
    ),
    "old weight norm": (_old_weight_norm, VECTORS, VMAP),
    "one layer, two places": (_shared, VECTORS, VMAP),
    "frozen statistics": (_frozen_statistics, VECTORS, VMAP),
    "instances": (
        lambda: nn.Sequential(
            nn.InstanceNorm2d(2, track_running_stats=True), nn.Flatten(), nn.Linear(128, 3)
        ),
        IMAGES,
        FAST,
    ),
    "unused average": (
        lambda: Net(_average, head=nn.Linear(D, 3), seen=torch.zeros(D)),
        VECTORS,
        FAST,
    ),
    "two inputs": (
        lambda: Net(_two, left=nn.Linear(D, 3), right=nn.Linear(D, 3)),
        [VECTORS, VECTORS],
        FAST,
    ),
    "named inputs": (
        lambda: Net(_two, left=nn.Linear(D, 3), right=nn.Linear(D, 3)),
        {"p": VECTORS, "q": VECTORS},
        FAST,
    ),
    "double": (lambda: _perceptron(nn.ReLU()).double(), VECTORS, FAST),
    "bfloat16": (lambda: _perceptron(nn.ReLU()).bfloat16(), VECTORS, FAST),
    "half": (lambda: _perceptron(nn.ReLU()).half(), VECTORS, FAST),
    "bfloat16 lstm": (lambda: _recurrent(nn.LSTM).bfloat16(), SEQUENCES, ALONE),
}


def _inputs(shape: Any, dtype: torch.dtype) -> Any:
    if isinstance(shape, dict):
        return {name: _inputs(part, dtype) for name, part in shape.items()}
    if isinstance(shape, list):
        return [_inputs(part, dtype) for part in shape]
    return torch.randint(0, 20, (COUNT, T)) if shape == WORDS else torch.randn(shape).to(dtype)


def _one_by_one(module: nn.Module, x: Any, y: Tensor) -> dict[str, Tensor]:
    """The definition, for modules without chance: gradients taken alone, clipped, added up."""
    own = {n: p for n, p in module.named_parameters() if p.requires_grad}
    total = {n: torch.zeros(p.shape, dtype=torch.float64) for n, p in own.items()}
    for i in range(len(y)):
        one = slice(i, i + 1)
        loss = _losses(call(module, rows_of(x, one)), y[one]).sum()
        found = torch.autograd.grad(loss, list(own.values()), allow_unused=True)
        each = [
            torch.zeros(p.shape).double() if g is None else g.to_dense().double()
            for g, p in zip(found, own.values(), strict=True)
        ]
        length = float(torch.cat([g.flatten() for g in each]).norm())
        for name, gradient in zip(own, each, strict=True):
            total[name] += gradient * min(1.0, NORM / length)
    return total


@pytest.mark.parametrize("name", GOOD)
def test_whatever_the_model_the_sum_is_that_of_gradients_taken_alone(name: str) -> None:
    torch.manual_seed(3)
    make, shape, way = GOOD[name]
    module = make()
    dtype = next(module.parameters()).dtype
    x, y = _inputs(shape, dtype), torch.randint(0, 3, (COUNT,))
    state = {n: v.clone() for n, v in module.state_dict().items()}
    clipper = PerExample(module)
    clipper.check(x, y, _losses)
    assert all(torch.equal(v, state[n]) for n, v in module.state_dict().items())
    expected = _one_by_one(module, x, y)
    found = clipper.clipped_sum(x, y, _losses, NORM)
    assert clipper.way is way
    tolerance = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 2e-5
    for parameter, total in expected.items():
        assert found.gradients[parameter].dtype != dtype or tolerance == 2e-5
        error = (found.gradients[parameter].double() - total).abs().max()
        assert float(error) <= tolerance * NORM * COUNT, parameter


@pytest.mark.parametrize("name", ["dropout", "attention", "lstm"])
def test_chance_is_no_mixing(name: str) -> None:
    module = {
        "dropout": lambda: _perceptron(nn.Dropout(0.5)),
        "attention": lambda: _attention(dropout=0.3),
        "lstm": lambda: _recurrent(nn.LSTM, num_layers=2, dropout=0.3),
    }[name]()
    x = _inputs(VECTORS if name == "dropout" else SEQUENCES, torch.float32)
    y = torch.randint(0, 3, (COUNT,))
    one, two = (PerExample(module).clipped_sum(x, y, _losses, NORM) for _ in range(2))
    assert not torch.equal(one.norms, two.norms)  # the held-still chance is that of the check only


class Normalised(nn.Module):
    """Somebody's own norm layer."""

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) / (x.std(0) + 1e-5)


def _mixer(mix: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(
        lambda m, x: m.after(mix(m.before(x))), before=nn.Linear(D, D), after=nn.Linear(D, 3)
    )


def _gated(m: Any, x: Tensor) -> Tensor:
    h = m.before(x)
    return m.after(h - m.gate * h.mean(0))


def _remembering(m: Any, x: Tensor) -> Tensor:
    h = m.before(x) - m.seen
    m.seen.mul_(0.9).add_(0.1 * h.detach().mean(0))
    return m.after(h)


def _hoarding(m: Any, x: Tensor) -> Tensor:
    h = m.before(x) + getattr(m, "last", 0.0)
    m.last = h.detach().mean(0)
    return m.after(h)


def _between(run: Callable[..., Tensor], **more: Any) -> Callable[[], nn.Module]:
    return lambda: Net(run, before=nn.Linear(D, D), after=nn.Linear(D, 3), **more)


_HERE = r"\(Net\) mixes the examples of a batch between before and after"
BAD: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "batch norm": (lambda: _perceptron(nn.BatchNorm1d(D)), r"1 is a BatchNorm1d.*GroupNorm"),
    "batch norm, evaluating, without statistics": (
        lambda: _perceptron(nn.BatchNorm1d(D, track_running_stats=False)).eval(),
        "1 is a BatchNorm1d",
    ),
    "own layer": (lambda: nn.Sequential(_perceptron(Normalised())), "0.1 is a Normalised"),
    "functional batch norm": (
        _mixer(lambda h: functional.batch_norm(h, None, None, training=len(h) > 1)),
        _HERE,
    ),
    "centred": (_mixer(lambda h: h - h.mean(0)), _HERE),
    "softmax over the batch": (_mixer(lambda h: torch.softmax(h, 0)), _HERE),
    "cumulative sum": (_mixer(lambda h: h.cumsum(0)), _HERE),
    "deviation": (_mixer(lambda h: h / (1 + torch.std(h, 0, unbiased=False))), _HERE),
    "attention over the batch": (_mixer(lambda h: torch.softmax(h @ h.T, 1) @ h), _HERE),
    "neighbours": (_mixer(lambda h: h + h.roll(1, 0)), _HERE),
    "mixed at random": (_mixer(lambda h: h + 0.1 * h[torch.randperm(len(h))]), _HERE),
    "share of the largest": (_mixer(lambda h: h / h.abs().max()), _HERE),
    "by the number": (_mixer(lambda h: h / len(h)), _HERE),
    "in pieces of 32": (
        _mixer(lambda h: torch.cat([c - c.mean(0) for c in h.split(32)])),
        _HERE,
    ),
    "only large batches": (_mixer(lambda h: h - h.mean(0) if len(h) > 8 else h), "mixes"),
    "by way of numpy": (
        _mixer(lambda h: h + torch.as_tensor(h.detach().numpy().mean(0))),
        _HERE,
    ),
    "behind a gate that is shut": (
        _between(_gated, gate=nn.Parameter(torch.zeros(1))),
        _HERE,
    ),
    "moving average": (
        _between(_remembering, seen=torch.zeros(D)),
        "keeps what it has seen in seen",
    ),
    "attribute": (_between(_hoarding), "keeps what it has seen in an attribute"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_mixes_examples_is_refused_and_named(name: str) -> None:
    make, said = BAD[name]
    torch.manual_seed(1)
    x, y = torch.randn(64, D), torch.randint(0, 3, (64,))
    x[0] = 1e4
    with pytest.raises(ValueError, match=said):
        PerExample(make()).clipped_sum(x, y, _losses, 1.0)


def test_parameters_that_a_model_changes_itself_are_refused() -> None:
    x, y = torch.randint(0, 20, (COUNT, T)), torch.randint(0, 3, (COUNT,))
    for norm in (0.1, 1e3):  # whether a row is that long yet or not
        with pytest.raises(ValueError, match=r"0\.weight is changed.*max_norm"):
            PerExample(_words(max_norm=norm)).clipped_sum(x, y, _losses, 1.0)


def test_parameters_that_change_only_on_some_data_are_refused_when_they_do() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if bool((x > 100).any()):
            with torch.no_grad():
                m.head.weight.mul_(2)
        return m.head(x)

    clipper = PerExample(Net(run, head=nn.Linear(D, 3)))
    x, y = torch.randn(COUNT, D), torch.zeros(COUNT).long()
    clipper.clipped_sum(x, y, _losses, 1.0)
    with pytest.raises(ValueError, match=r"head\.weight was changed"):
        clipper.clipped_sum(1e3 * x, y, _losses, 1.0)


def test_a_loss_that_mixes_is_refused() -> None:
    def relative(outputs: Tensor, targets: Tensor) -> Tensor:
        return _losses(outputs, targets) / _losses(outputs, targets).sum()

    with pytest.raises(ValueError, match="the loss mixes"):
        PerExample(nn.Linear(D, 3)).clipped_sum(
            torch.randn(COUNT, D), torch.zeros(COUNT).long(), relative, 1.0
        )


def test_a_model_that_needs_more_than_one_example_is_refused() -> None:
    module = Net(lambda m, x: m.head(x.squeeze()), head=nn.Linear(D, 3))
    with pytest.raises(ValueError, match="single example"):
        PerExample(module).clipped_sum(
            torch.randn(COUNT, D), torch.zeros(COUNT).long(), _losses, 1.0
        )


def test_the_outcome_does_not_depend_on_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is given a batch and looks at its shapes and types alone."""
    seen: list[list[Tensor]] = []
    real = ghost.examine

    def examine(module: nn.Module, inputs: Tensor, targets: Tensor, losses: Any) -> Any:
        kept: list[Tensor] = []
        found = real(
            module, inputs, targets, lambda o, t: (kept.append(o.detach()), losses(o, t))[1]
        )
        seen.append(kept)
        return found

    monkeypatch.setattr(ghost, "examine", examine)
    for scale in (1.0, 1e30, float("nan")):
        torch.manual_seed(5)
        module = _perceptron(nn.Tanh())
        PerExample(module).check(
            torch.randn(COUNT, D) * scale, torch.randint(0, 3, (COUNT,)), _losses
        )
    assert all(map(torch.equal, seen[0], seen[1]))
    assert all(map(torch.equal, seen[0], seen[2]))


def test_one_check_serves_a_module_and_its_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = ghost.examine
    monkeypatch.setattr(ghost, "examine", lambda *given: (calls.append(1), real(*given))[1])
    module = _recurrent(nn.RNN)
    y = torch.zeros(COUNT).long()
    for count in (COUNT, 3):
        PerExample(module).clipped_sum(torch.randn(count, T, D), y[:count], _losses, 1.0)
    assert len(calls) == 1
    PerExample(module).clipped_sum(torch.randn(COUNT, T + 1, D), y, _losses, 1.0)
    assert len(calls) == 2
    module.eval()
    PerExample(module).clipped_sum(torch.randn(COUNT, T, D), y, _losses, 1.0)
    assert len(calls) == 3


def test_no_random_number_is_taken_from_anybody() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    x, y = torch.zeros(COUNT, D), torch.zeros(COUNT).long()
    module = Net(lambda m, x: m.head(x), head=_perceptron(nn.Dropout()))
    with torch.random.fork_rng():  # making the module draws
        pass
    torch.manual_seed(0)
    PerExample(module).check(x, y, _losses)
    assert (torch.rand(1), np.random.rand()) == expected
