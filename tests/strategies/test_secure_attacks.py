"""Attacks on the secure sum by a server that lies, among them defects of Flower 1.41."""

from dataclasses import replace

import numpy as np
import pytest

from umbel.privacy.masking import keys, shamir
from umbel.privacy.masking.session import Member, Roster, bitmap, pack_fields, unpack_fields
from umbel.strategies.secure.checks import AbortedError
from umbel.strategies.secure.local_session import LocalSession
from umbel.strategies.secure.message import REFUSED, Plain
from umbel.strategies.secure.policy import Policy
from umbel.strategies.secure.protocol import advertise, respond

NODES = (3, 14, 25, 36, 47, 58)
VICTIM, OTHER = 25, 36
KEYS = ("sealing", "masking", "identity", "certificate", "signature")


def cohort(size: int = 5, policy: Policy | None = None) -> LocalSession:
    rows = np.random.default_rng(1).integers(0, 1 << 20, (len(NODES), size), "<u4")
    return LocalSession.of(dict(zip(NODES, rows, strict=True)), 20, policy=policy)


def roster_of(session: LocalSession, request: Plain) -> Roster:
    raw = request["roster"]
    assert isinstance(raw, bytes)
    return Roster.read(session.terms.ticket, session.terms.mode, raw)


# ── the server lies ───────────────────────────────────────────────────────────────────────────


def test_s1_no_message_gets_both_shares_of_anyone() -> None:
    """Flower: one request with overlapping lists. Here a request cannot even name two lists."""
    session = cohort()
    request = session.requests_at("unmask")[OTHER]
    before = session.memory[OTHER]
    forged = request | {"included": bitmap(range(5), 6), "left": bitmap(range(6), 6)}
    after, reply = respond(session.nodes[OTHER], "unmask", before, forged)
    assert after == {}
    shares = reply["shares"]
    assert isinstance(shares, bytes) and len(shares) == 6 * shamir.SHARE_BYTES
    held = unpack_fields(bytes(before["held"]))  # type: ignore[arg-type]
    for at, pair in enumerate(held):
        given = shares[33 * at : 33 * at + 33]
        assert given == pair[:33] != pair[33:]


def test_s1_a_second_request_to_unmask_is_refused() -> None:
    session = cohort()
    request = session.requests_at("unmask")[OTHER]
    memory, first = respond(session.nodes[OTHER], "unmask", session.memory[OTHER], request)
    assert "shares" in first
    memory, second = respond(session.nodes[OTHER], "unmask", memory, request)
    assert str(second[REFUSED]).startswith("stage:") and memory == {}


def test_a_node_signs_one_list_of_included_nodes() -> None:
    session = cohort()
    request = session.requests_at("agree")[OTHER]
    node, memory = session.nodes[OTHER], session.memory[OTHER]
    memory, first = respond(node, "agree", memory, request)
    other = request | {"included": bitmap([0, 1, 2, 3, 4], 6)}
    _, second = respond(node, "agree", memory, other)
    assert "signature" in first and str(second[REFUSED]).startswith("stage:")


def test_two_different_lists_of_included_nodes_unmask_nothing() -> None:
    """The server shows half of the nodes that the victim is in, the other half that it is not."""
    session = cohort()
    without = bitmap([i for i in range(6) if NODES[i] != VICTIM], 6)

    def split(stage: str, node: int, message: Plain) -> Plain | None:
        if stage == "agree" and node in NODES[3:]:
            return message | {"included": without}
        return message

    session.to_node = split
    with pytest.raises(AbortedError):
        session.run()
    assert not any(stage == "unmask" and "shares" in r for (stage, _), r in session.wire.items())


@pytest.mark.parametrize(
    ("included", "name"),
    [
        ([0, 1, 2, 4, 5], "included"),  # its own vector is left out
        ([0, 3], "cohort"),  # far below the quorum
        ([], "included"),
        (list(range(6)), "message"),  # of a wrong length, see below
    ],
)
def test_lists_that_no_node_signs(included: list[int], name: str) -> None:
    session = cohort()
    request = session.requests_at("agree")[OTHER]
    listed = bitmap(included, 6) + (b"\0" if name == "message" else b"")
    forged = request | {"included": listed}
    _, reply = respond(session.nodes[OTHER], "agree", session.memory[OTHER], forged)
    assert str(reply[REFUSED]).startswith(name)


def test_too_few_or_forged_signatures_unmask_nothing() -> None:
    session = cohort()
    request = session.requests_at("unmask")[OTHER]
    signatures = unpack_fields(bytes(request["signatures"]))  # type: ignore[arg-type]
    for fields in (
        [*signatures[:4], b"", b""],
        [signatures[0]] * 6,  # one signature six times
        [bytes(64)] * 6,
    ):
        forged = request | {"signatures": pack_fields(fields)}
        _, reply = respond(session.nodes[OTHER], "unmask", session.memory[OTHER], forged)
        assert str(reply[REFUSED]).startswith("quorum")


def test_s4_a_server_in_the_middle_cannot_put_in_its_own_keys() -> None:
    session = cohort()

    def swap(stage: str, node: int, message: Plain) -> Plain | None:
        if stage != "share" or node != OTHER:
            return message
        members = [
            replace(m, masking=keys.KeyPair.generate().public) if m.node == VICTIM else m
            for m in roster_of(session, message).members
        ]
        return message | {"roster": Roster(b"", "malicious", tuple(members)).blob}

    session.to_node = swap
    released = session.run()
    assert OTHER not in released.included
    assert session.refusals()[OTHER].startswith("roster: node 25 did not sign")


