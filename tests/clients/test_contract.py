"""Nodes that would act on different things do not sum, whatever a coordinator says to each."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.clients.liar import NODES, Liar, federation
from umbel.strategies.collect import PlainSum
from umbel.strategies.contract import (
    PARTS,
    PROTOCOL,
    UNKNOWN,
    Contract,
    described,
    settings_digest,
)
from umbel.strategies.layout import PARAMETERS
from umbel.strategies.private.clip import Clip
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.secure_sum import SecureSum
from umbel.strategies.stack import Stack

SECURE: Mapping[str, Any] = {
    "secure": True,
    "secure-mode": "malicious",
    "secure-weighting": "equal",
    "secure-metrics": "",
    "secure-min-cohort": 3,
}
VICTIM = 102
OTHERS = [100 + i for i in range(NODES) if 100 + i != VICTIM]

LIES: Mapping[str, Mapping[str, Any]] = {
    "an option of the app's own": {"options_of": {"gain": 1e-30}},
    "an option that nothing here reads": {"options_of": {"batch-size": 3}},
    "an option that only the liar knows": {"options_of": {"anything": False}},
    "the population": {"options_of": {"population": "others"}},
    "a clipping norm in the options": {"options_of": {"secure-norm": 1e-9}},
    "the learning rate": {"told": {"learning-rate": 1e-30}},
    "a value that nothing reads": {"told": {"another": 1}},
    "the clipping norm in the message": {"told": {"clip.norm": 1e-9}},
    "the model": {"arrays": {PARAMETERS: torch.full((12,), 1e-7, dtype=torch.float64)}},
    "an array beside the model": {"arrays": {"another": torch.ones(2)}},
    "running statistics": {"arrays": {"buffers": torch.ones(0)}},
}


def others(lie: str) -> Liar:
    """All nodes but one are told something else."""
    return Liar(SECURE, **{what: dict.fromkeys(OTHERS, v) for what, v in LIES[lie].items()})


def test_honest_nodes_sum() -> None:
    liar = Liar(SECURE)
    sum_ = liar.gather()
    assert not sum_.aborted, sum_.rejected
    assert sum_.replies == NODES
    fresh = Liar(SECURE, round=2)
    assert set(fresh.conspire().values()) == {"shared its secrets"}


@pytest.mark.parametrize("lie", LIES)
def test_one_node_is_never_summed_with_nodes_that_were_told_something_else(lie: str) -> None:
    """Against the victim the others' updates could be made zero: the sum would be its own."""
    sum_ = others(lie).gather()  # Umbel's own server half finds it at the first trip
    assert sum_.aborted  # five are too few against a malicious server
    assert not sum_.revealed and sum_.replies == 0
    # A server that hides it, and shows each node a roster for its own terms, gets no share of
    # anybody: a member's signature is over what that member reckoned itself.
    said = others(lie).conspire()
    assert len(said) == NODES
    for node, words in said.items():
        assert words.startswith("roster: node"), (node, words)
        assert "did not sign these keys for these terms" in words


def test_a_round_in_the_message_is_the_round_of_the_session() -> None:
    """Else the same round, with and without one node, could be sold as two."""
    liar = Liar(SECURE)
    liar.told = {node: {"round": 9} for node in liar.nodes}
    sum_ = liar.gather()
    assert sum_.aborted
    assert "the session is of run 7 and round 1, and the message of run 7 and round 9" in str(
        sum_.rejected
    )


@pytest.mark.parametrize("spent", ["mask", "agree", "unmask"])
def test_a_round_is_answered_once(spent: str) -> None:
    """Two sums, with and without one node, differ by its update exactly."""
    liar = Liar(SECURE | {"secure-mode": "semi-honest"})

    def until(node: int, kind: str, reply: Any) -> bool:  # noqa: ARG001
        return not kind.endswith(spent)

    first = liar.gather(spoil=until)  # the server says that it never got so far
    assert first.aborted
    again = liar.gather(nodes=OTHERS)
    assert again.aborted and again.replies == 0
    assert "rounds only go up; the server asks for round 1" in str(again.rejected)
    liar.round = 2
    assert liar.gather(nodes=OTHERS).replies == NODES - 1
    liar.round = 1
    assert liar.gather(nodes=OTHERS).aborted


