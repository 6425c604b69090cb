"""Attack by stack: accuracy, a backdoor's success, and what the rule costs.

    umbel bench robust --app my-app --liars 0.2

Every cell is a run of the app itself on the embedded engine. In the clear only what the liars send
is changed, before the server reads it; under secure sums liars lie on their nodes, before they
mask. Cells that a folder has already are not run again.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from umbel.benchmarks.attack.views import Played, play
from umbel.benchmarks.robust.attacks import LIES, lying
from umbel.benchmarks.robust.poison import POISONS, Poisoned, with_patch
from umbel.benchmarks.robust.stacks import Attacked
from umbel.clients.trainers.base import Weights
from umbel.core.errors import ConfigError, UmbelError
from umbel.core.options import Options
from umbel.server.embedded.executor import FIRST_NODE

FLOOR = 0.1
"""So much accuracy may a rule lose under a share of liars that it says to stand."""
ATTACKS = ("none", *dict.fromkeys((*POISONS, *LIES)))
"""By name, in the order of the table."""
BACKDOOR = "backdoor"
"""How the attacks begin that leave a backdoor."""


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        rule: the stack, as `Attacked.named` reads it.
        attack: what the liars do.
        liars: how many of the nodes lie.
        accuracy: of the model at the end, on held-out examples; None where there is none.
        lost: against the same stack without liars.
        backdoor: the share of patched examples that the model takes for the target's; None where
            no backdoor was looked for.
        seconds: of a round, aggregation alone.
        refused: why there was no run.
    """

    rule: str
    attack: str
    liars: int
    accuracy: float | None = None
    lost: float | None = None
    backdoor: float | None = None
    seconds: float = 0.0
    refused: str = ""

    def falls(self, floor: float) -> bool:
        """Whether a stack that says to stand these liars loses more than `floor`."""
        if not Attacked.named(self.rule).claims or self.refused or self.attack == "none":
            return False
        return self.lost is None or self.lost > floor


@dataclass(frozen=True)
class Setting:
    """What all cells have in common.

    Attributes:
        federation: whose data, trainer and layers are used; it evaluates centrally.
        nodes: virtual nodes.
        options: of the runs.
        share: of the nodes that lie; rules are told it.
        omniscient: liars see the honest updates of all nodes.
        pool: where the nodes run, a pool of this process; one after the other if None.
    """

    federation: Any
    nodes: int
    options: Options
    share: float
    omniscient: bool = False
    pool: str | None = None

    @property
    def liars(self) -> list[int]:
        """Partitions of the nodes that lie.

        Raises:
            ConfigError: the share is of none, or of all.
        """
        count = math.floor(self.share * self.nodes + 1e-9)
        if not 0 < count < self.nodes:
            raise ConfigError(
                f"liars is {self.share:g} of {self.nodes} nodes, which is {count} liars; take some"
            )
        return random.Random(self._seed).sample(range(self.nodes), count)

    @property
    def _seed(self) -> int:
        return int(self.options.get("seed", 0))

    def run(self, rule: str, attack: str) -> Cell:
        """One cell; a stack or a federation that does not stand or know it says why."""
        cell = Cell(rule, attack, 0 if attack == "none" else len(self.liars))
        stack = Attacked.named(rule)
        if stack.secure and self.omniscient and attack != "none":
            return replace(cell, refused="nobody sees all updates under a secure sum")
        given = {**self.options, **stack.options(self.share)}
        own, test = self.federation, self._test()
        if attack in POISONS:
            data = Poisoned(own.data, frozenset(self.liars), POISONS[attack])
            own = replace(own, data=data, test=test)
        try:
            own.stack_for(own.complete(given))
            played = play(
                own,
                self.nodes,
                given,
                listen=lambda _: False,
                asking=lambda exchange: self._lied(exchange, attack),
                pool=self.pool,
            )
            looked = attack == "none" or attack.startswith(BACKDOOR)
            success = self._success(played, given, test) if looked else None
        except UmbelError as error:
            return replace(cell, refused=" ".join(str(error).split()))
        accuracy = played.result.get("metrics", {}).get("accuracy")
        spent = [float(line.get("phases", {}).get("aggregate", 0.0)) for line in played.lines]
        seconds = sum(spent) / max(1, len(spent))
        return replace(cell, accuracy=accuracy, backdoor=success, seconds=seconds)

    def _lied(self, exchange: Any, attack: str) -> Any:
        if attack not in LIES:
            return exchange
        ids = [FIRST_NODE + partition for partition in self.liars]
        return lying(
            exchange,
            ids,
            LIES[attack],
            self._seed,
            nodes=self.nodes,
            omniscient=self.omniscient,
        )

    def _test(self) -> Any:
        federation = self.federation
        return federation.test or getattr(federation.data, "central_test", None)

    def _success(self, played: Played, given: Options, test: Any) -> float | None:
        """The backdoor's success; None where the app's examples can have none."""
        options = self.federation.complete(given)
        try:
            examples = with_patch(test(options)) if test else None
        except ConfigError:
            return None
        if not examples:
            return None
        trainer = self.federation.trainer_for(options)
        buffers = trainer.initial(options, int(options["seed"])).buffers
        weights = Weights(played.manifest.unflatten(played.final), buffers)
        found = trainer.evaluate(weights, examples, options).metrics.get("accuracy")
        return None if found is None else float(found)


def measure(
    setting: Setting,
    rules: Sequence[str],
    attacks: Sequence[str],
    tell: Callable[[str], None] = lambda _: None,
    known: Sequence[Cell] = (),
    save: Callable[[Sequence[Cell]], None] = lambda _: None,
) -> list[Cell]:
    """Every attack against every stack.

    Args:
        setting: of all runs.
        rules: names of stacks.
        attacks: names; `none` is always the first.
        tell: hears a line for each run.
        known: cells of the same setting, which are not run again.
        save: is given all cells after each run.

    Raises:
        ConfigError: a name that there is not, or no liar at all.
    """
    for rule in rules:
        Attacked.named(rule)
    for name in attacks:
        if name not in ATTACKS:
            raise ConfigError(f"the attack is {name!r}; it can be {', '.join(ATTACKS)}")
    assert setting.liars
    before = {(cell.rule, cell.attack): cell for cell in known}
    cells: list[Cell] = []
    for rule in dict.fromkeys(rules):
        clean: float | None = None
        for attack in dict.fromkeys(("none", *attacks)):
            cell = before.pop((rule, attack), None) or setting.run(rule, attack)
            if attack == "none":
                clean = cell.accuracy
            if cell.accuracy is not None and clean is not None:
                cell = replace(cell, lost=clean - cell.accuracy)
            cells.append(cell)
            save([*cells, *before.values()])
            tell(f"{rule}, {attack}: {cell.refused or percent(cell.accuracy)}")
    return [*cells, *before.values()]


def percent(value: float | None) -> str:
    """For a table."""
    return "none" if value is None else f"{100 * value:.1f} %"
