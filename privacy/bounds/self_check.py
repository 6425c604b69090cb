"""Whether a module's examples have gradients of their own, found out on random inputs.

    inputs    random, of the node's shapes and types; nothing of its values is used, so the
              outcome says nothing about them
    module    a copy in float64 whose weights are moved at random, so that what is switched off
              by a zero today is seen too; dropout and other chance is held still
    mixing    one example's loss beside others, beside other others, in a larger batch and alone
    memory    one example's gradient before and after other examples were seen
    ghosts    norms and sums by `GhostNorms`, beside gradients of one example at a time

Where examples mix or leave something behind, the module is refused and the layer named. Where
ghost norms differ (a weight used without calling its layer, a layer without its hook, an
embedding that scales by frequency) whole gradients are taken, by `vmap` or one by one.
"""

import copy
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from umbel.privacy.bounds.examples import (
    NARROW,
    ClippedSum,
    Losses,
    Names,
    call,
    count_of,
    mapped,
    one_each,
    rows_of,
    tensors_of,
    trained,
    widened,
)
from umbel.privacy.bounds.formed import OneByOne, Vectorised
from umbel.privacy.bounds.ghost_norms import GhostNorms

COUNT, SHARED = 5, 1
"""Examples of the check, and the one among them that is put beside others."""
LARGER = 33
"""Examples of the larger batch."""
FEW = torch.arange(COUNT)
"""Rows of the check."""
SEED = 0x5E1F

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_CURE = "so no example's influence can be bounded; use nn.GroupNorm or nn.LayerNorm"


class Way(Protocol):
    """A way to clip the gradients of a batch."""

    def __init__(self, module: nn.Module, names: Names) -> None: ...

    def clipped_sum(self, inputs: Any, targets: Any, losses: Losses, norm: float) -> ClippedSum: ...

    def each(self, inputs: Any, targets: Any, losses: Losses) -> Tensor: ...


def refuse_known(module: nn.Module) -> None:
    """Raises:
    ValueError: a layer is a batch normalisation that uses its batch.
    """
    for name, layer in module.named_modules():
        uses_batch = isinstance(layer, _BATCH_NORMS) and (
            layer.training or layer.running_mean is None
        )
        if uses_batch:
            raise ValueError(_mixing(name, layer))


def examine(module: nn.Module, inputs: Any, targets: Any, losses: Losses) -> type[Way]:
    """How this module's examples can be clipped.

    Args:
        module: in the mode in which it is trained; not changed.
        inputs: a batch, of which shapes and types are looked at; so are targets.
        losses: outputs and targets to one loss an example.

    Raises:
        ValueError: examples mix, or are remembered, or random ones cannot be put through.
    """
    refuse_known(module)
    said: Exception | None = None
    for trial in _TRIALS:
        with _unnoticed(module), _subject(module, trial) as subject:
            if subject is None:
                continue
            found = _Trial(subject, trial, losses)
            try:
                found.prepare(inputs, targets)
            except Exception as error:
                said = said or error
                continue
            return found.outcome()
    reason = "their losses are not finite" if said is None else " ".join(str(said).split())
    raise ValueError(
        "whether the model mixes the examples of a batch could not be checked on random ones of "
        f"the same shapes: {reason or type(said).__name__}; it must take any inputs of the "
        "node's shapes, and batches of a single example"
    )


@dataclass(frozen=True)
class _Kind:
    """One way to try the check; the next is for modules that do not take it.

    Attributes:
        double: in float64.
        moved: with weights moved at random.
        normal: real inputs from N(0, 1), not from [0, 1).
        known: whole numbers below the smallest embedding's size, not below 2.
    """

    double: bool
    moved: bool
    normal: bool
    known: bool

    def tolerance(self, dtype: torch.dtype) -> float:
        """Relative; modules may compute parts in float32 whatever their type."""
        if self.double:
            return 2e-5
        return 0.08 if dtype in NARROW else 2e-3


_TRIALS = [
    _Kind(double, moved, normal, known)
    for double, moved in ((True, True), (False, True), (False, False))
    for normal, known in ((True, True), (False, False))
]


