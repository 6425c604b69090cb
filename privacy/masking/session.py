"""What all nodes of one secure sum agree on, before any of them shares a secret.

    Terms   the round: run, number, nonce, model, parameters, modulus, size, mode, cohort floor,
            and the contract: app, options, layers, layout (umbel.strategies.contract)
    ticket  SHA-256 of the terms; signed by every node with its fresh keys
    Roster  the members' keys and signatures
    sid     SHA-256 of ticket and roster; salts every key, is part of every signature

Two nodes that were sent different models, options, parameters or rosters, or that hold different
apps, have different tickets or session ids, refuse each other's signatures and would not have
cancelling masks (this is what stops the model-inconsistency attack of Pasquini et al. 2022).
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from typing import Literal

from umbel.privacy.masking import graph, keys

Mode = Literal["malicious", "semi-honest"]
Secret = Literal["own", "masking"]

MALICIOUS_FROM = 6
"""Below this many nodes a threshold of two thirds tolerates no useful number of colluders."""


@dataclass(frozen=True)
class Terms:
    """The public facts of one session.

    Attributes:
        run: of the federation.
        round: from 1.
        nonce: 16 bytes from the server, new for every attempt.
        model: SHA-256 of the model that the node received.
        parameters: SHA-256 of everything else that the node was told.
        bits: sums are taken modulo 2^bits.
        size: how many integers a vector has.
        mode: which server the thresholds are made for.
        min_cohort: no sum is made of fewer.
        server: the server's X25519 key of this session; vectors are authenticated with it.
        contract: digests of what the node acts on besides; empty before anybody has said them.
    """

    run: int
    round: int
    nonce: bytes
    model: bytes
    parameters: bytes
    bits: int
    size: int
    mode: Mode
    min_cohort: int
    server: bytes
    contract: bytes = b""

    @cached_property
    def ticket(self) -> bytes:
        """SHA-256 over all of it."""
        return keys.digest(
            "terms",
            *(self.run, self.round, self.nonce, self.model, self.parameters),
            *(self.bits, self.size, self.mode, self.min_cohort, self.server, self.contract),
        )


@dataclass(frozen=True)
class Member:
    """One node's advertisement.

    Attributes:
        node: its id in the federation.
        sealing: X25519 key under which shares are sent to it.
        masking: X25519 key from which pairwise masks come; its private half is what is shared.
        identity: DER of the key that signs.
        certificate: DER of the identity's certificate, or empty.
        signature: over ticket, node, both keys.
    """

    node: int
    sealing: bytes
    masking: bytes
    identity: bytes
    certificate: bytes
    signature: bytes

    def signed(self, ticket: bytes) -> bytes:
        """What `signature` must be over."""
        return keys.transcript("advertise", ticket, self.node, self.sealing, self.masking)

    def genuine(self, ticket: bytes) -> bool:
        """The keys have the right length and the identity signed them for this ticket."""
        return (
            len(self.sealing) == len(self.masking) == keys.PUBLIC_BYTES
            and 0 <= self.node < 1 << 64
            and keys.verify(self.identity, self.signed(ticket), self.signature)
        )


@dataclass(frozen=True)
class Roster:
    """The members of a session, in the order of their node ids; a position names one.

    Attributes:
        ticket: of the terms.
        mode: of the terms.
        members: sorted by node.
    """

    ticket: bytes
    mode: Mode
    members: tuple[Member, ...]

    @cached_property
    def blob(self) -> bytes:
        """The members as bytes, the same for everybody."""
        return pack_fields(
            field
            for member in self.members
            for field in (
                member.node.to_bytes(8),
                *(member.sealing, member.masking),
                *(member.identity, member.certificate, member.signature),
            )
        )

    @cached_property
    def sid(self) -> bytes:
        """The session id."""
        return keys.digest("session", self.ticket, self.blob)

    @cached_property
    def index(self) -> dict[int, int]:
        """Position of each node."""
        return {member.node: place for place, member in enumerate(self.members)}

    @cached_property
    def degree(self) -> graph.Degree:
        """Neighbours of a node, and how many of the holders give its secrets back."""
        count = len(self.members)
        if count > graph.COMPLETE_UP_TO:
            sparse = graph.degree(count)
            if sparse is not None:
                return sparse
        return graph.Degree(count - 1, self.quorum)

    @cached_property
    def quorum(self) -> int:
        """How many members must sign the same list of included nodes.

        With two thirds and one more, two different lists would need an honest node to sign both
        as long as fewer than a third collude (Bonawitz et al. 2017, section 4); a semi-honest
        server never shows two, and half is enough.
        """
        count = len(self.members)
        return 2 * count // 3 + 1 if self.mode == "malicious" else count // 2 + 1

    @cached_property
    def neighbours(self) -> list[tuple[int, ...]]:
        """Positions of the neighbours of each position."""
        return graph.ring(keys.digest("graph", self.sid), len(self.members), self.degree.neighbours)

    def holders(self, place: int) -> tuple[int, ...]:
        """Positions that hold shares of the secrets of one: its neighbours and itself."""
        return tuple(sorted((*self.neighbours[place], place)))

    @cached_property
    def impostors(self) -> list[int]:
        """Nodes whose advertisement does not carry their signature for this ticket."""
        return [member.node for member in self.members if not member.genuine(self.ticket)]

    @cached_property
    def repeats(self) -> bool:
        """Whether a node, an identity or a key occurs twice."""
        columns: list[list[int] | list[bytes]] = [
            [member.node for member in self.members],
            [member.identity for member in self.members],
            [key for member in self.members for key in (member.sealing, member.masking)],
        ]
        return any(len(set[int | bytes](column)) < len(column) for column in columns)

    @staticmethod
    @lru_cache(maxsize=4)
    def read(ticket: bytes, mode: Mode, blob: bytes) -> "Roster":
        """The roster that a server sent.

        It is a function of its arguments and is kept: all virtual nodes of a process read the
        same one, and its signatures are checked once for all of them.

        Raises:
            ValueError: the bytes are no roster, or not in order.
        """
        fields = unpack_fields(blob)
        if len(fields) % 6:
            raise ValueError("A roster was cut off.")
        members = tuple(
            Member(int.from_bytes(fields[at]), *fields[at + 1 : at + 6])
            for at in range(0, len(fields), 6)
        )
        if [member.node for member in members] != sorted(member.node for member in members):
            raise ValueError("A roster is not in the order of its nodes.")
        roster = Roster(ticket, mode, members)
        if roster.blob != blob:
            raise ValueError("A roster is not in its one valid form.")
        return roster

    def endorsed(self, included: bytes, signatures: bytes) -> bool:
        """Whether a quorum of the included members validly signed this list of them.

        Raises:
            ValueError: there is not one signature, or an empty place, for each included member.
        """
        return _endorsed(self, included, signatures)

    def __hash__(self) -> int:
        return hash(self.sid)


@lru_cache(maxsize=8)
def _endorsed(roster: Roster, included: bytes, signatures: bytes) -> bool:
    message = included_message(roster.sid, included)
    places = positions(included, len(roster.members))
    fields = unpack_fields(signatures)
    if len(fields) != len(places):
        raise ValueError("Signatures were left out or added; each included node has its place.")
    valid = (
        place
        for place, signature in zip(places, fields, strict=True)
        if signature and keys.verify(roster.members[place].identity, message, signature)
    )
    # The rest is not looked at: a list that a quorum signed is agreed upon.
    return sum(1 for _ in islice(valid, roster.quorum)) == roster.quorum


def forget_checked() -> None:
    """Forget which rosters and signatures were checked, as a process that has just begun."""
    Roster.read.cache_clear()
    _endorsed.cache_clear()
    keys.verify.cache_clear()
    keys.verifier.cache_clear()


def included_message(sid: bytes, included: bytes) -> bytes:
    """What a member signs when it agrees to the list of included members."""
    return keys.transcript("included", sid, included)


def bitmap(places: Iterable[int], count: int) -> bytes:
    """A set of positions as one bit each, the first in the lowest bit of the first byte."""
    bits = 0
    for place in places:
        bits |= 1 << place
    return bits.to_bytes(-(-count // 8), "little")


def positions(bits: bytes, count: int) -> list[int]:
    """The positions of a bitmap.

    Raises:
        ValueError: it has another length, or names a position that there is not.
    """
    number = int.from_bytes(bits, "little")
    if len(bits) != -(-count // 8) or number >> count:
        raise ValueError(f"A list of members does not fit the {count} members.")
    return [place for place in range(count) if number >> place & 1]


def pack_fields(fields: Iterable[bytes]) -> bytes:
    """Byte strings, each behind its length in 4 bytes."""
    return b"".join(len(field).to_bytes(4) + field for field in fields)


def unpack_fields(blob: bytes) -> list[bytes]:
    """What `pack_fields` was given.

    Raises:
        ValueError: the last field is cut off.
    """
    fields, at, end = [], 0, len(blob)
    while at < end:
        start = at + 4
        at = start + int.from_bytes(blob[at:start])
        fields.append(blob[start:at])
    if at != end:  # only the last one can reach beyond
        raise ValueError("A message was cut off.")
    return fields


def share_keys(own: keys.KeyPair, roster: Roster, place: int, other: int) -> tuple[bytes, bytes]:
    """Two keys for one pair of members: what we seal with, and what we open with."""
    low, high = min(place, other), max(place, other)
    both = own.agree(
        roster.members[other].sealing, roster.sid, keys.transcript("seal", low, high), length=64
    )
    up, down = both[:32], both[32:]
    return (up, down) if place == low else (down, up)


def mask_key(own: keys.KeyPair, roster: Roster, other: int) -> bytes:
    """The mask key that a masking key and another member's have in common."""
    return own.agree(roster.members[other].masking, roster.sid, _MASK)


_MASK = keys.transcript("mask")


def self_mask_key(sid: bytes, own: bytes) -> bytes:
    """The mask key of a node's own secret b."""
    return keys.digest("self mask", sid, own)


def vector_key(own: keys.KeyPair, other: bytes, sid: bytes) -> bytes:
    """The key with which a node authenticates its one vector to the server."""
    return own.agree(other, sid, keys.transcript("vector"))


def commitment(sid: bytes, own: bytes) -> bytes:
    """What a node publishes of b, so that what is put together again can be checked."""
    return keys.digest("commitment", sid, own)


def share_digest(sid: bytes, dealer: int, holder: int, kind: Secret, share: bytes) -> bytes:
    """What a dealer publishes of a share, so that a forged one can be laid at its sender's door.

    It hides the share because a share has 256 bits of entropy (SHA-256 as a random oracle).
    """
    # As distinct as a transcript: its head tells its own end, and the next five bytes are five.
    return keys.sha256(_share_head(sid, dealer) + _SHARE_PLACE(holder, kind == "own") + share)


@lru_cache(maxsize=1 << 10)
def _share_head(sid: bytes, dealer: int) -> bytes:
    return keys.transcript("share", sid, dealer)


_SHARE_PLACE = struct.Struct(">I?").pack
