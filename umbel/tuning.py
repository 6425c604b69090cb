"""`umbel tune`: better options for an app, judged on examples that the end result never sees.

    held-out examples ──┬── validation half   every trial is scored on it
                        └── test half         opened once, when the search is over

Under a privacy claim every trial looks at the nodes' data. So the search is charged as a whole, as
the best of a random number of alike trials, or it looks at public data only.
"""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from umbel.clients.data.examples import Examples
from umbel.clients.data.partitioned import Partitioned
from umbel.clients.data.sealed import sealed
from umbel.clients.trainers.base import promising
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError, UmbelError, described
from umbel.core.options import Options, Value
from umbel.deliver.search.chance import Chance
from umbel.deliver.search.report import draw_slices
from umbel.deliver.search.space import Dimension, parse_space
from umbel.deliver.search.study import Goal, Report, Search
from umbel.delivering import held_out_of
from umbel.federation import Federation, FederationServerApp
from umbel.loading import opened
from umbel.privacy.budget.selection import SHAPES, draw_number
from umbel.running import NODES
from umbel.running import run as run_federation
from umbel.server.output import strict
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.pools.choose import check_here
from umbel.server.private.selecting import SHAPING, Trials, charge_search
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions

LOWER = ("loss", "rmse", "mse", "mae", "error", "hinge")
CERTIFIED = ("certificate.json", "seal.json", "ledger.sqlite", "MODEL_CARD.md", "report.html")
"""Files of a trial that speak of it as a run of its own, which it is not: the search is charged."""


@dataclass(frozen=True)
class Task:
    """An app as trials run it: judged on the validation half, without the rest.

    Attributes:
        name: of the app.
        federation: with the validation half in place of all held-out examples.
        options: complete ones, which trials change.
        nodes: virtual nodes.
        test: the other half.
        goal: what is searched for.
        pool: where a trial's nodes run; None is this process, one after the other.
    """

    name: str
    federation: Federation
    options: Mapping[str, Value]
    nodes: int
    test: Any
    goal: Goal
    pool: str | None = None

    def run(
        self, chosen: Mapping[str, Value], out: Path, report: Report | None = None
    ) -> dict[str, float]:
        """Run one trial; its metrics on the validation half."""
        known = self.federation.complete({})
        wanted = {**self.options, **chosen}
        changes = {n: v for n, v in wanted.items() if known.get(n) != v}
        with sealed("umbel tune searches"):
            result = run_federation(
                self.federation,
                options=changes,
                nodes=self.nodes,
                pool=self.pool,
                out=out,
                progress=_Watch(self.goal.metric, report),
            )
        return result.metrics

    def score(self, metrics: Mapping[str, float]) -> float:
        """What is compared.

        Raises:
            ConfigError: there is no such metric.
        """
        if self.goal.metric not in metrics:
            raise ConfigError(
                f"--metric is {self.goal.metric!r}, but this app has {', '.join(metrics) or 'none'}"
            )
        return float(metrics[self.goal.metric])

    def judge(self, trial: Path) -> dict[str, float]:
        """The metrics of a trial's model on the test half."""
        found = opened(trial, self.federation)
        trainer = self.federation.trainer_for(found.options)
        judged = trainer.evaluate(found.weights, self.test, found.options)
        return dict(judged.metrics)


class _Watch(SilentProgress):
    """Tells a search of every round's score."""

    def __init__(self, metric: str, report: Report | None) -> None:
        self._metric, self._report = metric, report

    def round_done(self, line: Mapping[str, Any]) -> None:
        score = line.get("metrics", {}).get(self._metric)
        if self._report is not None and isinstance(score, int | float) and math.isfinite(score):
            self._report(int(line["round"]), float(score))