def test_a_roster_without_me_or_with_my_keys_changed_is_refused() -> None:
    session = cohort()
    request = session.requests_at("share")[OTHER]
    members = roster_of(session, request).members
    changed = replace(members[3], sealing=keys.KeyPair.generate().public)
    for forged in (members[:3] + members[4:], (*members[:3], changed, *members[4:])):
        blob = Roster(b"", "malicious", forged).blob
        _, reply = respond(
            session.nodes[OTHER], "share", session.memory[OTHER], request | {"roster": blob}
        )
        assert str(reply[REFUSED]).startswith("roster: my own keys")


def test_one_key_under_two_names_is_refused() -> None:
    """A cohort of one victim and copies of one accomplice is no cohort."""
    session = cohort()
    request = session.requests_at("share")[OTHER]
    members = roster_of(session, request).members
    accomplice = session.nodes[58]
    pair = members[5]
    unsigned = Member(59, pair.sealing, pair.masking, pair.identity, b"", b"")
    twin = replace(
        unsigned, signature=keys.sign(accomplice.key, unsigned.signed(session.terms.ticket))
    )
    blob = Roster(b"", "malicious", (*members, twin)).blob
    _, reply = respond(
        session.nodes[OTHER], "share", session.memory[OTHER], request | {"roster": blob}
    )
    assert str(reply[REFUSED]).startswith("roster: a node, an identity or a key occurs twice")


@pytest.mark.parametrize("damage", [b"\0\0\0", b"\0\0\0\x09x", b""])
def test_a_roster_that_is_cut_off_is_refused(damage: bytes) -> None:
    session = cohort()
    request = session.requests_at("share")[OTHER]
    blob = bytes(request["roster"])[:-5] + damage  # type: ignore[arg-type]
    _, reply = respond(
        session.nodes[OTHER], "share", session.memory[OTHER], request | {"roster": blob}
    )
    assert str(reply[REFUSED]).startswith("roster")


def test_two_models_in_one_session_do_not_cancel_and_are_found_out() -> None:
    """Pasquini et al. 2022: the server sends the victim another model than the rest."""
    session = cohort()
    session.terms_of[VICTIM] = replace(session.terms, model=b"another model's hash, 32 bytes .")
    with pytest.raises(AbortedError) as caught:  # five are too few to begin
        session.run()
    assert dict(caught.value.dropped)[VICTIM].startswith("model: the node has another model")


def test_a_server_that_hides_two_models_is_refused_by_the_nodes() -> None:
    """It runs the honest protocol for the five, and offers them the victim's signed keys."""
    session = cohort()
    other = replace(session.terms, model=bytes(31) + b"\1")
    _, advert = advertise(session.nodes[VICTIM], other, session.values[VICTIM])

    def mix(stage: str, node: int, message: Plain) -> Plain | None:  # noqa: ARG001
        if stage != "share":
            return message
        fields = {k: bytes(advert[k]) for k in ("sealing", "masking", "signature")}  # type: ignore[arg-type]
        members = [
            replace(m, **fields) if m.node == VICTIM else m  # type: ignore[arg-type]
            for m in roster_of(session, message).members
        ]
        return message | {"roster": Roster(b"", "malicious", tuple(members)).blob}

    session.to_node = mix
    with pytest.raises(AbortedError):
        session.run()
    said = session.refusals()
    assert all(said[node].startswith("roster") for node in NODES if node != VICTIM)


def test_messages_of_another_session_are_refused_and_do_no_harm() -> None:
    session = cohort()
    session.run()
    old = dict(session.wire)
    asked = cohort()
    past = asked.requests_at("unmask")
    after = asked.again(nonce=b"z" * 16)
    requests = after.requests_at("agree")
    memory, reply = respond(asked.nodes[OTHER], "agree", after.memory[OTHER], past[OTHER])
    assert str(reply[REFUSED]).startswith(("replay", "message"))
    assert memory == after.memory[OTHER]
    _, reply = respond(asked.nodes[OTHER], "agree", memory, requests[OTHER])
    assert "signature" in reply and old


def test_messages_out_of_order_are_refused_and_do_no_harm() -> None:
    session = cohort()
    request = session.requests_at("mask")[OTHER]
    for stage in ("share", "agree", "unmask"):
        memory, reply = respond(session.nodes[OTHER], stage, session.memory[OTHER], request)
        assert str(reply[REFUSED]).startswith("stage")
        assert memory == session.memory[OTHER]
    _, reply = respond(session.nodes[OTHER], "mask", session.memory[OTHER], request)
    assert "vector" in reply


def test_shares_that_the_server_swapped_between_nodes_do_not_open() -> None:
    session = cohort()

    def swap(stage: str, node: int, message: Plain) -> Plain | None:
        if stage != "mask" or node != OTHER:
            return message
        sealed = unpack_fields(bytes(message["sealed"]))  # type: ignore[arg-type]
        return message | {"sealed": pack_fields([sealed[1], sealed[0], *sealed[2:]])}

    session.to_node = swap
    released = session.run()
    assert released.total.tolist() == session.expected(released)
    assert (3, "dealt node 36 no share") in released.dropped
    assert (14, "dealt node 36 no share") in released.dropped
