"""One secure sum over plain messages, both halves, in the order in which things happen.

Designed after Bonawitz et al. 2017 (with the consistency round for a malicious server) and Bell
et al. 2020 (the sparse graph), not independently audited. `sid` is in every signature and key.

    node -> server   advertise  two X25519 keys, signed with the node's identity
    server -> node   roster     everybody's keys and signatures
    node -> server   share      to each neighbour, sealed: Shamir shares of b and of the mask key
    server -> node   deal       the shares that neighbours sealed for this node; who is left
    node -> server   mask       x + PRG(b) + sum over neighbours of +-PRG(agreed key)  mod 2^B
    server -> node   included   whose vectors arrived
    node -> server   agree      a signature over that list
    server -> node   agreed     everybody's signatures over it
    node -> server   unmask     of each neighbour: the share of b if included, else of the mask key

Who sees what: the server sees keys, sealed shares and masked vectors, and at the end the sum over
the included nodes, of whom it can never obtain both secrets. A node sees the others' public keys
and which of them are left. A node leaves a stage out by saying nothing, or by a refusal that
names what was wrong. The server drops it and goes on, down to the quorum.
"""

import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from umbel.privacy.masking import keys, masks, packing, shamir
from umbel.privacy.masking.session import (
    Member,
    Roster,
    Terms,
    bitmap,
    commitment,
    included_message,
    mask_key,
    pack_fields,
    positions,
    self_mask_key,
    share_keys,
    unpack_fields,
    vector_key,
)
from umbel.strategies.secure.checks import (
    DIGESTS,
    HALF,
    LOST,
    Participants,
    ShareBundle,
    agreed,
    check_agreed,
    check_left,
    check_roster,
    check_signed,
    checked_vector,
    deal_for,
    digests,
    floor,
    own_place,
    read_offer,
    read_roster,
    reopen,
    weakest,
)
from umbel.strategies.secure.message import REFUSED, Plain, Value, blob, number, signable
from umbel.strategies.secure.policy import Policy, RefusalError, Trust
from umbel.strategies.secure.reveal import Reveal

if TYPE_CHECKING:  # a node's connection, which imports this, holds no tensor
    from umbel.strategies.contract import Contract


@dataclass(frozen=True)
class Party:
    """A node as the protocol sees it.

    Attributes:
        node: its id in the federation.
        key: signs.
        certificate: DER of the key's certificate, or empty.
        policy: what it insists on.
        pins: identities of nodes it has met; added to.
    """

    node: int
    key: keys.SigningKey
    certificate: bytes = b""
    policy: Policy = field(default_factory=Policy)
    pins: dict[int, bytes] = field(default_factory=dict)

    def signed(self, stage: str, sid: bytes, **content: Value) -> Plain:
        """A message of this node."""
        message = signable(stage, sid, self.node, content)
        return {"sid": sid, **content, "signature": keys.sign(self.key, message)}


# ── the node's half ───────────────────────────────────────────────────────────────────────────


def advertise(me: Party, terms: Terms, values: masks.Words, shares: int = 0) -> tuple[Plain, Plain]:
    """First: fresh keys, signed for the terms, the contract among them.

    Args:
        me: this node.
        terms: of the session, as this node reckons them.
        values: the integers to be summed, shape (terms.size,).
        shares: into how many shares the noise in them is cut; 0 is no such noise.

    Returns:
        What the node keeps, and its message.

    Raises:
        RefusalError: the terms are outside the node's policy.
    """
    me.policy.check_terms(terms, shares)
    if len(values) != terms.size:
        raise RefusalError("message", f"{len(values)} integers for a sum of {terms.size}")
    sealing, masking = keys.KeyPair.generate(), keys.KeyPair.generate()
    unsigned = Member(me.node, sealing.public, masking.public, b"", b"", b"")
    memory: Plain = {
        "stage": "share",
        "ticket": terms.ticket,
        "run": terms.run,
        "round": terms.round,
        "mode": terms.mode,
        "min-cohort": terms.min_cohort,
        "bits": terms.bits,
        "size": terms.size,
        "values": packing.pack(values, terms.bits),
        "sealing": sealing.private,
        "masking": masking.private,
        "public": sealing.public + masking.public,
        "server": terms.server,
    }
    return memory, {
        "ticket": terms.ticket,
        "contract": terms.contract,
        "sealing": sealing.public,
        "masking": masking.public,
        "identity": keys.public_identity(me.key),
        "certificate": me.certificate,
        "signature": keys.sign(me.key, unsigned.signed(terms.ticket)),
    }