def tune(
    app: Path | str | Federation,
    *,
    space: str,
    trials: int = 30,
    metric: str | None = None,
    options: Options | None = None,
    nodes: int | None = None,
    out: Path | None = None,
    workers: int = 1,
    pool: str | None = None,
    charge: str | None = None,
    public: Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Search for better options of an app.

    Args:
        app: its folder, or a `Federation`.
        space: which options, and which values; see `umbel.deliver.search.space`.
        trials: how many; under `charge`, how many are expected.
        metric: that is made better; accuracy where there is one, else the loss, if None.
        options: that every trial has, over the app's own.
        nodes: virtual nodes; as many as the app says, else 10, if None.
        out: the folder; a search that is there already goes on. None is `tune/APP`.
        workers: processes that run trials side by side.
        pool: where the nodes of a trial run: a pool of this process, such as "threads"; one after
            the other if None.
        charge: under a privacy claim, how the number of trials is drawn: "poisson", "geometric" or
            "logarithmic".
        public: a file of public examples (.npz with x and y) that trials train on instead.
        seed: of the choices, where there is no claim.
        say: is told of every trial.

    Returns:
        What `umbel tune --json` prints: `best` (options, metrics on the test half), `default`
        (likewise), `trials`, `importance`, `epsilon`, `path`.

    Raises:
        ConfigError: something that cannot be done.
        RunError: no trial could be run.
    """
    if trials < 1:
        raise ConfigError(f"--trials is {trials}; give at least 1")
    task, app_path = task_of(app, options or {}, nodes, metric, public)
    if pool is not None:  # an app's own may be registered by now
        check_here(pool, "trials run a federation with half of its held-out examples")
        task = replace(task, pool=pool)
    dimensions = parse_space(space, task.options)
    check_ends(task, dimensions)
    folder = Path(out) if out is not None else Path("tune") / task.name
    private = claims_privacy(task.federation, task.options)
    if charge is not None and not private:
        raise ConfigError(
            "--charge is for searches under a privacy claim, and this app makes none; leave it "
            "out, or ask for one: -c epsilon=3"
        )
    if private and public is None:
        return _private(task, dimensions, trials, charge, folder, say)
    folder.mkdir(parents=True, exist_ok=True)
    search = Search(folder, dimensions, task.goal, seed=seed)
    if all(_inside(one, task.options[one.name]) for one in dimensions):
        search.first(task.options)
    given = {
        "space": space,
        "trials": trials,
        "metric": metric,
        "options": dict(options or {}),
        "nodes": nodes,
        "pool": pool,
        "public": None if public is None else str(public),
        "seed": seed,
    }
    _work(task, search, folder, trials, workers, app_path, given, say)
    return _result(task, search, folder, say)


def task_of(
    app: Path | str | Federation,
    changes: Options,
    nodes: int | None,
    metric: str | None,
    public: Path | None,
) -> tuple[Task, Path | None]:
    """An app, its options checked and its held-out examples divided; and its folder.

    Raises:
        ConfigError: the app has no held-out examples, or an option cannot be used.
    """
    path: Path | None = None
    if isinstance(app, Federation):
        federation, name, own, wanted = app, app.name or "federation", {}, None
    else:
        opened_app = open_app(Path(app))
        server = opened_app.server_app()
        if not isinstance(server, FederationServerApp):
            raise ConfigError(
                f"{opened_app.name} keeps its own rounds, so Umbel cannot vary its options; only "
                "apps made with Federation can be tuned"
            )
        federation, name, path = server.federation, opened_app.name, opened_app.path
        own, wanted = dict(opened_app.options), opened_app.nodes
    complete = federation.override(federation.complete(own), changes)
    federation.check_options(complete)
    held_out = held_out_of(federation, complete)
    if held_out is None:
        raise ConfigError(
            f"{name} has no held-out examples, so nothing could judge its options; give "
            "Federation(test=...)"
        )
    validation, test = divided(held_out)
    data: Any = federation.data
    if public is not None:
        x, y = _read_public(public)
        data = Partitioned(arrays=(x, y, x[:1], y[:1]))
    judged = replace(
        federation,
        name=name,  # as runs of the app have it: they are about the same population
        data=data,
        test=lambda _: validation,
        summary=None,
    )
    goal = _goal(judged, complete, validation, metric)
    return Task(name, judged, complete, nodes or wanted or NODES, test, goal), path


def divided(examples: Any, seed: int = 0) -> tuple[Any, Any]:
    """Held-out examples in two halves, by a fixed draw.

    Raises:
        ConfigError: there are fewer than two.
    """
    count = len(examples)
    if count < 2:
        raise ConfigError(f"there is {count} held-out example; two halves need at least two")
    order = np.random.default_rng(seed).permutation(count)
    halves = np.sort(order[: count // 2]), np.sort(order[count // 2 :])
    if isinstance(examples, Examples):
        first, second = (examples.take(rows) for rows in halves)
        return first, second
    from torch.utils.data import Subset

    return Subset(examples, halves[0].tolist()), Subset(examples, halves[1].tolist())


def _goal(
    federation: Federation, options: Mapping[str, Value], validation: Any, metric: str | None
) -> Goal:
    trainer = federation.trainer_for(options)
    first = trainer.initial(options, RunOptions.read(options).seed)
    found = trainer.evaluate(first, validation, options).metrics
    chosen = metric or ("accuracy" if "accuracy" in found else "loss")
    if chosen not in found:
        raise ConfigError(
            f"--metric is {chosen!r}, but this app measures {', '.join(found) or 'nothing'}"
        )
    return Goal(chosen, not any(word in chosen.lower() for word in LOWER))


def _read_public(file: Path) -> tuple[Any, Any]:
    try:
        with np.load(file, allow_pickle=False) as found:
            return np.asarray(found["x"]), np.asarray(found["y"])
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"--public {file} cannot be read ({error}); save public examples, as the app's nodes "
            "have theirs, by numpy.savez(FILE, x=..., y=...)"
        ) from error


def check_ends(task: Task, dimensions: Sequence[Dimension]) -> None:
    """Try the ends of every dimension, before hours of trials find out one by one.

    Raises:
        ConfigError: a value that the app refuses.
    """
    for one in dimensions:
        ends: Sequence[Value] = one.choices or (one.low, one.high)
        for end in ends:
            value = int(end) if one.whole else end
            try:
                task.federation.check_options({**task.options, one.name: value})
            except UmbelError as error:
                raise ConfigError(f"--space allows {one.name}={value}: {error}") from error


def claims_privacy(federation: Federation, options: Mapping[str, Value]) -> bool:
    """Whether a run under these options promises something to somebody."""
    return (
        PrivacyOptions.read(options).on
        or federation.stack_for(options).private
        or promising(federation.trainer_for(options), options) is not None
    )


def _inside(one: Dimension, value: Value) -> bool:
    if one.choices:
        return value in one.choices
    return isinstance(value, int | float) and one.low <= value <= one.high


def _work(
    task: Task,
    search: Search,
    folder: Path,
    trials: int,
    workers: int,
    app_path: Path | None,
    given: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Run trials here, and in other processes beside this one."""
    if workers > 1 and app_path is None:
        raise ConfigError(
            f"--workers is {workers}, but a Federation object is trained in this process; make an "
            "app folder of it: umbel new NAME"
        )
    task_file = folder / "worker.json"
    helpers = []
    if workers > 1:
        text = json.dumps({**given, "app": str(app_path), "out": str(folder)})
        task_file.write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "umbel.tuning", str(task_file)]
        helpers = [subprocess.Popen(command) for _ in range(workers - 1)]
    try:
        _loop(task, search, folder, trials, say)
        for helper in helpers:
            helper.wait()
    finally:
        for helper in helpers:
            if helper.poll() is None:
                helper.terminate()
                helper.wait()
        task_file.unlink(missing_ok=True)