class _Trial:
    """The check of one copy of a module."""

    def __init__(self, subject: nn.Module, kind: _Kind, losses: Losses) -> None:
        self.module, self.kind, self.losses = subject, kind, losses
        self.names = trained(subject)
        self.dtype = next(iter(self.names)).dtype
        self.tolerance = kind.tolerance(self.dtype)

    def prepare(self, inputs: Any, targets: Any) -> None:
        """Make the random examples, and see that the module takes them.

        Raises:
            Exception: whatever the module raises; ValueError where losses are not finite.
        """
        ids = max(2, _smallest_table(self.module)) if self.kind.known else 2
        self.inputs = self._like(inputs, ids, 1)
        self.targets = self._like(targets, 2, 2)
        self.state = _state(self.module)
        self.versions = {n: p._version for n, p in self.module.named_parameters()}
        self.first = self._losses(FEW)
        if not bool(torch.isfinite(self.first).all()):
            raise ValueError("their losses are not finite")

    def outcome(self) -> type[Way]:
        self._refuse_memory()
        self._refuse_mixing()
        norm = float(self.rows.norm(dim=1).median()) or 1.0
        for way in (GhostNorms, Vectorised):
            if self._agrees(way, norm):
                return way
        return OneByOne

    # ---- memory

    def _refuse_memory(self) -> None:
        """Losses must not depend on what was seen before; parameters are the optimiser's.

        What changes with every call, whatever was seen (a spectral norm's), is no memory.
        """
        after = []
        for start in (COUNT, 2 * COUNT):
            self._losses(_beside(start))
            after.append(self._losses(FEW, fresh=False))
        for name, parameter in self.module.named_parameters():
            if parameter._version != self.versions[name]:
                raise ValueError(
                    f"{name} is changed by the model itself while it is called, which tells which "
                    "examples it saw; leave parameters to the optimiser (no max_norm)"
                )
        now = _state(self.module)
        changed = [name for name, value in now.items() if not torch.equal(value, self.state[name])]
        if not self._same(*after):
            what = f"in {', '.join(changed[:3])}" if changed else "in an attribute of its own"
            raise ValueError(
                f"the model keeps what it has seen {what} and computes with it in training, so "
                "what one example does shows in the gradients of others; use layers that keep "
                "nothing, such as nn.GroupNorm"
            )

    # ---- mixing

    def _refuse_mixing(self) -> None:
        """One example beside others, beside other others, in a larger batch, and alone."""
        beside, larger = self._losses(_beside(COUNT)), self._losses(slice(0, LARGER))
        same = self._same(beside[SHARED], self.first[SHARED])
        if not same or not self._same(larger[:COUNT], self.first):
            raise ValueError(self._named())
        try:
            values = torch.cat([self._losses(slice(i, i + 1)) for i in range(COUNT)])
            self.rows = torch.cat([self._gradient(i) for i in range(COUNT)])
        except Exception as error:
            raise ValueError(
                f"the model does not take a batch of a single example ({_short(error)}), and "
                "without that no example has a gradient of its own; let it take any number"
            ) from error
        if not bool(torch.isfinite(self.rows).all()) or not self._same(values, self.first):
            raise ValueError(self._named())

    def _named(self) -> str:
        """Where examples mix, as a sentence."""
        places = _Places(self.module, self._losses, self.tolerance)
        company = [_beside(start) for start in range(COUNT, LARGER - COUNT, COUNT)]
        for rows in (*company, torch.tensor([SHARED])):
            place = places.of(FEW, rows)
            if place is not None:
                return place
        return f"the loss mixes the examples of a batch, {_CURE}"

    # ---- ghosts

    def _agrees(self, kind: type[Any], norm: float) -> bool:
        """Whether a way gives what single examples give, both in its norms and in its sum."""
        way = kind(self.module, self.names)
        if isinstance(way, GhostNorms) and not way.covers:
            return False
        try:
            with _Still():
                self._put_back()
                each = way.each(*self._few(), self.losses)
                self._put_back()
                total = way.clipped_sum(*self._few(), self.losses, norm)
        except Exception:  # whatever this way cannot do, single examples can
            return False
        lengths = self.rows.norm(dim=1)
        expected = (norm / lengths.clamp_min(norm)) @ self.rows
        found = torch.cat([total.gradients[name].flatten() for name in self.names.values()])
        return (
            self._same(each, self.rows)
            and self._same(total.norms, lengths)
            and self._same(found, expected)
        )

    # ---- examples and losses

    def _like(self, batch: Any, ids: int, stream: int) -> Any:
        generator = torch.Generator().manual_seed(SEED + stream)
        normal = self.kind.normal and stream == 1  # targets may be probabilities
        return mapped(batch, lambda t: self._random(t, ids, normal, generator))

    def _random(self, like: Tensor, ids: int, normal: bool, generator: torch.Generator) -> Tensor:
        shape = (LARGER, *like.shape[1:])
        if like.is_floating_point() or like.is_complex():
            made = (torch.randn if normal else torch.rand)(shape, generator=generator)
            dtype = like.dtype
            if self.kind.double and like.is_floating_point():
                dtype = torch.float64
            elif like.is_complex():
                dtype = torch.complex128 if self.kind.double else like.dtype
            return made.to(like.device, dtype)
        made = torch.randint(ids, shape, generator=generator)
        if made.ndim > 1:
            made.flatten(1)[:, 0] = 1  # a sequence of nothing but padding is none
        return made.to(like.device, like.dtype)

    def _few(self) -> tuple[Any, Any]:
        return rows_of(self.inputs, FEW), rows_of(self.targets, FEW)

    def _losses(self, rows: Any, *, fresh: bool = True) -> Tensor:
        """The losses of a batch of these rows, with chance held still.

        Args:
            rows: of the random examples.
            fresh: whether buffers are put back first.
        """
        inputs, targets = rows_of(self.inputs, rows), rows_of(self.targets, rows)
        with torch.no_grad(), _Still():
            if fresh:
                self._put_back()
            found = self.losses(call(self.module, inputs), targets)
            return widened(one_each(found, count_of(inputs))).clone()

    def _gradient(self, example: int) -> Tensor:
        """Of one example alone, shape (1, parameters)."""
        one = slice(example, example + 1)
        given = rows_of(self.inputs, one), rows_of(self.targets, one)
        with _Still():
            self._put_back()
            return OneByOne(self.module, self.names).each(*given, self.losses)

    def _put_back(self) -> None:
        with torch.no_grad():
            for name, buffer in self.module.named_buffers():
                buffer.copy_(self.state[name])

    def _same(self, one: Tensor, two: Tensor) -> bool:
        return _close(one, two, self.tolerance)


