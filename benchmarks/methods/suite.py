"""Methods x seeds x splits: every run in a folder of its own, which is gone on with after a stop.

    OUT/SPLIT/METHOD/seed-N     a run directory each
    OUT/SPLIT.html              table and plots of one split: `umbel.server.output.averaging`
    OUT/methods.json, .md       all of it

A run that is there and ended is not run again; one that was stopped goes on.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from umbel.benchmarks.methods.settings import METHODS, SPLITS, Setting
from umbel.core.errors import ConfigError
from umbel.server.output import strict
from umbel.server.output.averaging import Averaged, averaged
from umbel.server.output.comparing import Target, compare, write_page
from umbel.server.output.pages import Table
from umbel.server.output.progress import SilentProgress, duration
from umbel.server.output.rundir import RunDirectory

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Planned:
    """One run: what it changes, and where it is written down."""

    split: str
    method: str
    seed: int
    changes: Mapping[str, Any]
    folder: Path


def planned(
    out: Path,
    methods: Sequence[str],
    splits: Sequence[str],
    seeds: int,
    changes: Mapping[str, Any],
) -> list[Planned]:
    """Every run of a benchmark: all methods with one seed before the next seed.

    Raises:
        ConfigError: a method or a split that there is not.
    """
    for what, given, known in (("method", methods, METHODS), ("split", splits, SPLITS)):
        for name in given:
            if name not in known:
                raise ConfigError(f"the {what} is {name!r}; it can be {', '.join(known)}")
    return [
        Planned(
            split,
            method,
            seed,
            {**changes, **METHODS[method], "split": split, "seed": seed},
            out / split / method / f"seed-{seed}",
        )
        for seed in range(seeds)
        for split in dict.fromkeys(splits)
        for method in dict.fromkeys(methods)
    ]


def measure(
    federation: Any,
    run: Callable[..., Any],
    nodes: int,
    runs: Sequence[Planned],
    tell: Tell = lambda _: None,
) -> None:
    """Run what has not been run.

    Args:
        federation: a `Federation` of the setting's parts.
        run: `umbel.run`.
        nodes: virtual nodes.
        runs: what there is to run.
        tell: hears a line for each run, with what is left to do.

    Raises:
        ConfigError: a folder holds a run with other options.
    """
    left = [one for one in runs if not _ended(one, federation)]
    if len(left) < len(runs):
        tell(f"{len(runs) - len(left)} of {len(runs)} runs are there already")
    began = time.monotonic()
    for done, one in enumerate(left, 1):
        resume = one.folder if RunDirectory(one.folder).holds_run() else None
        place = {"resume": resume} if resume else {"out": one.folder, "nodes": nodes}
        options = {} if resume else one.changes
        result = run(federation, options=options, progress=SilentProgress(), **place)
        accuracy = result["metrics"].get("accuracy")
        spent = time.monotonic() - began
        tell(
            f"{done}/{len(left)} {one.split}, {one.method}, seed {one.seed}: "
            f"{'no accuracy' if accuracy is None else f'{100 * accuracy:.1f} %'}; about "
            f"{duration(spent / done * (len(left) - done))} left"
        )


def _ended(one: Planned, federation: Any) -> bool:
    """Whether a run is there to its end.

    Raises:
        ConfigError: it has other options.
    """
    folder = RunDirectory(one.folder)
    if not folder.holds_run():
        return False
    before, now = folder.config().get("options", {}), federation.complete(one.changes)
    odd = sorted(name for name in before | now if before.get(name) != now.get(name))
    if odd:
        raise ConfigError(
            f"{one.folder} holds a run with {odd[0]}={before.get(odd[0])}, and this one would have "
            f"{now.get(odd[0])}; write to another folder (--out)"
        )
    return folder.result() is not None


def tables(setting: Setting, runs: Sequence[Planned]) -> dict[str, Averaged]:
    """What the runs reached, by split: means over seeds."""
    target = Target("accuracy", setting.target)
    found = {}
    for split in dict.fromkeys(one.split for one in runs):
        mine = sorted(
            (one for one in runs if one.split == split),
            key=lambda one: list(METHODS).index(one.method),
        )
        compared = compare([one.folder for one in mine], target)
        found[split] = averaged(compared, [one.method for one in mine])
    return found


def write(name: str, found: Mapping[str, Averaged], out: Path) -> dict[str, Any]:
    """Write a page a split, the table as Markdown and all numbers; returns those."""
    said = {"data": name, "splits": {split: one.as_json() for split, one in found.items()}}
    for split, one in found.items():
        write_page(one, out / f"{split}.html")
    texts = [
        f"### {name}, {SPLITS[split]}\n\n{markdown(one.table())}\n\n{' '.join(one.notes())}"
        for split, one in found.items()
    ]
    (out / "methods.md").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    (out / "methods.json").write_text(strict.dumps(said) + "\n", encoding="utf-8")
    return said


def markdown(table: Table) -> str:
    """A table as Markdown."""
    rows = [table.heads, ["---"] * len(table.heads), *table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace("\u00a0", " ")
