"""`check_trainer`: the laws of `umbel.clients.trainers.base.Trainer`."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from umbel.clients.given import understood
from umbel.clients.trainers.base import (
    ChecksOptions,
    CohortTrainer,
    Honours,
    Job,
    RecordPrivate,
    Trained,
    Trainer,
    Weights,
)
from umbel.core.errors import ConfigError
from umbel.core.records import Manifest
from umbel.core.streams import seeded
from umbel.strategies.objective import AHEAD, CORRECTION, PARTS, Correction
from umbel.strategies.run_options import RunOptions
from umbel.testing.laws import hold, same

UNKNOWN = "an-option-that-nobody-knows"
CLOSE = 1e-3
"""How far a batched training may be off, as a part of the way that training went."""


def check_trainer(
    trainer: Trainer,
    examples: Any,
    options: Mapping[str, bool | int | float | str] | None = None,
    *,
    repeatable: bool = True,
) -> None:
    """Fail unless a trainer keeps its laws on these examples.

    The same options and seed give the same bits, whatever was trained or drawn before; weights and
    examples are left alone; names, shapes, types and order stay; training gives finite weights
    and metrics; unknown options change nothing or are refused; a trainer with `check_options`
    refuses wrong types; `train_cohort`, where there is one, gives what `train` gives; a trainer
    that honours corrections follows them and says its steps.

        check_trainer(TorchTrainer(Net), Examples(x, y), {"local-epochs": 2})

    It trains about eight times, with corrections about twelve, so a few examples and a small model
    are enough.

    Args:
        trainer: the one to try.
        examples: of one node.
        options: changes to the trainer's own `OPTIONS` and to those of a run.
        repeatable: False for a trainer that adds noise of the operating system, which must differ
            from job to job; then the law of equal bits is turned round.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    name = type(trainer).__name__
    own = dict(understood(trainer))
    known = {**RunOptions.defaults(), **own, **(options or {})}
    if isinstance(trainer, ChecksOptions):
        _options_are_checked(name, trainer, known, own)
    first = _first(name, trainer, known)
    trained = _trained(name, trainer, first, examples, known, repeatable=repeatable)
    _layout(name, first, trained)
    if not isinstance(trainer, RecordPrivate):  # an epsilon without noise is infinite
        _numbers(f"{name}: metrics of training are finite numbers", trained.metrics, nan=False)
    _judged(name, trainer, trained.weights, examples, known)
    _unknown_options(name, trainer, first, examples, known, trained if repeatable else None)
    said = trainer.honours if isinstance(trainer, Honours) else frozenset[str]()
    honours = CORRECTION in said
    if honours and repeatable:
        _corrected(name, trainer, first, examples, known, trained)
        if PARTS in said:
            _parted(name, trainer, first, examples, known)
        if AHEAD in said:
            _led(name, trainer, first, examples, known, trained)
    if isinstance(trainer, CohortTrainer):
        _cohort(name, trainer, first, examples, known)
        if honours:
            offset = _direction(first, 1e-2)
            _cohort(name, trainer, first, examples, known, Correction(offset, None, 0.1))


def _job(options: Mapping[str, Any], seed: int = 7) -> Job:
    """A job with a memory of its own; the rate is the trainer's."""
    return Job(1, seed, dict(options))


def _first(name: str, trainer: Trainer, options: Mapping[str, Any]) -> Weights:
    with seeded(1):
        first = trainer.initial(dict(options), 3)
    hold(
        bool(first.parameters) and all(t.is_floating_point() or t.is_complex()
                                       for t in first.parameters.values()),
        f"{name}: parameters are tensors of real or complex numbers",
        f"`initial` gave {_kinds(first)}",
        "put counters and other whole numbers into the buffers",
    )  # fmt: skip
    with seeded(2):
        again = trainer.initial(dict(options), 3)
    hold(
        same(_plain(first), _plain(again)),
        f"{name}: the same options and seed give the same first weights",
        f"`initial` with seed 3 gave two that differ in {_differs(first, again)}",
        "draw them from the seed that `initial` is given, or inside `umbel.clients.seeding.seeded`",
    )
    return first


