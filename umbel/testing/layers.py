"""`check_layer`: the laws of `umbel.strategies.transform.Layer`."""

import copy
import math
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from torch import Tensor

from umbel.core.errors import ConfigError, StackError
from umbel.core.streams import seeded
from umbel.privacy.bounds.clipping import clip_to_grid, is_within
from umbel.privacy.noise.lattice import grid_step, on_grid
from umbel.server.checkpoint import Position, load, save
from umbel.strategies.collect import EXAMPLES, LENIENCE, PlainSum
from umbel.strategies.contexts import Memory
from umbel.strategies.objective import LocalObjective
from umbel.strategies.order import keeps_sums
from umbel.strategies.stack import Stack
from umbel.strategies.transform import (
    Calibrated,
    Facts,
    NodeContext,
    RoundContext,
    Transform,
    acts_on_sums,
    acts_on_updates,
    claims_privacy,
    needs_of,
)
from umbel.testing.laws import attributes, hold, same

COHORT = 8
MEASURED = {EXAMPLES: 3.0, "loss": 0.5}
STEPS, RATE = 5, 0.1
UNITS = ("client", "example")
AGAINST = ("model-user", "server", "other-clients")


def check_layer(layer: Transform[Any], size: int = 12, *, repeatable: bool = True) -> None:
    """Fail unless a layer keeps its laws on random, zero, huge and one-hot updates.

    `encode` leaves its input alone; `check` says size, bound, grid and modulus that its result
    has; `decode` gives back an update of the original size; state goes in and out (the same
    state gives the same result, and self stays as it is) and survives a checkpoint; `isometry` is
    true where it is said; a claim is of a known unit and relation.

        check_layer(MyLayer())
        check_layer(Gaussian(1.0, insecure_seed=1))

    The layer is given free updates where its `check` takes them, and bounded ones of norm 1.

    Args:
        layer: the one to try; noise that waits for a budget is decided to be 1.
        size: coordinates of an update, before the layer.
        repeatable: False for a layer that draws from the operating system. Its results are then
            not compared, and have to differ where it claims privacy.

    Raises:
        AssertionError: a law is broken; the sentence names it, the value and what to do.
    """
    if isinstance(layer, Calibrated) and layer.noise_multiplier is None:
        layer = layer.with_noise(1.0)
    before = copy.deepcopy(attributes(layer))
    tried = [facts for facts in _places(size) if _taken(layer, facts)]
    hold(
        bool(tried),
        f"{layer.name}: `check` takes free updates or bounded ones",
        f"it refuses both: {_refusal(layer, _places(size)[-1])}",
        "raise StackError only for what the layer cannot work with",
    )
    for facts in tried:
        _Trial(layer, facts, repeatable=repeatable).run()
    try:
        keeps_sums(layer)
    except StackError as error:
        raise AssertionError(f"{layer.name}: an isometry is one, but {error}") from error
    hold(
        same(before, attributes(layer)),
        f"{layer.name}: a layer keeps nothing on self",
        "its attributes changed in use",
        "put what changes into the state that goes in and out, so that checkpoints have it",
    )


def _places(size: int) -> list[Facts]:
    """The facts of free updates, and of bounded ones."""
    round_ = Facts(size, round=1, expected_replies=float(COHORT), max_replies=COHORT, kind="sum")
    bounded = round_.replace(l2_bound=1.0, grid=grid_step(1.0))
    return [round_, bounded]


def _taken(layer: Transform[Any], facts: Facts) -> bool:
    return not _refusal(layer, facts)


def _refusal(layer: Transform[Any], facts: Facts) -> str:
    try:
        layer.check(facts, layer.init(facts.size))
    except StackError as error:
        return str(error)
    return ""


