"""A trainer made of plain functions of NumPy arrays, for any method and any library.

    def train(arrays, examples, job):
        slope = arrays["slope"] + job.learning_rate * ...
        return {"slope": slope}, len(examples), {"loss": ...}

    trainer = FunctionTrainer(initial=lambda options: {"slope": np.zeros(3)}, train=train)

NumPy in, NumPy out. Global random generators are seeded from the job around each call and put
back afterwards. Arrays of real or complex numbers are parameters, which are averaged; others are
carried state, and so are those that `state` names: moving averages of batch normalisation, a
step counter. State follows the option `buffers`; it is never clipped, noised or part of a norm.

    FunctionTrainer(initial, train, state=("*moving_mean", "*moving_variance"))
"""

import cmath
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from torch import Tensor

from umbel.clients.data.arrays import not_a_number
from umbel.clients.given import check_functions
from umbel.clients.metrics import named_numbers
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Any]
"""Names to arrays, in a fixed order; what functions return may be anything like an array."""

Initial = Callable[[Options], Arrays]
Trained3 = tuple[Arrays, int, Mapping[str, float]]
Trained4 = tuple[Arrays, int, Mapping[str, float], int]
Train = Callable[[dict[str, Array], Any, Job], Trained3 | Trained4]
Evaluate = Callable[[dict[str, Array], Any], Mapping[str, float]]


class FunctionTrainer:
    """Trains whatever `train` trains.

    Args:
        initial: the run's options to the first arrays.
        train: arrays, a node's examples and the job to new arrays (same names and shapes), the
            number of examples, and metrics; and the number of its steps, where it applies
            corrections. The arrays that it gets are its own to change.
        evaluate: arrays and examples to metrics, means over the examples; None for none.
        options: options of the functions' own, with defaults; `job.options` has them all.
        honours: what `train` does beyond plain training: `{"correction"}` where it adds
            `job.correction` (see `umbel.Correction`) to every gradient and returns its steps.
        state: names of arrays that are carried and not trained, or patterns of such names.
    """

    def __init__(
        self,
        initial: Initial,
        train: Train,
        evaluate: Evaluate | None = None,
        options: Options | None = None,
        honours: Iterable[str] = (),
        state: Sequence[str] = (),
    ) -> None:
        self.honours = frozenset(honours)
        self._initial, self._train, self._evaluate = initial, train, evaluate
        check_functions(self, "_initial", "_train", "_evaluate")
        if isinstance(state, str) or not all(isinstance(name, str) for name in state):
            raise ConfigError(
                f"state is {state!r}, and it has to be a list of names, as in "
                "state=['moving_mean', 'moving_variance']"
            )
        self._state = tuple(state)
        self.OPTIONS: dict[str, bool | int | float | str] = dict(options or {})

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model; random draws of the function start from `seed`."""
        with seeded(seed):
            arrays = self._initial({**self.OPTIONS, **options})
        if not isinstance(arrays, Mapping) or not arrays:
            raise ConfigError(
                f"the function `initial` returned {arrays!r}; return a dict of names to arrays"
            )
        tensors = {name: _tensor(name, value) for name, value in arrays.items()}
        for pattern in self._state:
            if not any(fnmatchcase(name, pattern) for name in tensors):
                raise ConfigError(
                    f"state names {pattern!r}, but the model has the arrays {', '.join(tensors)}; "
                    "name one of them, or leave it out"
                )
        return _split(tensors, self._is_state)

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The carried arrays of real numbers, which training gathers from examples."""
        if not self._state:
            return ()
        buffers = self.initial(options, 0).buffers
        return tuple(name for name, value in buffers.items() if value.dtype.is_floating_point)

    def _is_state(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self._state)

    USE = "model"

    def ready(self, weights: Weights, options: Options) -> dict[str, Array]:  # noqa: ARG002
        """The arrays by name."""
        return _arrays({**weights.parameters, **weights.buffers})

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Call `train` on copies of the arrays; `weights` is not mutated.

        Raises:
            ConfigError: what it returns is not a model like the one it got.
        """
        before = {**weights.parameters, **weights.buffers}
        complete = replace(job, options={**self.OPTIONS, **job.options})
        with seeded(job.seed):
            result = self._train(_arrays(before), examples, complete)
        try:
            arrays, count, metrics, *more = result
            (steps,) = more or (0,)
        except (TypeError, ValueError):
            raise ConfigError(
                "the function `train` has to return three values: arrays, number of examples and "
                f"metrics; it returned {type(result).__name__}"
            ) from None
        if count < 1:
            raise ConfigError(f"the function `train` trained on {count} examples; it needs one")
        after = _like(before, arrays)
        if not all(_finite(after[name]) for name in weights.parameters):
            found = not_a_number(examples)
            if found:
                raise ConfigError(f"{found}; fill it or leave those examples out")
        return Trained(
            Weights(
                {name: after[name] for name in weights.parameters},
                {name: after[name] for name in weights.buffers},
            ),
            int(count),
            named_numbers(metrics, "the function `train`"),
            int(steps),
        )

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:  # noqa: ARG002
        """Call `evaluate` on copies of the arrays; without one, there are no metrics."""
        if self._evaluate is None:
            return Evaluated(len(examples), {})
        arrays = _arrays({**weights.parameters, **weights.buffers})
        with seeded(0):
            metrics = self._evaluate(arrays, examples)
        return Evaluated(len(examples), named_numbers(metrics, "the function `evaluate`"))


def _finite(values: Tensor) -> bool:
    """Whether all are finite numbers; their sum tells, unless it is too large itself."""
    return cmath.isfinite(values.sum().item()) or bool(torch.isfinite(values).all())


def _tensor(name: str, value: Any) -> Tensor:
    array = np.array(value, order="C")
    if array.dtype.kind not in "biufc":
        raise ConfigError(f"the array {name} holds values of type {array.dtype}; use numbers")
    return torch.from_numpy(array)


def _viewed(name: str, value: Any) -> Tensor:
    """What a function returned, without a copy where that is an array that torch can hold."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iuf" and value.flags.carray:
        return torch.from_numpy(value)
    return _tensor(name, value)


def _split(tensors: dict[str, Tensor], is_state: Callable[[str], bool]) -> Weights:
    real = {
        n: value
        for n, value in tensors.items()
        if (value.dtype.is_floating_point or value.is_complex()) and not is_state(n)
    }
    if not real:
        raise ConfigError(
            f"none of the arrays {', '.join(tensors)} holds real or complex numbers, so there is "
            "nothing to train; make the parameters float, and leave them out of `state`"
        )
    return Weights(real, {name: value for name, value in tensors.items() if name not in real})


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Array]:
    return {name: tensor.numpy().copy() for name, tensor in tensors.items()}


def _like(before: Mapping[str, Tensor], arrays: Any) -> dict[str, Tensor]:
    """The new arrays as tensors of the types they had before."""
    names = set(arrays) if isinstance(arrays, Mapping) else set()
    if names != set(before):
        raise ConfigError(
            f"the function `train` returned the arrays {sorted(map(str, names))}, but the model "
            f"has {sorted(before)}; return all of them, under the same names"
        )
    after = {}
    for name, old in before.items():
        new = _viewed(name, arrays[name])
        if new.shape != old.shape:
            raise ConfigError(
                f"the function `train` returned {name} with shape {tuple(new.shape)}, but the "
                f"model has {tuple(old.shape)}; shapes have to stay"
            )
        after[name] = new.to(old.dtype)
    return after