def _trained(
    name: str,
    trainer: Trainer,
    first: Weights,
    examples: Any,
    options: Mapping[str, Any],
    *,
    repeatable: bool,
) -> Trained:
    """The result of a job, done twice with another job in between."""
    weights, rows = copy.deepcopy(_plain(first)), copy.deepcopy(examples)
    with seeded(1):
        trained = trainer.train(first, examples, _job(options))
    hold(
        same(weights, _plain(first)),
        f"{name}: `train` leaves the weights that it is given alone",
        "they were changed",
        "train a copy (`tensor.clone()`)",
    )
    hold(
        same(rows, examples),
        f"{name}: `train` leaves the examples alone",
        "they were changed",
        "shuffle row numbers in place of rows, and normalise copies",
    )
    kept = copy.deepcopy(_plain(trained.weights))
    with seeded(2):
        trainer.train(first, examples, _job(options, seed=8))
    hold(
        same(kept, _plain(trained.weights)),
        f"{name}: what `train` returned stays as it is",
        "the next job changed it",
        "return copies of the tensors that the trainer goes on with",
    )
    with seeded(2):
        again = trainer.train(first, examples, _job(options))
    equal = same(kept, _plain(again.weights)) and trained.metrics == again.metrics
    if repeatable:
        hold(
            equal,
            f"{name}: the same options and seed give the same bits, whatever was done before",
            f"a job that was done twice differs in {_differs(trained.weights, again.weights)}",
            "draw from `job.seed` alone and keep nothing on self; a trainer whose noise must not "
            "be repeated is checked with repeatable=False",
        )
    else:
        hold(
            not equal,
            f"{name}: noise that hides somebody is never drawn twice",
            "a job that was done twice gave the same bits",
            "draw it from the operating system; without noise, check with repeatable=True",
        )
    return trained


def _layout(name: str, first: Weights, trained: Trained) -> None:
    after = trained.weights
    for kind in ("parameters", "buffers"):
        old, new = getattr(first, kind), getattr(after, kind)
        hold(
            list(old) == list(new),
            f"{name}: names and order of the {kind} stay in training",
            f"{list(old)[:6]} became {list(new)[:6]}",
            "build the result by going over the weights that came",
        )
        for key in old:
            hold(
                old[key].shape == new[key].shape and old[key].dtype == new[key].dtype,
                f"{name}: shapes and types stay in training",
                f"{key} was {tuple(old[key].shape)} of {old[key].dtype} and became "
                f"{tuple(new[key].shape)} of {new[key].dtype}",
                "convert the result back to what came",
            )
    for key, value in after.parameters.items():
        hold(
            bool(torch.isfinite(value).all()),
            f"{name}: training from what `initial` gives returns finite weights",
            f"{key} has NaN or infinity",
            "lower the learning rate, or raise ConfigError that says what is wrong with the data",
        )
    hold(
        isinstance(trained.examples, int) and trained.examples > 0,
        f"{name}: `examples` is how many a node trained on, a whole number above 0",
        f"it is {trained.examples!r}",
        "return len(examples); raise ConfigError where there are none",
    )


def _judged(
    name: str, trainer: Trainer, weights: Weights, examples: Any, options: Mapping[str, Any]
) -> None:
    before, rows = copy.deepcopy(_plain(weights)), copy.deepcopy(examples)
    with seeded(1):
        found = trainer.evaluate(weights, examples, dict(options))
    with seeded(2):
        again = trainer.evaluate(weights, examples, dict(options))
    hold(
        same(before, _plain(weights)) and same(rows, examples),
        f"{name}: `evaluate` leaves weights and examples alone",
        "they were changed",
        "judge a copy",
    )
    hold(
        same(found.metrics, again.metrics),
        f"{name}: the same weights and examples are judged alike",
        f"`evaluate` gave {found.metrics} and then {again.metrics}",
        "switch dropout and the like off, and draw nothing at random",
    )
    _numbers(f"{name}: metrics of `evaluate` are numbers, NaN where there is none", found.metrics)


