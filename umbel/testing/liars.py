"""Nodes that lie as an assertion: of aggregators, on an app's own data and model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from umbel.testing.audits import subject

if TYPE_CHECKING:
    from umbel.benchmarks.robust.suite import Cell
    from umbel.federation import Federation


def assert_stands_liars(
    run: "Federation | Path | str",
    rules: Sequence[str],
    attacks: Sequence[str] = ("sign-flip", "little-is-enough", "nan"),
    *,
    liars: float = 0.2,
    floor: float = 0.1,
    nodes: int = 0,
    options: Mapping[str, Any] | None = None,
) -> "list[Cell]":
    """Fail where an aggregator loses more accuracy to liars than it may.

    Each attack is a run of the app beside one without liars, as in `umbel bench robust`.

    Args:
        run: a federation, an app's folder, or a run directory.
        rules: aggregators, as `median`, `krum/2` over pairs or `secure+median/3`.
        attacks: what the liars do.
        liars: the share of the nodes that lie, which the aggregators are told.
        floor: so much accuracy may be lost.
        nodes: of the app; 0 is those of its folder, else 10.
        options: changes to the options.

    Returns:
        Every run, for further assertions.

    Raises:
        AssertionError: an aggregator fell, promises nothing, or could not be tried.
        ConfigError: there is no such app, aggregator or attack.
    """
    from umbel.benchmarks.robust.report import fallen
    from umbel.benchmarks.robust.stacks import Attacked
    from umbel.benchmarks.robust.suite import Setting, measure

    for rule in rules:
        if not Attacked.named(rule).claims:
            raise AssertionError(f"{rule} promises to stand no liar; name another aggregator")
    federation, known, name, _, count = subject(run)
    given = federation.complete({**known, **(options or {})})
    cells = measure(Setting(federation, nodes or count or 10, given, liars), rules, attacks)
    untried = [f"{one.rule} was not tried: {one.refused}" for one in cells if one.refused]
    bad = [*untried, *(f"{one} lost more than {floor:g}" for one in fallen(cells, floor))]
    if bad:
        raise AssertionError(f"{name}: {'; '.join(bad)}")
    return cells