def _loop(
    task: Task, search: Search, folder: Path, trials: int, say: Callable[[str], None]
) -> None:
    def objective(number: int, chosen: Mapping[str, Value], report: Report) -> float:
        out = folder / "trials" / str(number)
        shutil.rmtree(out, ignore_errors=True)
        score = task.score(task.run(chosen, out, report))
        said = " ".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
            for name, value in chosen.items()
        )
        say(f"trial {number}: {task.goal.metric} {score:.4f}  {said}")
        return score

    search.run(objective, trials)


def _result(task: Task, search: Search, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The end of a search: the best trial and the defaults, on the test half."""
    found = search.trials()
    complete = [one for one in found if one["state"] == "complete"]
    if not complete:
        why = next((one["error"] for one in found if "error" in one), "all were ended early")
        raise ConfigError(f"no trial could be finished: {why}")
    best = complete[0]
    for one in complete[1:]:
        if task.goal.better(one["score"], best["score"]):
            best = one
    defaults = folder / "trials" / "default"
    if not (defaults / "model.safetensors").is_file():
        shutil.rmtree(defaults, ignore_errors=True)
        task.run({}, defaults)
    chosen = folder / "trials" / str(best["number"])
    result = {
        "path": str(folder),
        "best": {
            "options": best["options"],
            "validation": best["score"],
            "metrics": task.judge(chosen),
            "run": str(chosen),
        },
        "default": {
            "options": {one.name: task.options[one.name] for one in search.dimensions},
            "validation": task.score(RunDirectory.open(defaults).result()["metrics"]),
            "metrics": task.judge(defaults),
            "run": str(defaults),
        },
        "metric": task.goal.metric,
        "trials": found,
        "importance": search.importance(),
        "epsilon": None,
        "delta": None,
    }
    for trial in (folder / "trials").iterdir():
        if trial not in (chosen, defaults):
            shutil.rmtree(trial, ignore_errors=True)
    names = [one.name for one in search.dimensions]
    draw_slices(found, names, task.goal.metric, folder / "slices.png")
    (folder / "search.json").write_text(strict.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"report: {folder / 'search.json'}, {folder / 'slices.png'}")
    return result


# ---- under a privacy claim


WAYS_OUT = (
    "every trial would look at the nodes' data, and this app promises them privacy; let the search "
    "be charged to their ledger as a whole (--charge poisson), search on public data alone "
    "(--public FILE.npz), or choose options without a search and give them with -c"
)


def _private(
    task: Task,
    dimensions: Sequence[Dimension],
    mean: int,
    charge: str | None,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """A search that is charged before it begins, and of which only the best trial is kept."""
    if charge is None:
        raise ConfigError(WAYS_OUT)
    if charge not in SHAPES:
        raise ConfigError(f"--charge is {charge!r}; it can be {', '.join(SHAPES)}")
    if promising(task.federation.trainer_for(task.options), task.options) is not None:
        raise ConfigError(
            "here each node keeps the budget of its own records, so nobody else can charge a "
            "search to it; search on public data (--public FILE.npz), or choose options without"
        )
    shaping = [one.name for one in dimensions if one.name in SHAPING]
    if shaping:
        raise ConfigError(
            f"--space varies {shaping[0]}, on which the cost of a trial depends, and a private "
            "search has trials of one cost; leave it out, and set it with -c"
        )
    if (folder / "search.json").exists() or (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} holds a private search already, and how many trials it has was drawn once; "
            "name another folder with --out, which is charged again"
        )
    options = dict(task.options)
    privacy, run_options = PrivacyOptions.read(options), RunOptions.read(options)
    spec = task.federation.job(options, task.nodes)
    if task.federation.sampler is not None:
        raise ConfigError(
            "a private search is accounted for the samplers of Umbel, and this app brings its own; "
            "search on public data: --public FILE"
        )
    if spec.questions or not spec.stack.private:
        raise ConfigError(
            "a private search is accounted for the noise of training alone, not for private means "
            "beside it; leave these out, or search on public data: --public FILE.npz"
        )
    config = {"app": task.name, "options": options, "engine": "embedded", "nodes": task.nodes}
    directory = RunDirectory.create(None, task.name, config, out=folder)
    names = [str(number) for number in range(task.nodes)]
    trials, told = charge_search(
        directory,
        task.federation.data,
        spec.stack,
        run_options,
        privacy,
        names=names,
        size=sum(tensor.numel() for tensor in spec.parameters.values()),
        mean=float(mean),
        distribution=charge,
    )
    say(
        f"the search is charged as a whole: epsilon {trials.epsilon:.4g} at delta "
        f"{trials.delta:g} for the best of about {mean} trials ({charge}), each with noise "
        f"multiplier {trials.noise_multiplier:g} and epsilon {trials.run_epsilon:.4g} alone"
    )
    number = draw_number(float(mean), charge)
    return _private_trials(task, dimensions, trials, told, number, folder, say)


def _private_trials(
    task: Task,
    dimensions: Sequence[Dimension],
    trials: Trials,
    told: Mapping[str, Any],
    number: int,
    folder: Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    chance = Chance()
    noise = {"noise-multiplier": trials.noise_multiplier, "epsilon": math.inf}
    best: tuple[float, dict[str, Value], Path] | None = None
    for place in range(number):
        chosen = {one.name: one.pick(chance) for one in dimensions}
        out = folder / "trials" / str(place)
        try:
            with _own_data(folder / "trials" / "data"):
                score = task.score(task.run({**chosen, **noise}, out))
        except UmbelError as error:
            say(f"trial {place} failed: {described(error, '', longest=120)}")
            shutil.rmtree(out, ignore_errors=True)
            continue
        if best is None or task.goal.better(score, best[0]):
            if best is not None:
                shutil.rmtree(best[2], ignore_errors=True)
            best = score, chosen, out
        else:
            shutil.rmtree(out, ignore_errors=True)
    shutil.rmtree(folder / "trials" / "data", ignore_errors=True)
    kept = folder / "best"
    if best is not None:
        for name in CERTIFIED:
            (best[2] / name).unlink(missing_ok=True)
        best[2].rename(kept)
    shutil.rmtree(folder / "trials", ignore_errors=True)
    result = {
        "path": str(folder),
        "best": None
        if best is None
        else {
            "options": best[1],
            "validation": best[0],
            "metrics": task.judge(kept),
            "run": str(kept),
        },
        "metric": task.goal.metric,
        "trials": None,  # how many there were is a part of what is kept secret
        "importance": {},
        "epsilon": trials.epsilon,
        "delta": trials.delta,
        "noise_multiplier": trials.noise_multiplier,
        "epsilon_of_one_trial": trials.run_epsilon,
        **told,
    }
    (folder / "search.json").write_text(strict.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


@contextlib.contextmanager
def _own_data(folder: Path) -> Iterator[None]:
    """Ledgers of trials are kept apart: the population's own has the whole search in it."""
    before = os.environ.get("XDG_DATA_HOME")
    os.environ["XDG_DATA_HOME"] = str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("XDG_DATA_HOME", None)
        else:
            os.environ["XDG_DATA_HOME"] = before


def _helper(file: Path) -> None:
    """Another process of a search."""
    given = json.loads(file.read_text(encoding="utf-8"))
    folder = Path(given["out"])
    public = given["public"] and Path(given["public"])
    task, _ = task_of(given["app"], given["options"], given["nodes"], given["metric"], public)
    task = replace(task, pool=given["pool"])
    dimensions = parse_space(given["space"], task.options)
    search = Search(folder, dimensions, task.goal, seed=given["seed"] + os.getpid())
    _loop(task, search, folder, given["trials"], lambda line: print(line, file=sys.stderr))


if __name__ == "__main__":
    _helper(Path(sys.argv[1]))
