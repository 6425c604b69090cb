"""A small model: one way after another is tried, measured as it will run, and put in a table.

recipe      what is taken out (zeros, units, rank), or a smaller model of the same app; then
            training further on examples; then 8 bits
measured    bytes of the file, and of it zipped; time for one input; the metrics of the judging
            half of the held-out examples, which no step has seen
"""

import copy
import gzip
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn

from umbel.clients.pytorch.compact import settled
from umbel.core.errors import CheckError, ConfigError
from umbel.deliver.compression.fine_tuning import fine_tune
from umbel.deliver.compression.pruning import with_low_rank, with_zeros, without_units
from umbel.deliver.compression.rounding import CALIBRATED, to_int8
from umbel.deliver.compression.target import Condition
from umbel.deliver.export import FORMS, Exported, deliver
from umbel.deliver.made_up import example_of
from umbel.deliver.metrics import scores
from umbel.deliver.onnx_graph import OnnxPredictor, write_onnx
from umbel.deliver.parcel import Step, fresh_folder
from umbel.deliver.signature import Signature
from umbel.deliver.trained import HeldOut, TrainedModel
from umbel.server.output.rundir import RunDirectory

Array = np.ndarray[Any, Any]
Int8 = Literal["none", "dynamic", "static"]
FURTHER, FROM_NOTHING = 2e-3, 1e-2
"""Learning rates of Adam: of a model that is good already, and of one with its first weights."""
BEST = 0.01
"""Without a target, the smallest file counts that loses no more than this of the metric."""


@dataclass(frozen=True)
class Recipe:
    """One way to make a model small.

    Attributes:
        prune: share of the weights that become zero.
        units: share of the hidden units that go.
        low_rank: share of their rank that matrices keep; 0 leaves them alone.
        student: options of a smaller model of the same app, which is trained to give the same.
        int8: rounding of the graph.
    """

    prune: float = 0.0
    units: float = 0.0
    low_rank: float = 0.0
    student: Mapping[str, Any] = field(default_factory=dict)
    int8: Int8 = "none"

    def __post_init__(self) -> None:
        for name in ("prune", "units", "low_rank"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {value:g}; give a share from 0 to below 1"
                )
        if self.int8 not in ("none", "dynamic", "static"):
            raise ConfigError(f"--int8 is {self.int8!r}; it can be dynamic or static")

    @property
    def trains(self) -> bool:
        """Whether something is taken out that training further can make up for."""
        return bool(self.prune or self.units or self.low_rank or self.student)

    def __str__(self) -> str:
        parts = [
            f"{name} {value:g}"
            for name, value in (
                ("units", self.units), ("low-rank", self.low_rank), ("prune", self.prune)
            )
            if value
        ]  # fmt: skip
        if self.student:
            said = " ".join(f"{name}={value}" for name, value in self.student.items())
            parts.insert(0, f"student {said}")
        if self.int8 != "none":
            parts.append(f"int8 {self.int8}")
        return " + ".join(parts) or "original"


@dataclass(frozen=True)
class Data:
    """The examples that calibration and training further see.

    Attributes:
        kind: "held-out", "public" or "synthetic"; see `umbel.deliver.parcel.Step`.
        x: inputs.
        y: targets; None where there are none.
    """

    kind: str
    x: Array
    y: Array | None


@dataclass(frozen=True)
class Variant:
    """A model that was made, and what was measured of it.

    Attributes:
        recipe: how it was made.
        file: its ONNX graph.
        steps: for its card.
        size: of the file, in bytes.
        zipped: of the file, compressed by gzip.
        latency: seconds for one input, alone, in one thread.
        metrics: on the judging examples.
        why_not: why this recipe made no model; the rest is empty then.
    """

    recipe: Recipe
    file: Path | None = None
    steps: tuple[Step, ...] = ()
    size: int = 0
    zipped: int = 0
    latency: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    why_not: str = ""

    @property
    def values(self) -> dict[str, float]:
        """What a target can ask for."""
        return {"size": self.size, "latency": self.latency, **self.metrics}

    def to_json(self) -> dict[str, Any]:
        """For the table of `umbel compress --json`."""
        if self.why_not:
            return {"recipe": str(self.recipe), "error": self.why_not}
        return {
            "recipe": str(self.recipe),
            "bytes": self.size,
            "zipped": self.zipped,
            "latency": self.latency,
            "metrics": dict(self.metrics),
        }