def respond(me: Party, stage: str, memory: Plain, message: Plain) -> tuple[Plain, Plain]:
    """Any later message: what the node keeps afterwards, and its reply.

    A refusal ends the node's part and erases the session, so that no second answer can follow;
    only a message of another session or stage leaves the current one as it was.
    """
    step = {"share": share, "mask": mask, "agree": agree}.get(stage)
    try:
        if step is not None:
            return step(me, memory, message)
        return {}, unmask(me, memory, message)
    except RefusalError as refusal:
        return (memory if refusal.name in ("replay", "stage") else {}), {REFUSED: str(refusal)}
    except ValueError as error:
        return {}, {REFUSED: f"message: {error}"}


def gives(stage: str, reply: Plain) -> bool:
    """Whether a reply is the one that gives the masked update away; its round is then spent."""
    return stage == "mask" and "vector" in reply


def share(me: Party, memory: Plain, message: Plain) -> tuple[Plain, Plain]:
    """Second: check who takes part, and share both secrets among the neighbours."""
    if memory.get("stage") != "share":
        raise RefusalError("stage", "this node has not advertised, or has shared already")
    if blob(message, "ticket") != blob(memory, "ticket"):
        raise RefusalError("replay", "the roster is for other terms, or another model, than mine")
    roster = read_roster(memory, blob(message, "roster"))
    place = own_place(me.node, keys.public_identity(me.key), memory, roster)
    check_roster(roster)
    me.policy.check_roster(roster, number(memory, "min-cohort"))
    trust = me.policy.check_identities(roster.members, me.pins)

    sealing = keys.KeyPair.of(blob(memory, "sealing"))
    own = os.urandom(shamir.SECRET_BYTES)
    holders = roster.holders(place)
    points = [holder + 1 for holder in holders]
    threshold = roster.degree.threshold
    pairs = list(
        zip(
            holders,
            shamir.split(own, threshold, points),
            shamir.split(blob(memory, "masking"), threshold, points),
            strict=True,
        )
    )
    sealed, openers = [], []
    for holder, first, second in pairs:
        if holder != place:
            out, back = share_keys(sealing, roster, place, holder)
            sealed.append(keys.seal(out, first + second, b"share"))
            openers.append(back)
    published = b"".join(
        digests(roster.sid, place, holder, first + second) for holder, first, second in pairs
    )
    mine = next(first + second for holder, first, second in pairs if holder == place)
    kept = memory | {"stage": "mask", "roster": roster.blob, "own": own, "share": mine}
    kept["openers"] = b"".join(openers)
    kept["tagging"] = vector_key(sealing, blob(memory, "server"), roster.sid)
    del kept["sealing"], kept["public"]
    return kept, me.signed(
        "share",
        roster.sid,
        sealed=pack_fields(sealed),
        digests=published,
        commitment=commitment(roster.sid, own),
        trust=trust,
    )


