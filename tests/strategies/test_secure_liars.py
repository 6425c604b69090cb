"""Lying nodes, local policies, and what Flower 1.41 gets wrong and this cannot."""

import re
from dataclasses import replace

import numpy as np
import pytest

from umbel.privacy.masking import keys, masks, packing
from umbel.privacy.masking.session import Member, Roster, vector_key
from umbel.strategies.secure.checks import AbortedError
from umbel.strategies.secure.local_session import LocalSession
from umbel.strategies.secure.message import Plain
from umbel.strategies.secure.policy import Policy, RefusalError
from umbel.strategies.secure.protocol import Party, advertise, serve

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


# ── nodes lie ─────────────────────────────────────────────────────────────────────────────────


def test_s13_a_forged_share_is_laid_at_its_sender_s_door_and_another_subset_is_used() -> None:
    session = cohort()

    def forge(stage: str, node: int, message: Plain) -> Plain | None:
        if stage == "mask" and node == VICTIM:
            return None
        if stage != "unmask" or node != OTHER:
            return message
        shares = bytearray(bytes(message["shares"]))  # type: ignore[arg-type]
        shares[5] ^= 1
        return resigned(session, node, "unmask", {"shares": bytes(shares)})

    # Six nodes, quorum five: the victim gone, a forger, so one more is needed than there is.
    session.to_server = forge
    with pytest.raises(AbortedError) as caught:
        session.run()
    assert (OTHER, "forged its share of a secret of node 3") in caught.value.dropped

    everybody = cohort()
    everybody.to_server = lambda s, n, m: forge(s, n, m) if s == "unmask" else m
    session = everybody
    released = everybody.run()
    assert released.total.tolist() == everybody.expected(released)
    assert (OTHER, "forged its share of a secret of node 3") in released.dropped


def resigned(session: LocalSession, node: int, stage: str, content: Plain) -> Plain:
    """What a dishonest node sends: other content, its own valid signature."""
    memory = session.wire[stage, node]
    sid = memory["sid"]
    assert isinstance(sid, bytes)
    return session.nodes[node].signed(stage, sid, **content)


def retagged(session: LocalSession, node: int, message: Plain, vector: bytes) -> Plain:
    """What a dishonest node sends: another vector, its own valid tag and signature."""
    member = Member(node, *(bytes(session.wire["advertise", node][k]) for k in KEYS))  # type: ignore[arg-type]
    sid = bytes(message["sid"])  # type: ignore[arg-type]
    shared = vector_key(session.key, member.sealing, sid)
    content: Plain = {"tag": keys.tag(shared, vector), "lost": message["lost"]}
    return resigned(session, node, "mask", content) | {"vector": vector}


def test_a_dealer_that_shares_another_secret_than_it_promised_is_named() -> None:
    session = cohort()

    def lie(stage: str, node: int, message: Plain) -> Plain | None:
        if stage == "share" and node == VICTIM:
            content = {k: v for k, v in message.items() if k not in ("sid", "signature")}
            return resigned(session, node, stage, content | {"commitment": bytes(32)})
        return message

    session.to_server = lie
    with pytest.raises(AbortedError) as caught:
        session.run()
    assert (VICTIM, "shared another secret than it promised") in caught.value.dropped
    assert caught.value.revealed


@pytest.mark.parametrize(
    "change", ["cut", "long", "untagged", "unsigned", "other-session", "not-bytes"]
)
def test_a_bad_vector_costs_its_sender_and_not_the_round(change: str) -> None:
    session = cohort()

    def spoil(stage: str, node: int, message: Plain) -> Plain | None:
        if stage != "mask" or node != VICTIM:
            return message
        vector = bytes(message["vector"])  # type: ignore[arg-type]
        changed: dict[str, Plain] = {
            "cut": retagged(session, node, message, vector[:-4]),
            "long": retagged(session, node, message, vector + bytes(4)),
            "untagged": message | {"vector": vector[:-1] + b"x"},
            "unsigned": message | {"lost": b"\1"},
            "other-session": message | {"sid": bytes(32)},
            "not-bytes": message | {"vector": 7},
        }
        return changed[change]

    session.to_server = spoil
    released = session.run()
    assert VICTIM not in released.included and len(released.included) == 5
    assert released.total.tolist() == session.expected(released)
    assert VICTIM in dict(released.dropped)