def default_recipes() -> list[Recipe]:
    """What is tried where nothing is asked for."""
    return [
        Recipe(int8="dynamic"),
        Recipe(int8="static"),
        Recipe(prune=0.8),
        Recipe(units=0.5),
        Recipe(low_rank=0.25),
        Recipe(prune=0.8, int8="static"),
        Recipe(units=0.5, int8="static"),
    ]


def searched_recipes() -> list[Recipe]:
    """What is tried for a target, from the gentlest to the hardest."""
    alone = [Recipe(int8="dynamic"), Recipe(int8="static")]
    shares = (0.25, 0.5, 0.75, 0.875)
    taken = [replace(r, int8=i) for i in ("none", "static") for r in (
        *(Recipe(units=share) for share in shares),
        *(Recipe(low_rank=1 - share) for share in shares),
        *(Recipe(units=0.5, prune=share) for share in (0.5, 0.8)),
    )]  # fmt: skip
    return alone + taken


class Workshop:
    """Makes variants of one model; each module is made and trained once, then rounded in turn.

    Attributes:
        signature: of the model.
        original: the model itself, measured.
    """

    def __init__(
        self,
        model: TrainedModel,
        folder: Path,
        data: Data,
        judged: HeldOut,
        *,
        epochs: int,
        further: Callable[[nn.Module], tuple[nn.Module, RunDirectory]] | None = None,
    ) -> None:
        """Measure the original.

        Args:
            model: that is made small.
            folder: for the graphs.
            data: for calibration and training.
            judged: that metrics are measured on; none of `data` is among them.
            epochs: of training further.
            further: trains a module in rounds of the federation in place of `data`; gives it back
                with the directory of that run.

        Raises:
            ConfigError: the model is no graph.
        """
        self.model, self.folder, self.data, self.judged = model, folder, data, judged
        self._epochs, self._further = epochs, further
        self._model = model  # whose run the numbers are of
        made = model.exported()
        self._module = made.module
        self.signature: Signature = model.described(made.module, made.output)
        self._graphs: dict[str, tuple[Path, tuple[Step, ...]]] = {}  # by the recipe's text
        self.original = self.variant(Recipe())

    def variant(self, recipe: Recipe) -> Variant:
        """Make a model by a recipe and measure it; one that cannot be made says why."""
        try:
            graph, steps = self._graph(replace(recipe, int8="none"))
            file = graph
            if recipe.int8 != "none":
                file = graph.with_name(f"{graph.stem}-{recipe.int8}.onnx")
                x = self.data.x[:CALIBRATED] if recipe.int8 == "static" else None
                to_int8(graph, file, x)
                seen = self.data.kind if recipe.int8 == "static" else "none"
                count = {"examples": len(x)} if x is not None else {}
                steps = (*steps, Step(f"quantize-{recipe.int8}", seen, count))
            return self._measured(recipe, file, (*steps, Step("export")))
        except ConfigError as error:
            if recipe == Recipe():
                raise
            return Variant(recipe, why_not=str(error))

    def deliver(
        self, variant: Variant, out: Path, beside: Callable[[Path], None] | None = None
    ) -> Exported:
        """Put a variant into a folder, as `umbel export` does.

        Args:
            variant: that was made.
            out: the folder.
            beside: writes more into it, before it is closed.
        """
        assert variant.file is not None
        folder = fresh_folder(out)
        if beside is not None:
            beside(folder)
        shutil.copy(variant.file, folder / FORMS["onnx"])
        self.signature.write(folder)
        outputs = OnnxPredictor(variant.file)(self.judged.x)
        assert self.original.file is not None
        first = OnnxPredictor(self.original.file)(self.judged.x)
        difference = float(np.abs(outputs - first).max())
        checked = f"on {len(self.judged):,} held-out examples that no step has seen"
        return deliver(
            self._model,
            folder,
            "onnx",
            list(variant.steps),
            self.signature,
            variant.metrics,
            difference,
            checked,
        )

    def _graph(self, recipe: Recipe) -> tuple[Path, tuple[Step, ...]]:
        name = str(recipe)
        if name not in self._graphs:
            module, steps = self._made(recipe)
            file = self.folder / f"{len(self._graphs)}.onnx"
            write_onnx(module, example_of(self.signature.inputs), file)
            self._graphs[name] = file, steps
        return self._graphs[name]

    def _made(self, recipe: Recipe) -> tuple[nn.Module, tuple[Step, ...]]:
        module, steps = copy.deepcopy(self._module), list[Step]()
        if recipe.student:
            module = self._student(recipe.student)
        if recipe.units:
            module = without_units(module, recipe.units)
            steps.append(Step("prune-units", details={"share": recipe.units}))
        if recipe.low_rank:
            module = with_low_rank(module, recipe.low_rank)
            steps.append(Step("low-rank", details={"share": recipe.low_rank}))
        if recipe.prune:
            module = with_zeros(module, recipe.prune)
            steps.append(Step("prune", details={"share": recipe.prune}))
        if recipe.trains:
            what = "distil" if recipe.student else "fine-tune"
            if self._further is not None:
                module, run = self._further(module)
                self._model = replace(self.model, run=run)
                rounds = run.result().get("rounds", 0)
                steps.append(Step(what, "federated", {"run": run.path.name, "rounds": rounds}))
            elif self._epochs:
                fine_tune(
                    module,
                    self._module,
                    self.data.x,
                    self.data.y,
                    output=self.signature.output,
                    epochs=self._epochs,
                    learning_rate=FROM_NOTHING if recipe.student else FURTHER,
                )
                details = {"examples": len(self.data.x), "epochs": self._epochs}
                steps.append(Step(what, self.data.kind, details))
        return settled(module).eval(), tuple(steps)

    def _student(self, changes: Mapping[str, Any]) -> nn.Module:
        unknown = [name for name in changes if name not in self.model.options]
        if unknown:
            raise ConfigError(
                f"--student changes the option {unknown[0]!r}, which the app does not have; name "
                "options that its model reads"
            )
        options = {**self.model.options, **changes}
        first = self.model.trainer.initial(options, int(options.get("seed", 0)))
        same = {n: v.shape for n, v in first.parameters.items()} == {
            n: v.shape for n, v in self.model.weights.parameters.items()
        }
        if same:
            raise ConfigError(
                "--student gives a model of the same size: the app's model does not read these "
                "options; write it as a function of them, as in an app made by umbel new"
            )
        small = replace(self.model, weights=first, options=options)
        return small.exported().module

    def _measured(self, recipe: Recipe, file: Path, steps: tuple[Step, ...]) -> Variant:
        predict = OnnxPredictor(file, threads=1)
        outputs = predict(self.judged.x)
        content = file.read_bytes()
        return Variant(
            recipe,
            file,
            steps,
            len(content),
            len(gzip.compress(content, 9)),
            latency_of(predict, self.judged.x[:1]),
            scores(self.signature, outputs, self.judged.y),
        )