class _Trial:
    """A layer under one kind of updates.

    Args:
        layer: the one to try.
        facts: of an update as it enters the layer.
        repeatable: whether the same input gives the same result.
    """

    def __init__(self, layer: Transform[Any], facts: Facts, *, repeatable: bool) -> None:
        self.layer, self.facts, self.repeatable = layer, facts, repeatable
        self.name, self.size = layer.name, facts.size
        self.state = layer.init(facts.size)
        self.after = self._checked()
        prefix = f"{self.name}."
        told = Stack([layer], PlainSum(weighting="fixed")).broadcast((self.state,), facts)
        self.config = _without(prefix, told.scalars)
        self.vectors = _without(prefix, told.vectors)

    def run(self) -> None:
        """Try all laws."""
        for what, update in self._updates().items():
            self._encode(what, update)
        self._begin()
        self._two_runs()
        self._resume()
        self._claim()

    def _checked(self) -> Facts:
        state = copy.deepcopy(self.state)
        after = self.layer.check(self.facts, self.state)
        hold(
            same(after, self.layer.check(self.facts, self.state)) and same(state, self.state),
            f"{self.name}: `check` gives the same facts for the same state, and leaves it alone",
            "it gave others, or changed the state",
            "let it only read",
        )
        return after

    def _updates(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        hot = torch.zeros(self.size)
        hot[-1] = 1.0
        updates = {
            "a random update": torch.randn(self.size, generator=generator),
            "an update of zeros": torch.zeros(self.size),
            "a one-hot update": hot,
            "a huge update": torch.randn(self.size, generator=generator) * 1e6,
            "a tiny update": torch.randn(self.size, generator=generator) * 1e-12,
        }
        bound = self.facts.l2_bound
        if bound is None:
            return updates
        return {what: clip_to_grid(u, bound).update for what, u in updates.items()}

    def _sent(self, update: Tensor) -> Tensor:
        """What the node's half makes of an update."""
        return self.layer.encode(update, self._context())

    def _context(self) -> NodeContext:
        """Of a node that takes part for the first time, after five steps."""
        return NodeContext(
            self.config,
            self.vectors,
            Memory(RecordDict(), self.name),
            MEASURED if "metrics" in needs_of(self.layer) else {},
            round=1,
            steps=STEPS,
            learning_rate=RATE,
            start_loss=0.7,
        )

    def _encode(self, what: str, update: Tensor) -> None:
        name, after = self.name, self.after
        before = update.clone()
        sent = self._sent(update)
        hold(
            same(before, update),
            f"{name}: `encode` leaves its input alone",
            f"{what} was changed",
            "work on a copy (no `add_`, `mul_` or `update[...] = `)",
        )
        hold(
            sent.shape == (after.size,),
            f"{name}: what is sent has the size that `check` says",
            f"{what} became {tuple(sent.shape)}, and `check` says {after.size}",
            "say facts.replace(size=...) in `check`",
        )
        hold(
            bool(torch.isfinite(sent).all()),
            f"{name}: a finite update stays finite",
            f"{what} got NaN or infinity",
            "look for divisions by a length of zero",
        )
        bound = after.l2_bound
        if bound is not None and not after.noise:  # who adds noise measures before it does
            hold(
                is_within(sent, bound * (1 + LENIENCE)),
                f"{name}: no update is longer than the l2_bound of `check`",
                f"{what} became {float(sent.double().norm()):.9g} long, and {bound:.9g} is said",
                "say the bound that `encode` keeps, or None",
            )
        if after.grid is not None:
            hold(
                on_grid(sent, after.grid),
                f"{name}: updates lie on the grid of `check`",
                f"{what} is off the multiples of {after.grid:g}",
                "round to it, or say facts.replace(grid=None)",
            )
        if after.modulus is not None:
            whole = sent.double()
            inside = bool(((whole >= 0) & (whole < after.modulus) & (whole == whole.round())).all())
            hold(
                inside,
                f"{name}: coordinates are whole numbers below the modulus of `check`",
                f"{what} has {sent[:3].tolist()}, and the modulus is {after.modulus}",
                "reduce them in `encode`",
            )
        hold(
            not self.repeatable or torch.equal(sent, self._sent(update)),
            f"{name}: the same update and config give the same result",
            f"{what} was encoded in two ways",
            "draw nothing at random and keep nothing on self; a layer that draws from the "
            "operating system is checked with repeatable=False",
        )
        back = self._back(sent, self.state)[0]
        hold(
            back.shape == (self.size,) and bool(torch.isfinite(back).all()),
            f"{name}: `decode` gives back an update of the original size, of finite numbers",
            f"{what} came back as {tuple(back.shape)}, and {self.size} coordinates went in",
            "undo in `decode` what `encode` and `check` did to the size",
        )

    def _begin(self) -> None:
        """A local objective says corrections of the model's size, and leaves the model alone."""
        if not isinstance(self.layer, LocalObjective):
            return
        start = torch.randn(self.size, generator=torch.Generator().manual_seed(3))
        before = start.clone()
        found = self.layer.begin(start, self._context())
        hold(
            same(start, before),
            f"{self.name}: `begin` leaves the model that was sent alone",
            "it was changed",
            "work on a copy",
        )
        for what, vector in (("offset", found.offset), ("anchor", found.anchor)):
            hold(
                vector is None or vector.shape == start.shape,
                f"{self.name}: the {what} of a correction is a flat vector of the model's size",
                f"it has the shape {None if vector is None else tuple(vector.shape)}, not "
                f"({self.size},)",
                "say a vector like `start`, or None",
            )
        hold(
            math.isfinite(found.strength),
            f"{self.name}: the strength of a correction is a finite number",
            f"it is {found.strength}",
            "look for divisions by zero",
        )

    def _back(self, sent: Tensor, state: Any, number: int = 1) -> tuple[Tensor, Any]:
        """What the server's half makes of a sum of one update with weight 1."""
        bottom = PlainSum(weighting="fixed").check(self.after.replace(round=number))
        generator = torch.Generator().manual_seed(0)
        entering = self.facts.replace(round=number)
        ctx = RoundContext(number, 1.0, 1, 1.0, bottom, generator, entering, 1.0, RATE)
        return self.layer.decode(sent.double(), state, ctx)

    def _two_runs(self) -> None:
        update = self._updates()["a random update"]
        sent, state = self._sent(update), copy.deepcopy(self.state)
        with seeded(1):
            one = self._back(sent, self.state)
        with seeded(2):
            other = self._back(sent, self.state)
        hold(
            same(state, self.state),
            f"{self.name}: `decode` leaves the state that it is given alone",
            "it was changed",
            "return a new state: {**state, ...}",
        )
        if self.repeatable:
            hold(
                same(one, other),
                f"{self.name}: the same state and sum give the same result",
                "`decode` gave two different ones",
                "keep nothing on self and draw from `rnd.generator`; noise of the operating "
                "system is checked with repeatable=False, or with insecure_seed",
            )
        elif claims_privacy(self.layer):
            again = self._back(self._sent(update), self.state)
            hold(
                not same(one[0], again[0]),
                f"{self.name}: noise that hides somebody is never drawn twice",
                "the same update came out the same, twice",
                "draw it from the operating system (umbel.privacy.noise.entropy.Entropy)",
            )

    def _resume(self) -> None:
        """A state after a round goes through a checkpoint, and the next round is the same."""
        law = f"{self.name}: a state survives a checkpoint"
        cure = (
            "make the state None, or a dict of names to tensors, numbers, texts and lists of them"
        )
        sent = self._sent(self._updates()["a random update"])
        state = self._back(sent, self.state)[1]
        hold(
            state is None or (isinstance(state, dict) and all(isinstance(k, str) for k in state)),
            law,
            f"it is a {type(state).__name__}",
            cure,
        )
        with tempfile.TemporaryDirectory(prefix="umbel-check-") as folder:
            nothing = torch.zeros(0)
            try:
                save(Path(folder), Position(1, nothing, nothing, layers=(state,)), {})
                position = load(Path(folder))
            except (TypeError, ValueError, ConfigError) as error:
                raise AssertionError(f"{law}, but it was refused ({error}); {cure}") from error
        assert position is not None  # it has just been saved
        back = position.layers[0]
        hold(
            _as_written(state) == _as_written(back) and _tensors(state, back),
            law,
            "it came back as another",
            cure,
        )
        if self.repeatable:
            hold(
                same(self._back(sent, state, 2)[0], self._back(sent, back, 2)[0]),
                f"{self.name}: a resumed run goes on as it would have",
                "the next round made something else of the same sum",
                cure,
            )

    def _claim(self) -> None:
        name = self.name
        bottom = PlainSum(weighting="fixed").check(self.after)
        if not claims_privacy(self.layer):
            hold(
                self.layer.claim(bottom) is None,
                f"{name}: whether a layer claims privacy depends on the layer alone",
                "it claims on these facts, and nothing on others",
                "claim always or never",
            )
            return
        hold(
            acts_on_sums(self.layer) or acts_on_updates(self.layer),
            f"{name}: who claims privacy does something for it",
            "neither `encode` nor `decode` does anything",
            "remove the claim",
        )
        try:
            claim = self.layer.claim(bottom)
        except StackError:  # it protects in a sum that the server does not see into
            claim = self.layer.claim(bottom.replace(server_sees="sum"))
        assert claim is not None, f"{name}: claims on some facts only; claim always or never"
        from dp_accounting import DpEvent, NeighboringRelation

        for what, good, value in (
            ("unit", claim.unit in UNITS, claim.unit),
            ("relation", isinstance(claim.relation, NeighboringRelation), claim.relation),
            ("against", claim.against in AGAINST, claim.against),
            ("event", isinstance(claim.event, DpEvent), type(claim.event).__name__),
            (
                "slack",
                math.isfinite(claim.extra_delta) and 0 <= claim.extra_delta < 1,
                claim.extra_delta,
            ),
            ("separation", claim.separation >= 1, claim.separation),
        ):
            hold(
                good,
                f"{name}: a claim has a known {what}",
                f"it is {value!r}",
                f"choose one that umbel.strategies.transform.Claim describes; units are "
                f"{' and '.join(UNITS)}, and it is against {', '.join(AGAINST)}",
            )


def _without(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in values.items() if k.startswith(prefix)}


def _as_written(state: Any) -> Any:
    """A state's plain values; what JSON makes a list of may have been a tuple."""
    if not isinstance(state, dict):
        return state
    return {k: v for k, v in state.items() if not isinstance(v, Tensor)}


def _tensors(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    names = {k for k, v in one.items() if isinstance(v, Tensor)}
    return names == {k for k, v in other.items() if isinstance(v, Tensor)} and all(
        same(one[k], other[k]) for k in names
    )