def _numbers(law: str, metrics: Mapping[str, Any], *, nan: bool = True) -> None:
    for key, value in metrics.items():
        good = isinstance(value, int | float) and not math.isinf(value)
        hold(
            good and (nan or not math.isnan(value)),
            law,
            f"{key} is {value!r}",
            "give a float, and leave out what cannot be measured",
        )


def _unknown_options(
    name: str,
    trainer: Trainer,
    first: Weights,
    examples: Any,
    options: Mapping[str, Any],
    expected: Trained | None,
) -> None:
    law = f"{name}: an unknown option changes nothing or is refused with a ConfigError"
    try:
        trained = trainer.train(first, examples, _job({**options, UNKNOWN: 1}))
    except ConfigError:
        return
    except Exception as error:
        raise AssertionError(
            f"{law}, but it was a {type(error).__name__}: {error}; read options by name, and leave "
            "the others alone"
        ) from error
    if expected is not None:
        hold(
            same(_plain(expected.weights), _plain(trained.weights)),
            law,
            f"with {UNKNOWN}=1 training gave other weights",
            "read options by name, never by their number or order",
        )


def _direction(first: Weights, length: float) -> torch.Tensor:
    """A flat vector of the model's size, in no direction of note."""
    size = Manifest.of(first.parameters).size
    vector = torch.randn(size, generator=torch.Generator().manual_seed(5))
    return vector * (length / float(vector.norm()))


def _parted(
    name: str, trainer: Trainer, first: Weights, examples: Any, options: Mapping[str, Any]
) -> None:
    """Parameters that a correction does not train keep their bits."""
    end = next(iter(first.parameters.values())).numel()
    job = replace(_job(options), correction=Correction(trains=((0, end),)))
    after = trainer.train(first, examples, job).weights
    moved = [n for n, old in first.parameters.items() if not torch.equal(old, after.parameters[n])]
    hold(
        set(moved) <= {next(iter(first.parameters))},
        f"{name}: a trainer that honours parts leaves the others as they are",
        f"with the first parameter to be trained, {moved} changed",
        "give the optimiser only the parameters that `job.correction.trains` names",
    )


def _led(
    name: str,
    trainer: Trainer,
    first: Weights,
    examples: Any,
    options: Mapping[str, Any],
    plain: Trained,
) -> None:
    """Gradients a hair ahead are those at the place itself; a step ahead is another place."""
    layout = Manifest.of(first.parameters)
    start, there = (layout.flatten(w.parameters) for w in (first, plain.weights))

    def trained(ahead: float) -> torch.Tensor:
        job = replace(_job(options), correction=Correction(ahead=ahead))
        return layout.flatten(trainer.train(first, examples, job).weights.parameters)

    # Dropout draws other masks where each step looks twice, so half of the way is not too far;
    # a gradient that is lost or counted twice is all of it.
    near, way = float((trained(1e-9) - there).norm()), float((there - start).norm())
    hold(
        near <= 0.5 * way + 1e-6 * (1 + float(start.norm())),
        f"{name}: gradients that are taken a hair ahead are those without",
        f"they moved the model by {near:.3g}, and training moves it by {way:.3g}",
        "bring the weights back before the step, and keep the gradient",
    )
    hold(
        not torch.equal(trained(0.1), there),
        f"{name}: a trainer that honours ahead takes gradients elsewhere",
        "with ahead=0.1 it made the same model",
        "take the gradient at w - ahead x gradient(w)",
    )


