"""Attack by rule by share of liars: accuracy, and what the rule costs.

    umbel bench robust --app my-app --liars 0.2

Every cell is a run of the app itself on the embedded engine; only what the liars send is changed,
before the server reads it. So liars are played in the clear; what a secure sum of buckets makes of
them is tested with nodes of its own (tests/umbel/test_robust.py).
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from umbel.benchmarks.attack.views import play
from umbel.benchmarks.robust.attacks import ATTACKS, LIES, FlippedLabels, lying
from umbel.core.errors import ConfigError, UmbelError
from umbel.core.options import Options
from umbel.server.embedded.executor import FIRST_NODE
from umbel.strategies.aggregators.named import RULES, rule_named

FLOOR = 0.1
"""So much accuracy may a rule lose under a share of liars that it says to stand."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        rule: the aggregator.
        attack: what the liars do.
        liars: how many of the nodes lie.
        accuracy: of the model at the end, on held-out examples; None where there is none.
        lost: against the same rule without liars.
        seconds: of a round, aggregation alone.
        refused: why there was no run.
    """

    rule: str
    attack: str
    liars: int
    accuracy: float | None = None
    lost: float | None = None
    seconds: float = 0.0
    refused: str = ""

    def falls(self, floor: float) -> bool:
        """Whether a rule that says to stand these liars loses more than `floor`."""
        if self.rule in ("mean", "norm-bound") or self.refused or self.attack == "none":
            return False
        return self.lost is None or self.lost > floor


def measure(
    federation: Any,
    nodes: int,
    options: Options,
    rules: Sequence[str],
    attacks: Sequence[str],
    share: float,
    tell: Callable[[str], None] = lambda _: None,
    *,
    pool: str | None = None,
) -> list[Cell]:
    """Every attack against every rule.

    Args:
        federation: whose data, trainer and layers are used; it evaluates centrally.
        nodes: virtual nodes.
        options: of the runs.
        rules: names of aggregators.
        attacks: names; `none` is always the first.
        share: of the nodes that lie; rules are told it.
        tell: hears a line for each run.
        pool: where the nodes run, a pool of this process; one after the other if None.

    Raises:
        ConfigError: a name that there is not, or no liar at all.
    """
    for what, given, known in (
        ("rule", rules, ("mean", *RULES)),
        ("attack", attacks, ATTACKS),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(f"the {what} is {name!r}; it can be {', '.join(known)}")
    count = math.floor(share * nodes + 1e-9)
    if not 0 < count < nodes:
        raise ConfigError(f"liars is {share:g} of {nodes} nodes, which is {count} liars; take some")
    seed = int(options.get("seed", 0))
    liars = random.Random(seed).sample(range(nodes), count)
    cells: list[Cell] = []
    for rule in rules:
        clean: float | None = None
        for attack in dict.fromkeys(("none", *attacks)):
            cell = _run(federation, nodes, options, rule, attack, liars, share, pool)
            if attack == "none":
                clean = cell.accuracy
            if cell.accuracy is not None and clean is not None:
                cell = replace(cell, lost=clean - cell.accuracy)
            cells.append(cell)
            tell(f"{rule}, {attack}: {cell.refused or accuracy_text(cell.accuracy)}")
    return cells


def _run(
    federation: Any,
    nodes: int,
    options: Options,
    rule: str,
    attack: str,
    liars: Sequence[int],
    share: float,
    pool: str | None,
) -> Cell:
    cell = Cell(rule, attack, 0 if attack == "none" else len(liars))
    given = {**options, "aggregator": rule}
    if rule != "mean":
        given["liars"] = share
    own = federation
    if attack == "label-flip":
        test = federation.test or federation.data.central_test
        own = replace(federation, data=FlippedLabels(federation.data, frozenset(liars)), test=test)
    ids = [FIRST_NODE + partition for partition in liars]
    seed = int(options.get("seed", 0))
    try:
        if rule != "mean":
            rule_named(rule, own.complete(given))
        played = play(
            own,
            nodes,
            given,
            listen=lambda _: False,
            asking=lambda exchange: (
                lying(exchange, ids, LIES[attack], seed) if attack in LIES else exchange
            ),
            pool=pool,
        )
    except UmbelError as error:
        return replace(cell, refused=" ".join(str(error).split()))
    accuracy = played.result.get("metrics", {}).get("accuracy")
    spent = [float(line.get("phases", {}).get("aggregate", 0.0)) for line in played.lines]
    return replace(cell, accuracy=accuracy, seconds=sum(spent) / max(1, len(spent)))


def accuracy_text(value: float | None) -> str:
    return "no accuracy" if value is None else f"{100 * value:.1f} %"


def table(cells: Sequence[Cell]) -> str:
    """The accuracies as a Markdown table: a rule a row, an attack a column."""
    attacks = list(dict.fromkeys(cell.attack for cell in cells))
    found = {(cell.rule, cell.attack): cell for cell in cells}
    lines = [
        "| aggregator | " + " | ".join(attacks) + " | ms |",
        "|---" * (len(attacks) + 2) + "|",
    ]
    for rule in dict.fromkeys(cell.rule for cell in cells):
        row = [found[rule, attack] for attack in attacks]
        shown = ["refused" if c.refused else accuracy_text(c.accuracy) for c in row]
        lines.append(f"| {rule} | " + " | ".join(shown) + f" | {1000 * row[0].seconds:.0f} |")
    return "\n".join(lines)


def write(cells: Sequence[Cell], out: Path, floor: float) -> dict[str, Any]:
    """Write the table and the JSON object into a folder, and return the object."""
    fallen = [f"{cell.rule} under {cell.attack}" for cell in cells if cell.falls(floor)]
    found = {"cells": [asdict(cell) for cell in cells], "floor": floor, "fallen": fallen}
    out.mkdir(parents=True, exist_ok=True)
    (out / "robust.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    (out / "robust.md").write_text(table(cells) + "\n", encoding="utf-8")
    return found