def latency_of(predict: Callable[[Array], Array], x: Array, turns: int = 200) -> float:
    """Seconds for one input: the median, after a few that warm up."""
    for _ in range(10):
        predict(x)
    times = []
    for _ in range(turns):
        began = time.perf_counter()
        predict(x)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def halves(examples: HeldOut, seed: int = 0) -> tuple[HeldOut, HeldOut]:
    """Held-out examples in two: one to train and calibrate on, one to judge by."""
    order = np.random.default_rng(seed).permutation(len(examples))
    middle = len(order) // 2
    return examples.take(np.sort(order[:middle])), examples.take(np.sort(order[middle:]))


def best_of(
    original: Variant, variants: Sequence[Variant], target: Sequence[Condition]
) -> Variant | None:
    """The variant that is delivered: the smallest that meets the target; None where none does.

    Without a target: the smallest that loses no more than a hundredth of the metric.
    """
    made = [one for one in variants if not one.why_not]
    if target:
        fits = [one for one in made if all(c.misses(one.values) == 0 for c in target)]
    else:
        fits = [one for one in made if _loss(original, one) <= BEST] or made
    return min(fits, key=lambda one: (one.size, one.latency), default=None)


def _loss(original: Variant, other: Variant) -> float:
    """What is lost of accuracy, or gained in relative error."""
    if "accuracy" in original.metrics:
        return original.metrics["accuracy"] - other.metrics["accuracy"]
    if "rmse" in original.metrics:
        return other.metrics["rmse"] / max(original.metrics["rmse"], 1e-12) - 1
    return 0.0


def closest(variants: Sequence[Variant], target: Sequence[Condition]) -> CheckError:
    """What is said where nothing meets a target."""
    made = [one for one in variants if not one.why_not]
    near = min(made, key=lambda one: sum(c.misses(one.values) for c in target))
    missed = [c for c in target if c.misses(near.values)]
    said = ", ".join(f"{c.name} {near.values[c.name]:.6g}" for c in missed)
    return CheckError(
        f"none of {len(made)} models meets the target; the nearest is {near.recipe} with {said}"
    )