def _corrected(
    name: str,
    trainer: Trainer,
    first: Weights,
    examples: Any,
    options: Mapping[str, Any],
    plain: Trained,
) -> None:
    """gradient <- gradient + offset + strength (w - anchor), at every step."""
    cure = "add `job.correction` to the gradient before the optimiser, or honour nothing"
    steps = plain.steps
    hold(
        isinstance(steps, int) and steps > 0,
        f"{name}: a trainer that honours corrections says how many steps it made",
        f"`steps` is {steps!r}",
        "count the optimiser's steps in Trained(..., steps=...)",
    )
    layout = Manifest.of(first.parameters)
    start = layout.flatten(first.parameters)

    def moved(correction: Correction) -> torch.Tensor:
        """How the corrected model differs from the plain one."""
        job = replace(_job(options), correction=correction)
        after = trainer.train(first, examples, job).weights
        return layout.flatten(after.parameters) - layout.flatten(plain.weights.parameters)

    nothing = moved(Correction(torch.zeros_like(start), start.clone(), 0.0))
    way = float((layout.flatten(plain.weights.parameters) - start).norm())
    # Not to the bit: optimisers that divide by the gradient's size enlarge its rounding errors.
    hold(
        float(nothing.norm()) <= 0.1 * way + 1e-6 * (1 + float(start.norm())),
        f"{name}: a correction of zero changes nothing",
        f"it moved the model by {float(nothing.norm()):.3g}",
        cure,
    )
    offset = _direction(first, 1.0)
    along = float(moved(Correction(offset)) @ offset)
    hold(
        along < 0,
        f"{name}: an offset of the gradient moves the model against it",
        f"the model moved by {along:.3g} along an offset of length 1",
        cure,
    )
    far = _direction(first, 10.0)
    along = float(moved(Correction(None, start + far, 0.5)) @ far)
    hold(
        along > 0,
        f"{name}: a correction pulls the model towards its anchor",
        f"the model moved by {along:.3g} along the way there",
        cure,
    )


def _options_are_checked(
    name: str, trainer: ChecksOptions, known: Mapping[str, Any], own: Mapping[str, Any]
) -> None:
    try:
        trainer.check_options(dict(known))
    except ConfigError as error:
        raise AssertionError(
            f"{name}: its own defaults can be used, but `check_options` refuses them ({error}); "
            "change the default in OPTIONS, or give the check other options"
        ) from error
    for option, default in own.items():
        wrong: Any = 1.5 if isinstance(default, str) else "not-a-number"
        law = f"{name}: an option of the wrong type is refused with a ConfigError"
        cure = "read it with its default's type in `check_options`"
        try:
            trainer.check_options({**known, option: wrong})
        except ConfigError:
            continue
        except Exception as error:
            raise AssertionError(
                f"{law}, but {option}={wrong!r} raised {type(error).__name__}: {error}; {cure}"
            ) from error
        hold(False, law, f"{option}={wrong!r} was taken", cure)


def _cohort(
    name: str,
    trainer: Any,
    first: Weights,
    examples: Any,
    options: Mapping[str, Any],
    correction: Correction | None = None,
) -> None:
    jobs = [replace(_job(options, seed), correction=correction) for seed in (7, 8)]
    together = trainer.train_cohort([first, first], [examples, examples], jobs)
    if together is None:  # it says that it does not apply
        return
    law = f"{name}: `train_cohort` gives what `train` gives for each node, to float tolerance"
    cure = "give each node's own seed, examples and weights to its part, or return None"
    hold(len(together) == 2, law, f"2 nodes got {len(together)} results", cure)
    for job, got in zip(jobs, together, strict=True):
        seed, alone = job.seed, trainer.train(first, examples, job)
        _layout(name, first, got)
        hold(got.examples == alone.examples, law, f"it counts {got.examples} examples in place of "
             f"{alone.examples}", cure)  # fmt: skip
        for key, value in alone.weights.parameters.items():
            way = float((value - first.parameters[key]).abs().max())
            off = float((value - got.weights.parameters[key]).abs().max())
            hold(
                off <= CLOSE * way + 1e-5,
                law,
                f"with seed {seed} {key} is off by {off:.3g}, where training moved it by {way:.3g}",
                cure,
            )


def _plain(weights: Weights) -> dict[str, Any]:
    return {"parameters": weights.parameters, "buffers": weights.buffers}


def _kinds(weights: Weights) -> str:
    return (
        ", ".join(f"{key} of {value.dtype}" for key, value in weights.parameters.items()) or "none"
    )


def _differs(one: Weights, other: Weights) -> str:
    """The names whose values differ, or what else does."""
    pairs = {**one.parameters, **one.buffers}, {**other.parameters, **other.buffers}
    found = [key for key in pairs[0] if not same(pairs[0][key], pairs[1].get(key))]
    return ", ".join(found[:3]) or "their names or metrics"