class _Places:
    """Where in a module examples meet: which tensors still have a part of one example alone."""

    def __init__(self, module: nn.Module, run: Callable[[Tensor], Any], tolerance: float) -> None:
        self.module, self.run, self.tolerance = module, run, tolerance
        self.names = {layer: name for name, layer in module.named_modules()}

    def of(self, one: Tensor, two: Tensor) -> str | None:
        """The sentence for the first place after which nothing of one example is alone.

        Args:
            one: `COUNT` rows, of which the one at `SHARED` is the example.
            two: as many others around the same example, or the example alone.
        """
        inner: list[nn.Module] = []
        last: nn.Module | None = None
        for (layer, came, before), (_, _, after) in zip(
            self._events(one), self._events(two), strict=False
        ):
            mixed = any(
                not _has_part(*pair, self.tolerance) for pair in zip(before, after, strict=False)
            )
            if mixed and not came:
                return _mixing(self.names[layer], layer)
            if mixed:
                return self._between(inner[-1] if inner else None, last, layer)
            if came:
                inner.append(layer)
            else:
                inner.pop()
                last = layer
        return None

    def _between(self, parent: nn.Module | None, last: nn.Module | None, layer: nn.Module) -> str:
        owner = self.module if parent is None else parent
        name = self.names[owner] or "the model"
        after = "" if last is None else f" between {self.names[last]} and {self.names[layer]}"
        return f"{name} ({type(owner).__name__}) mixes the examples of a batch{after}, {_CURE}"

    def _events(self, rows: Tensor) -> list[tuple[nn.Module, bool, Sequence[Tensor]]]:
        """Each layer's inputs and outputs in order: (layer, whether they came in, values)."""
        events: list[tuple[nn.Module, bool, Sequence[Tensor]]] = []

        def note(layer: nn.Module, came: bool, value: Any) -> None:
            kept = [t.detach().clone() for t in tensors_of(value) if t.is_floating_point()]
            events.append((layer, came, kept))

        handles: list[Any] = []
        for layer in self.names:
            handles += [
                layer.register_forward_pre_hook(
                    lambda m, args, kwargs: note(m, True, [list(args), dict(kwargs)]),
                    with_kwargs=True,
                ),
                layer.register_forward_hook(lambda m, _, out: note(m, False, out)),
            ]
        try:
            self.run(rows)
        finally:
            for handle in handles:
                handle.remove()
        return events