@pytest.mark.parametrize("lost", ["train", "share"])
def test_a_round_may_begin_anew_while_nothing_has_left_a_node(lost: str) -> None:
    liar = Liar(SECURE | {"secure-mode": "semi-honest"})
    first = liar.gather(spoil=lambda node, kind, reply: not kind.endswith(lost))  # noqa: ARG005
    assert first.aborted
    again = liar.gather()
    assert not again.aborted, again.rejected
    assert again.replies == NODES


def test_an_honest_server_says_in_what_a_node_differs() -> None:
    liar = Liar(SECURE)
    plan = liar.client.known(liar.contexts[VICTIM])
    mine = plan.contract
    for part in PARTS:
        changed = Contract(**{p: getattr(mine, p) for p in PARTS} | {part: b"x" * 32})
        unknown = part == "app"  # nobody has told this node its app's files
        assert mine.differs(changed) == ([] if unknown else [part])
    known = Contract(**{p: getattr(mine, p) for p in PARTS} | {"app": b"a" * 32})
    other = Contract(**{p: getattr(mine, p) for p in PARTS} | {"app": b"b" * 32})
    assert known.differs(other) == ["app"]
    assert Contract.read(known.blob) == known
    for blob in (b"", known.blob[:-1], known.blob + b"x"):
        with pytest.raises(ValueError, match="a contract has 160 bytes"):
            Contract.read(blob)


def test_a_contract_is_the_same_in_every_process_and_tells_every_setting() -> None:
    def of(**changes: Any) -> Contract:
        given: dict[str, Any] = {
            "options": {"a": 1, "b": 0.5},
            "stack": Stack((Clip(1.0), Quantize(64)), SecureSum()),
            "parameters": {"w": torch.zeros(3)},
            "buffers": {},
        }
        return Contract.of(**given | changes)

    assert of() == of() == of(options={"b": 0.5, "a": 1})
    assert of().app == UNKNOWN
    for options in ({"a": 1}, {"a": True, "b": 0.5}, {"a": 1.0, "b": 0.5}, {"a": 1, "b": 0.25}):
        assert of().differs(of(options=options)) == ["options"]
    for stack in (
        Stack((Clip(2.0), Quantize(64)), SecureSum()),
        Stack((Clip(1.0), Quantize(65)), SecureSum()),
        Stack((Clip(1.0), Quantize(64)), SecureSum(min_cohort=4)),
        Stack((Clip(1.0), Quantize(64)), PlainSum()),
        Stack((Quantize(64), Clip(1.0)), SecureSum()),
    ):
        assert of().differs(of(stack=stack)) == ["layers"]
    for changes in (
        {"parameters": {"w": torch.zeros(4)}},
        {"parameters": {"v": torch.zeros(3)}},
        {"parameters": {"w": torch.zeros(3, dtype=torch.float64)}},
        {"buffers": {"mean": torch.zeros(1)}},
        {"parameters": {}, "buffers": {"w": torch.zeros(3)}},
    ):
        assert of().differs(of(**changes)) == ["layout"]
    assert of(parameters={"w": torch.ones(3)}) == of()  # its values are in the session itself
    assert settings_digest("x", {"a": b"1"}) != settings_digest("x", {"a": "1"})
    assert settings_digest("x", {"a": "1"}) != settings_digest("y", {"a": "1"})
    assert "0x" not in described(Quantize(8))  # no address of an object


def test_a_node_of_another_protocol_does_not_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Versions that reckon in other ways are no neighbours, and hear in what they differ."""
    mine = Contract.of({}, Stack(), {}, {})
    monkeypatch.setattr("umbel.strategies.contract.PROTOCOL", PROTOCOL + 1)
    later = Contract.of({}, Stack(), {}, {})
    assert mine.differs(later) == ["protocol"] and mine.blob != later.blob


def test_an_app_of_other_files_does_not_sum() -> None:
    """`--any-app` lets a node work with another copy of an app, and not sum in secret with it."""
    liar = Liar(SECURE | {"secure-mode": "semi-honest"}, app=federation())
    halves = {node: liar.app.client_app() for node in liar.nodes}
    for node, app in halves.items():
        app.installed(("b" if node == VICTIM else "a") * 64, {})

    class Each:
        def __call__(self, message: Any, context: Any) -> Any:
            return halves[message.metadata.dst_node_id](message, context)

    liar.client = Each()  # type: ignore[assignment]
    sum_ = liar.gather()
    assert sum_.replies == NODES - 1
    assert [(item.node_id, item.reason) for item in sum_.rejected] == [
        (VICTIM, "contract: the node has another app, options or layers than most")
    ]