def mask(me: Party, memory: Plain, message: Plain) -> tuple[Plain, Plain]:
    """Third: open the neighbours' shares, mask the vector, and forget the mask keys."""
    roster, place = reopen(me.node, memory, message, "mask")
    left = set(positions(blob(message, "left"), len(roster.members)))
    check_left(memory, roster, place, left)
    present = [i for i in roster.neighbours[place] if i in left]
    dealt = unpack_fields(blob(message, "sealed"))
    published = blob(message, "digests", DIGESTS * len(present))
    if len(dealt) != len(present):
        raise RefusalError("message", "shares were left out or added")
    openers = blob(memory, "openers")
    held = {place: blob(memory, "share")}
    for at, sender in enumerate(present):
        start = 32 * roster.neighbours[place].index(sender)
        try:
            pair = keys.unseal(openers[start : start + 32], dealt[at], b"share")
        except ValueError:
            continue  # named to the server below; the others' shares may do
        if digests(roster.sid, sender, place, pair) == published[DIGESTS * at :][:DIGESTS]:
            held[sender] = pair

    bits, size = number(memory, "bits"), number(memory, "size")
    masking = keys.KeyPair.of(blob(memory, "masking"))
    total = packing.empty_total(size, bits)
    packing.add_packed(total, blob(memory, "values"), bits)
    plus = [self_mask_key(roster.sid, blob(memory, "own"))]
    plus += [mask_key(masking, roster, i) for i in present if i > place]
    minus = [mask_key(masking, roster, i) for i in present if i < place]
    masks.fold(total, plus=plus, minus=minus)
    kept: Plain = {
        "stage": "agree",
        **{k: memory[k] for k in ("ticket", "mode", "min-cohort", "roster")},
        "left": blob(message, "left"),
        "held": pack_fields(held.get(i, b"") for i in roster.holders(place)),
    }
    lost = bitmap((i for i in present if i not in held), len(roster.members))
    vector = packing.pack(total, bits)
    tag = keys.tag(blob(memory, "tagging", 32), vector)
    return kept, me.signed("mask", roster.sid, tag=tag, lost=lost) | {"vector": vector}


def agree(me: Party, memory: Plain, message: Plain) -> tuple[Plain, Plain]:
    """Fourth: sign the list of included nodes; a node signs one list a session."""
    roster, place = reopen(me.node, memory, message, "agree")
    listed = blob(message, "included")
    included = set(positions(listed, len(roster.members)))
    if not included <= set(positions(blob(memory, "left"), len(roster.members))):
        raise RefusalError("included", "a node is included that had dropped out before")
    if place not in included:
        raise RefusalError("included", "my own vector is not included")
    if len(included) < max(roster.quorum, number(memory, "min-cohort")):
        raise RefusalError("cohort", f"only {len(included)} nodes are included")
    reply: Plain = {
        "sid": roster.sid,
        "signature": keys.sign(me.key, included_message(roster.sid, listed)),
    }
    return memory | {"stage": "unmask", "included": listed}, reply


def unmask(me: Party, memory: Plain, message: Plain) -> Plain:
    """Last: of each holder's secrets one share, never both. The caller forgets the session."""
    roster, place = reopen(me.node, memory, message, "unmask")
    listed = blob(memory, "included")
    if not roster.endorsed(listed, blob(message, "signatures")):
        raise RefusalError(
            "quorum", "too few nodes signed the list of included nodes that I signed"
        )
    included = set(positions(listed, len(roster.members)))
    left = set(positions(blob(memory, "left"), len(roster.members)))
    held = dict(zip(roster.holders(place), unpack_fields(blob(memory, "held")), strict=True))
    shares = bytearray()
    for i, pair in held.items():
        if i in left:
            half = pair[:HALF] if i in included else pair[HALF:]
            shares += half or LOST
    return me.signed("unmask", roster.sid, shares=bytes(shares))


# ── the server's half ─────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Released:
    """What the server learns.

    Attributes:
        total: the sum over the included nodes modulo 2^bits, shape (size,).
        included: their ids, sorted.
        dropped: who is not in it or misbehaved, and why.
        trust: how the node that knows least checked the others' identities.
        roster: of the session.
    """

    total: masks.Words
    included: tuple[int, ...]
    dropped: tuple[tuple[int, str], ...]
    trust: Trust
    roster: Roster


