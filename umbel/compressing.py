"""`umbel compress`: which data, which recipes, and rounds of the federation where asked for."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import nn

from umbel.clients.trainers.base import StartsFromModule, Trainer
from umbel.clients.trainers.exported import TakenOutput
from umbel.core.errors import ConfigError
from umbel.core.options import Options
from umbel.deliver.compression.compress import (
    Data,
    Recipe,
    Variant,
    Workshop,
    best_of,
    closest,
    default_recipes,
    halves,
    searched_recipes,
)
from umbel.deliver.compression.pareto import draw
from umbel.deliver.compression.target import conditions
from umbel.deliver.export import Exported
from umbel.deliver.made_up import example_of
from umbel.deliver.trained import HeldOut, TrainedModel
from umbel.delivering import trained_model
from umbel.loading import opened
from umbel.running import run as run_federation
from umbel.server.output import strict
from umbel.server.output.rundir import RunDirectory

MADE_UP = 2048
"""Inputs that are made up for `--data synthetic`."""
KINDS = ("held-out", "synthetic", "federated")


@dataclass(frozen=True)
class Compressed:
    """What `umbel compress` found and delivered.

    Attributes:
        delivered: the model that was chosen.
        chosen: how it was made.
        original: measured in the same way.
        variants: all that were tried.
    """

    delivered: Exported
    chosen: Variant
    original: Variant
    variants: list[Variant]

    def to_json(self) -> dict[str, Any]:
        """For `umbel compress --json`."""
        return {
            **self.delivered.to_json(),
            "recipe": str(self.chosen.recipe),
            "original": self.original.to_json(),
            "table": [one.to_json() for one in self.variants],
        }


def compress(
    run: Path,
    *,
    recipe: Recipe | None = None,
    target: str = "",
    data: str = "held-out",
    epochs: int = 10,
    options: Options | None = None,
    out: Path | None = None,
    app: Path | Any = None,
    say: Callable[[str], None] = lambda _: None,
) -> Compressed:
    """Make a run's model small, measure it, and deliver the best.

    Args:
        run: the run's directory.
        recipe: the one way that is wanted; None tries several.
        target: what the model has to reach, such as "size<1MB accuracy>0.84".
        data: what calibration and training further see: "held-out", "synthetic", "federated", or a
            file of public examples (.npz with x and y).
        epochs: of training further.
        options: of the rounds, for "federated".
        out: the folder to make.
        app: the app's folder, if it was moved, or its `Federation`.
        say: is told of every model that was made.

    Raises:
        ConfigError: something that cannot be done.
        CheckError: nothing meets the target.
    """
    model = trained_model(run, app)
    further = None
    if data == "federated":
        if recipe is None or not recipe.trains:
            raise ConfigError(
                "--data federated trains on the nodes' own examples, and each model that is tried "
                "would do so again; name one way, such as --prune 0.8"
            )
        further = _rounds(run, app, options or {})
    elif options:
        raise ConfigError("-c is for the rounds of --data federated; leave it out")
    tuned, judged = _data(model, data)
    recipes = (
        [recipe] if recipe is not None else searched_recipes() if target else default_recipes()
    )
    with TemporaryDirectory(prefix="umbel-compress-") as folder:
        shop = Workshop(model, Path(folder), tuned, judged, epochs=epochs, further=further)
        wanted = conditions(target, list(shop.original.metrics)) if target else []
        say(row(shop.original))
        variants: list[Variant] = []
        for one in recipes:
            made = shop.variant(one)
            variants.append(made)
            say(row(made))
            if wanted and best_of(shop.original, [made], wanted) is not None:
                break
        failed = [one for one in variants if one.why_not]
        if len(failed) == len(variants):
            raise ConfigError(failed[0].why_not)
        chosen = best_of(shop.original, variants, wanted)
        if chosen is None:
            raise closest(variants, wanted)

        def beside(place: Path) -> None:
            table = {
                "original": shop.original.to_json(),
                "table": [one.to_json() for one in variants],
            }
            (place / "compression.json").write_text(strict.dumps(table, indent=2) + "\n")
            draw(shop.original, variants, place / "pareto.png")

        delivered = shop.deliver(chosen, out or run / "deliver" / "compressed", beside)
        return Compressed(delivered, chosen, shop.original, variants)


def row(one: Variant) -> str:
    """One line of the table."""
    if one.why_not:
        return f"{one.recipe!s:32}  cannot be made: {one.why_not}"
    metrics = "  ".join(f"{name} {value:.4f}" for name, value in one.metrics.items())
    return (
        f"{one.recipe!s:32}  {one.size:>11,} bytes  {one.zipped:>11,} zipped  "
        f"{1e6 * one.latency:>8.0f} us  {metrics}"
    )


def _data(model: TrainedModel, kind: str) -> tuple[Data, HeldOut]:
    """What steps see, and what nothing but the judgement sees."""
    held_out = model.held_out()
    if kind not in KINDS:
        return _public(model, kind, held_out)
    if held_out is None:
        raise ConfigError(
            f"the app of {model.name} has no held-out examples to judge a small model by; give it "
            "public ones: --data FILE.npz"
        )
    if kind == "held-out":
        tuned, judged = halves(held_out)
        return Data(kind, tuned.x, tuned.y), judged
    made = model.exported()
    signature = model.described(made.module, made.output)
    return Data("synthetic", example_of(signature.inputs, MADE_UP), None), held_out


def _public(model: TrainedModel, name: str, held_out: HeldOut | None) -> tuple[Data, HeldOut]:
    file = Path(name)
    if not file.is_file():
        raise ConfigError(
            f"--data is {name!r}, which is no file; give {', '.join(KINDS)}, or an .npz file with "
            "x and y"
        )
    try:
        with np.load(file, allow_pickle=False) as found:
            x, y = np.asarray(found["x"]), np.asarray(found["y"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"{file} cannot be read as public examples ({error}); save them by "
            "numpy.savez(FILE, x=..., y=...)"
        ) from error
    made = model.exported()
    ready = model.described(made.module, made.output).inputs.ready_all(x)
    if len(ready) != len(y):
        raise ConfigError(f"{file} has {len(ready)} inputs and {len(y)} targets; give one for each")
    if held_out is not None:
        return Data("public", ready, y), held_out
    tuned, judged = halves(HeldOut(ready, y))
    return Data("public", tuned.x, tuned.y), judged


def _rounds(
    run: Path, app: Path | Any, options: Options
) -> Callable[[nn.Module], tuple[nn.Module, RunDirectory]]:
    """Training further in rounds of the federation, as an ordinary run that begins with a module.

    Under a budget it is charged to the ledger like every other run about the same people.
    """
    before = opened(run, app)
    federation, config = before.federation, before.directory.config()
    if config.get("engine") != "embedded":
        raise ConfigError(
            f"{run} is a run of the engine {config.get('engine')!r}, whose nodes are elsewhere; "
            "train a small model there from the start, or use --data held-out"
        )
    changes = {**config.get("options", {}), "rounds": 5, **options}

    def further(module: nn.Module) -> tuple[nn.Module, RunDirectory]:
        net = module.module if isinstance(module, TakenOutput) else module
        trainer = _beginning_with(federation.trainer_for(before.options), net)
        # under the name of the first run, so that both are about one population
        name = str(config.get("app") or federation.name)
        again = replace(federation, trainer=trainer, summary=None, derived_options=None, name=name)
        known = again.complete({})
        changed = {n: v for n, v in changes.items() if n in known and known[n] != v}
        if "batched" in known:
            changed["batched"] = "off"  # one model at a time keeps its zeros by itself
        result = run_federation(again, options=changed, nodes=int(config["nodes"]))
        ended = opened(result.path, again)
        trained = copy.deepcopy(module)
        trained.set_submodule("module", trainer.ready(ended.weights, ended.options))  # type: ignore[attr-defined]  # a TorchTrainer alone comes here
        return trained, ended.directory

    return further


def _beginning_with(trainer: Trainer, net: nn.Module) -> Trainer:
    """A trainer like this one whose first model is `net`.

    Raises:
        ConfigError: its model is no PyTorch module.
    """
    if isinstance(trainer, StartsFromModule):
        return trainer.starting_from(net)
    raise ConfigError(
        f"{type(trainer).__name__} trains no PyTorch module, so nodes cannot train a smaller one; "
        "use --data held-out"
    )