@pytest.mark.parametrize(
    ("stage", "field"),
    [
        ("advertise", "signature"),
        ("advertise", "masking"),
        ("advertise", "identity"),
        ("advertise", "ticket"),
        ("share", "sealed"),
        ("share", "digests"),
        ("share", "commitment"),
        ("share", "signature"),
        ("agree", "signature"),
        ("unmask", "shares"),
    ],
)
def test_any_field_that_is_missing_cut_or_forged_drops_its_sender(stage: str, field: str) -> None:
    for damage in (None, "cut", "flip"):
        session = cohort()

        def spoil(at: str, node: int, message: Plain, damage: str | None = damage) -> Plain | None:
            if at != stage or node != VICTIM:
                return message
            raw = bytes(message[field])  # type: ignore[arg-type]
            without = {k: v for k, v in message.items() if k != field}
            if damage == "cut":
                return without | {field: raw[:-1]}
            if damage == "flip":
                return without | {field: raw[:-1] + bytes([raw[-1] ^ 1])}
            return without

        session.to_server = spoil
        if stage == "advertise":  # five are too few to begin against a malicious server
            with pytest.raises(AbortedError) as caught:
                session.run()
            dropped = caught.value.dropped
        else:
            released = session.run()
            dropped = released.dropped
            assert released.total.tolist() == session.expected(released)
        assert VICTIM in dict(dropped)


def test_replies_nobody_asked_for_and_second_replies_are_not_used() -> None:
    session = cohort()
    server = serve(session.terms, NODES, session.key)
    requests = next(server)
    adverts = [(n, session.exchange("advertise", n, r)) for n, r in requests.items()]
    replies = [*adverts, adverts[0], (999, adverts[1][1])]
    requests = server.send(iter([(n, r) for n, r in replies if r is not None]))
    for stage in ("share", "mask", "agree", "unmask"):
        answers = [(n, session.exchange(stage, n, r)) for n, r in requests.items()]
        doubled = [pair for pair in answers for _ in range(2)]
        try:
            requests = server.send(iter([(n, r) for n, r in doubled if r is not None]))
        except StopIteration as stop:
            released = stop.value
    assert released.total.tolist() == session.expected(released)
    assert (999, "sent a reply to 'advertise' that nobody asked for") in released.dropped


# ── what Flower's version got wrong and this one cannot ───────────────────────────────────────


def test_s9_a_node_refuses_what_its_policy_does_not_allow() -> None:
    strict = Policy(mode="malicious", min_cohort=6, bits=(16, 24))
    terms = replace(cohort().terms, min_cohort=6)
    me = Party(3, keys.signing_key(bytes(32)), policy=strict)
    values = np.zeros(5, "<u4")
    advertise(me, terms, values, 6)
    for changed, shares, name in (
        (replace(terms, mode="semi-honest"), 0, "mode"),
        (replace(terms, min_cohort=2), 0, "cohort"),
        (replace(terms, bits=32), 0, "modulus"),
        (replace(terms, bits=8), 0, "modulus"),
        (terms, 7, "noise"),
        (replace(terms, size=6), 0, "message"),
    ):
        with pytest.raises(RefusalError, match=f"^{name}: ") as caught:
            advertise(me, changed, values, shares)
        assert caught.value.name == name


def test_s9_the_threshold_is_the_node_s_own_arithmetic() -> None:
    """The server never sends a threshold: there is none to weaken."""
    session = cohort()
    assert not any("threshold" in name for r in session.wire.values() for name in r)
    seen = session.requests_at("share")[OTHER]
    roster = roster_of(session, seen)
    assert (roster.quorum, roster.degree.threshold, roster.degree.neighbours) == (5, 5, 5)


def test_a_cohort_that_shrank_below_the_promise_is_refused() -> None:
    session = cohort(policy=Policy(min_cohort=3))
    session = session.again(min_cohort=6)
    session.to_server = lambda at, node, m: None if at == "mask" and node == VICTIM else m
    with pytest.raises(AbortedError, match="5 nodes sent a vector, 6 are needed"):
        session.run()


def test_the_malicious_mode_is_not_for_five_nodes() -> None:
    values = {n: np.zeros(3, "<u4") for n in NODES[:5]}
    with pytest.raises(AbortedError, match="5 nodes advertised, 6 are needed"):
        LocalSession.of(values).run()


def test_a_sparser_graph_than_the_policy_wants_is_refused() -> None:
    values = {n: np.zeros(1, "<u4") for n in range(101)}
    session = LocalSession.of(values, policy=Policy(min_neighbours=90))
    with pytest.raises(AbortedError):
        session.run()
    assert all(text.startswith("graph: 46 neighbours") for text in session.refusals().values())


def test_s12_the_sum_wraps_like_integers_and_is_never_rounded() -> None:
    values = dict.fromkeys(NODES, np.full(4, (1 << 20) - 1, "<u4"))
    total = LocalSession.of(values, 20).run().total
    assert masks.lift(total, 20).tolist() == [-6] * 4
    assert packing.packed_bytes(1_000_000, 20) < 4_000_000  # Flower sends eight bytes a number


def test_a_pinned_identity_may_not_change() -> None:
    session = cohort()
    session.run()
    impostor = Party(VICTIM, keys.signing_key(keys.new_signing_key()))
    nodes = dict(session.nodes) | {VICTIM: impostor}
    after = session.again(nonce=b"2" * 16)
    after.nodes = nodes
    with pytest.raises(AbortedError):
        after.run()
    said = after.refusals()
    assert re.match("identity: node 25 has another key than before", said[OTHER])
