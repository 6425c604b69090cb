"""Attacks on the secure sum: a lying server, lying nodes, and each defect of Flower 1.41."""

import re
from dataclasses import replace

import numpy as np
import pytest

from umbel.privacy import keys, masks, packing, shamir
from umbel.privacy.session import Member, Roster, bitmap, pack_fields, unpack_fields, vector_key
from umbel.strategies.secure_checks import AbortedError
from umbel.strategies.secure_message import REFUSED, Plain
from umbel.strategies.secure_policy import Policy, RefusalError
from umbel.strategies.secure_protocol import Released, Self, advertise, respond, serve
from umbel.strategies.secure_rehearsal import Rehearsal

NODES = (3, 14, 25, 36, 47, 58)
VICTIM, OTHER = 25, 36
KEYS = ("sealing", "masking", "identity", "certificate", "signature")


def cohort(size: int = 5, policy: Policy | None = None) -> Rehearsal:
    rows = np.random.default_rng(1).integers(0, 1 << 20, (len(NODES), size), "<u4")
    return Rehearsal.of(dict(zip(NODES, rows, strict=True)), 20, policy=policy)


def total_of(session: Rehearsal, released: Released) -> list[int]:
    rows = [session.values[node].astype(object) for node in released.included]
    return [int(x) for x in sum(rows) % (1 << 20)]


def refusals(session: Rehearsal) -> dict[int, str]:
    """What the nodes said when they would not go on."""
    return {n: str(r[REFUSED]) for (_, n), r in session.wire.items() if REFUSED in r}


def roster_of(session: Rehearsal, request: Plain) -> Roster:
    raw = request["roster"]
    assert isinstance(raw, bytes)
    return Roster.read(session.terms.ticket, session.terms.mode, raw)


def stop_at(session: Rehearsal, last: str) -> dict[int, Plain]:
    """Plays a session up to a stage, and returns the requests that the nodes got there."""
    seen: dict[int, Plain] = {}

    def catch(stage: str, node: int, message: Plain) -> Plain | None:
        if stage == last:
            seen[node] = message
            return None
        return message

    session.to_node = catch
    with pytest.raises(AbortedError):
        session.run()
    return seen


# ── the server lies ───────────────────────────────────────────────────────────────────────────


def test_s1_no_message_gets_both_shares_of_anyone() -> None:
    """Flower: one request with overlapping lists. Here a request cannot even name two lists."""
    session = cohort()
    request = stop_at(session, "unmask")[OTHER]
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
    request = stop_at(session, "unmask")[OTHER]
    memory, first = respond(session.nodes[OTHER], "unmask", session.memory[OTHER], request)
    assert "shares" in first
    memory, second = respond(session.nodes[OTHER], "unmask", memory, request)
    assert str(second[REFUSED]).startswith("stage:") and memory == {}


def test_a_node_signs_one_list_of_included_nodes() -> None:
    session = cohort()
    request = stop_at(session, "agree")[OTHER]
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
    request = stop_at(session, "agree")[OTHER]
    listed = bitmap(included, 6) + (b"\0" if name == "message" else b"")
    forged = request | {"included": listed}
    _, reply = respond(session.nodes[OTHER], "agree", session.memory[OTHER], forged)
    assert str(reply[REFUSED]).startswith(name)


def test_too_few_or_forged_signatures_unmask_nothing() -> None:
    session = cohort()
    request = stop_at(session, "unmask")[OTHER]
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
    assert refusals(session)[OTHER].startswith("roster: node 25 did not sign")


def test_a_roster_without_me_or_with_my_keys_changed_is_refused() -> None:
    session = cohort()
    request = stop_at(session, "share")[OTHER]
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
    request = stop_at(session, "share")[OTHER]
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
    request = stop_at(session, "share")[OTHER]
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
    _, advert = advertise(session.nodes[VICTIM], other, session.values[VICTIM], {})

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
    said = refusals(session)
    assert all(said[node].startswith("roster") for node in NODES if node != VICTIM)


def test_messages_of_another_session_are_refused_and_do_no_harm() -> None:
    session = cohort()
    session.run()
    old = dict(session.wire)
    asked = cohort()
    past = stop_at(asked, "unmask")
    after = asked.again(nonce=b"z" * 16)
    requests = stop_at(after, "agree")
    memory, reply = respond(asked.nodes[OTHER], "agree", after.memory[OTHER], past[OTHER])
    assert str(reply[REFUSED]).startswith(("replay", "message"))
    assert memory == after.memory[OTHER]
    _, reply = respond(asked.nodes[OTHER], "agree", memory, requests[OTHER])
    assert "signature" in reply and old