def _beside(start: int) -> Tensor:
    """Rows of the shared example, at its place, among others from `start` on."""
    return torch.arange(start, start + COUNT).where(FEW != SHARED, FEW)


def _has_part(one: Tensor, two: Tensor, tolerance: float) -> bool:
    """Whether a part of a tensor belongs to the example that is shared by both batches.

    Args:
        one: of a batch of `COUNT`.
        two: of another such batch, or of the example alone.
        tolerance: relative.
    """
    if one.shape == two.shape and _close(one, two, tolerance):
        return True
    for axis, size in enumerate(one.shape):
        each = size // COUNT
        if size % COUNT or two.ndim != one.ndim:
            continue
        for part in (slice(SHARED * each, (SHARED + 1) * each), slice(SHARED, None, COUNT)):
            index = (slice(None),) * axis + (part,)  # of view(B*T, ..), of view(T*B, ..)
            other = two if two.shape[axis] == each else two[index]
            if other.shape == one[index].shape and _close(one[index], other, tolerance):
                return True
    return False


def _close(one: Tensor, two: Tensor, tolerance: float) -> bool:
    """Equal up to a part of the largest number; NaN and infinity are not."""
    if one.numel() == 0:
        return True
    scale = float(torch.maximum(one.abs().max(), two.abs().max()))
    return float((one - two).abs().max()) <= tolerance * scale


class _Still(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's own hook
    """Chance held still: dropout keeps everything, random numbers are one half."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else PyTorch imports its compiler, which takes seconds and 100 MB

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return out
        name = func.overloadpacket.__name__
        if name == "native_dropout":
            return out[0].copy_(args[0]), out[1].fill_(True)
        if not isinstance(out, Tensor):
            return out
        if name == "randperm":
            return out.copy_(torch.arange(len(out) - 1, -1, -1))
        if name.startswith("bernoulli"):
            return out.fill_(1)
        if out.is_floating_point():
            return out if "dropout" in name else out.fill_(0.5)
        return out.fill_(0)


def _mixing(name: str, layer: nn.Module) -> str:
    what = f"{name or 'the model'} is a {type(layer).__name__}, which"
    return f"{what} mixes the examples of a batch, {_CURE}"


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _smallest_table(module: nn.Module) -> int:
    """Whole numbers below this are known to every embedding; 2 without any."""
    tables = [m for m in module.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    return min((table.num_embeddings for table in tables), default=2)


def _state(module: nn.Module) -> dict[str, Tensor]:
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return {name: value.detach().clone() for name, value in tensors}


@contextmanager
def _subject(module: nn.Module, kind: _Kind) -> Iterator[nn.Module | None]:
    """A copy to try things on; the module itself, put back afterwards, where it has none.

    None where there can be no such copy of it.
    """
    try:
        made = copy.deepcopy(module)
    except Exception:  # e.g. a weight that an old-style weight_norm computed
        made = module
    if made is module and kind.double:
        yield None
        return
    before = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    try:
        if kind.double:
            made = made.double()
        if kind.moved:
            _move(made)
        yield made
    finally:
        if made is module:
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)


def _move(module: nn.Module) -> None:
    """Weights a tenth of their size away, and away from 0."""
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.numel():
                size = float(parameter.double().square().mean().sqrt())
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_((noise * (0.1 * size + 0.01)).to(parameter))


@contextmanager
def _unnoticed(module: nn.Module) -> Iterator[None]:
    """The process's random generators are put back, and what the module warns of is not said."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = {p.device for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        random.seed(SEED)
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