Trips = Generator[dict[int, Plain], Iterator[tuple[int, Plain]], Released]


def serve(
    terms: Terms, nodes: Sequence[int], key: keys.KeyPair, known: "Contract | None" = None
) -> Trips:
    """Yields requests by node, is sent the nodes' replies as they arrive, returns the sum.

    Args:
        terms: of the session; the contract in them is what the nodes say.
        nodes: who is asked.
        key: the pair whose public half is in the terms.
        known: the contract as the server reckons it; nodes with another are left out. Without
            it, as for the parts that only nodes know, that of most nodes holds.

    Raises:
        AbortedError: too few nodes are left at some stage; nothing was released.
    """
    present = Participants()
    offers: dict[int, tuple[bytes, Member]] = {}
    for node, reply in present.answers("advertise", nodes, (yield {node: {} for node in nodes})):
        with present.drop_on_error(node):
            offers[node] = read_offer(node, reply, terms, known, offers.values())
    terms, members = agreed(terms, offers, present)
    present.enough("advertised", len(members), floor(terms))
    roster = Roster(terms.ticket, terms.mode, tuple(members[node] for node in sorted(members)))
    sid, count = roster.sid, len(members)
    needed = max(roster.quorum, terms.min_cohort)

    deals: dict[int, ShareBundle] = {}
    invitation: Plain = {"ticket": terms.ticket, "roster": roster.blob}
    asked: list[int] = list(members)
    for node, reply in present.answers("share", asked, (yield dict.fromkeys(asked, invitation))):
        with present.drop_on_error(node):
            check_signed("share", roster, node, reply, ("sealed", "digests", "commitment", "trust"))
            deals[roster.index[node]] = ShareBundle.read(roster, roster.index[node], reply)
    present.enough("shared their secrets", len(deals), needed)

    total = packing.empty_total(terms.size, terms.bits)
    included: list[int] = []
    requests = {roster.members[place].node: deal_for(roster, deals, place) for place in deals}
    for node, reply in present.answers("mask", requests, (yield requests)):
        with present.drop_on_error(node):
            check_signed("mask", roster, node, reply, ("tag", "lost"))
            lost = positions(blob(reply, "lost"), count)
            packing.add_packed(total, checked_vector(roster, node, reply, key), terms.bits)
            included.append(roster.index[node])
            present.note((roster.members[i].node for i in lost), f"dealt node {node} no share")
    present.enough("sent a vector", len(included), needed)

    listed = bitmap(included, count)
    signatures: dict[int, bytes] = {}
    asked = [roster.members[place].node for place in sorted(included)]
    request: Plain = {"sid": sid, "included": listed}
    for node, reply in present.answers("agree", asked, (yield dict.fromkeys(asked, request))):
        with present.drop_on_error(node):
            check_agreed(roster, node, reply, listed)
            signatures[roster.index[node]] = blob(reply, "signature")
    present.enough("agreed", len(signatures), needed)

    request = {
        "sid": sid,
        "signatures": pack_fields(signatures.get(i, b"") for i in sorted(included)),
    }
    asked = [roster.members[place].node for place in signatures]
    reveal = Reveal(roster, deals, frozenset(included))
    for node, reply in present.answers("unmask", asked, (yield dict.fromkeys(asked, request))):
        with present.drop_on_error(node):
            check_signed("unmask", roster, node, reply, ("shares",))
            reveal.take(roster.index[node], blob(reply, "shares"))
    plus, minus = reveal.keys(present)
    masks.fold(total, plus=plus, minus=minus)
    return Released(
        total=masks.reduce(total, terms.bits)[: terms.size],
        included=tuple(roster.members[place].node for place in sorted(included)),
        dropped=tuple(present.dropped),
        trust=weakest(deal.trust for deal in deals.values()),
        roster=roster,
    )