def test_messages_out_of_order_are_refused_and_do_no_harm() -> None:
    session = cohort()
    request = stop_at(session, "mask")[OTHER]
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
    assert released.total.tolist() == total_of(session, released)
    assert (3, "dealt node 36 no share") in released.dropped
    assert (14, "dealt node 36 no share") in released.dropped


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
    assert released.total.tolist() == total_of(everybody, released)
    assert (OTHER, "forged its share of a secret of node 3") in released.dropped


def resigned(session: Rehearsal, node: int, stage: str, content: Plain) -> Plain:
    """What a dishonest node sends: other content, its own valid signature."""
    memory = session.wire[stage, node]
    sid = memory["sid"]
    assert isinstance(sid, bytes)
    return session.nodes[node].signed(stage, sid, **content)


def retagged(session: Rehearsal, node: int, message: Plain, vector: bytes) -> Plain:
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
    assert released.total.tolist() == total_of(session, released)
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
            assert released.total.tolist() == total_of(session, released)
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
    assert released.total.tolist() == total_of(session, released)
    assert (999, "sent a reply to 'advertise' that nobody asked for") in released.dropped


# ── what Flower's version got wrong and this one cannot ───────────────────────────────────────


def test_s9_a_node_refuses_what_its_policy_does_not_allow() -> None:
    strict = Policy(mode="malicious", min_cohort=6, bits=(16, 24), max_norm=1.0, min_noise=0.5)
    terms = replace(cohort().terms, min_cohort=6)
    me = Self(3, keys.signing_key(bytes(32)), policy=strict)
    told: Plain = {"clip.norm": 1, "skellam.noise-multiplier": 1}
    values = np.zeros(5, "<u4")
    advertise(me, terms, values, told)
    for changed, said, name in (
        (replace(terms, mode="semi-honest"), told, "mode"),
        (replace(terms, min_cohort=2), told, "cohort"),
        (replace(terms, bits=32), told, "modulus"),
        (replace(terms, bits=8), told, "modulus"),
        (terms, told | {"clip.norm": 2}, "norm"),
        (terms, {}, "norm"),
        (terms, told | {"skellam.noise-multiplier": 0}, "noise"),
        (terms, {"clip.norm": 1}, "noise"),
        (replace(terms, size=6), told, "message"),
    ):
        with pytest.raises(RefusalError, match=f"^{name}: ") as caught:
            advertise(me, changed, values, said)
        assert caught.value.name == name


def test_s9_the_threshold_is_the_node_s_own_arithmetic() -> None:
    """The server never sends a threshold: there is none to weaken."""
    session = cohort()
    assert not any("threshold" in name for r in session.wire.values() for name in r)
    seen = stop_at(session, "share")[OTHER]
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
        Rehearsal.of(values).run()


def test_a_sparser_graph_than_the_policy_wants_is_refused() -> None:
    values = {n: np.zeros(1, "<u4") for n in range(101)}
    session = Rehearsal.of(values, policy=Policy(min_neighbours=90))
    with pytest.raises(AbortedError):
        session.run()
    assert all(text.startswith("graph: 46 neighbours") for text in refusals(session).values())


def test_s12_the_sum_wraps_like_integers_and_is_never_rounded() -> None:
    values = dict.fromkeys(NODES, np.full(4, (1 << 20) - 1, "<u4"))
    total = Rehearsal.of(values, 20).run().total
    assert masks.lift(total, 20).tolist() == [-6] * 4
    assert packing.packed_bytes(1_000_000, 20) < 4_000_000  # Flower sends eight bytes a number


def test_a_pinned_identity_may_not_change() -> None:
    session = cohort()
    session.run()
    impostor = Self(VICTIM, keys.signing_key(keys.new_signing_key()))
    nodes = dict(session.nodes) | {VICTIM: impostor}
    after = session.again(nonce=b"2" * 16)
    after.nodes = nodes
    with pytest.raises(AbortedError):
        after.run()
    said = refusals(after)
    assert re.match("identity: node 25 has another key than before", said[OTHER])
