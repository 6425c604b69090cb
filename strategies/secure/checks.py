"""What either side of a secure sum checks before it goes on; the protocol is in the file beside.

The node's checks raise `RefusalError`, which ends its part in the session. The server's drop the
sender by name and go on, until too few are left.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from umbel.core.errors import RunError
from umbel.privacy.masking import keys, shamir
from umbel.privacy.masking.session import (
    MALICIOUS_FROM,
    Member,
    Mode,
    Roster,
    Terms,
    bitmap,
    included_message,
    pack_fields,
    share_digest,
    unpack_fields,
    vector_key,
)
from umbel.strategies.secure.message import REFUSED, Plain, blob, number, signable, text
from umbel.strategies.secure.policy import RefusalError, Trust

if TYPE_CHECKING:  # a node's connection, which imports this, holds no tensor
    from umbel.strategies.contract import Contract

HALF = shamir.SHARE_BYTES
LOST = b"\xff" * HALF
"""In the place of a share that a node never got; no element of the field."""
DIGESTS = 2 * keys.DIGEST_BYTES

_TRUST: tuple[Trust, ...] = ("first-use", "roster-file", "authority")


# ── of a node ─────────────────────────────────────────────────────────────────────────────────


def read_roster(memory: Plain, blob_: bytes) -> Roster:
    """The roster in its one valid form."""
    mode: Mode = "malicious" if memory["mode"] == "malicious" else "semi-honest"
    try:
        return Roster.read(blob(memory, "ticket"), mode, blob_)
    except ValueError as error:
        raise RefusalError("roster", str(error)) from None


def own_place(node: int, identity: bytes, memory: Plain, roster: Roster) -> int:
    """Where this node stands in the roster; its keys must be as it sent them."""
    place = roster.index.get(node)
    if place is not None:
        own = roster.members[place]
        if own.sealing + own.masking == blob(memory, "public") and own.identity == identity:
            return place
    raise RefusalError("roster", "my own keys are not in it as I sent them")


def check_roster(roster: Roster) -> None:
    """Everybody in it is somebody else, and signed its keys for these very terms."""
    if roster.repeats:
        raise RefusalError("roster", "a node, an identity or a key occurs twice")
    if roster.impostors:
        raise RefusalError(
            "roster",
            f"node {roster.impostors[0]} did not sign these keys for these terms: somebody "
            "changed them, or that node has another app, or was sent another model, other options "
            "or other settings",
        )


def reopen(node: int, memory: Plain, message: Plain, stage: str) -> tuple[Roster, int]:
    """The session that a message belongs to, if it is the current one and at this stage."""
    if memory.get("stage") != stage:
        raise RefusalError("stage", f"this node is not at the stage {stage!r} of any session")
    roster = read_roster(memory, blob(memory, "roster"))
    if blob(message, "sid") != roster.sid:
        raise RefusalError("replay", "the message belongs to another session")
    return roster, roster.index[node]


def check_left(memory: Plain, roster: Roster, place: int, left: set[int]) -> None:
    """Enough nodes, and enough of the holders of this node's secrets, are left."""
    if place not in left:
        raise RefusalError("roster", "I shared my secrets and am listed as gone")
    if len(left) < max(roster.quorum, number(memory, "min-cohort")):
        raise RefusalError("cohort", f"only {len(left)} nodes are left")
    if len(left.intersection(roster.holders(place))) < roster.degree.threshold:
        raise RefusalError("graph", "too few of my neighbours are left")


def digests(sid: bytes, dealer: int, holder: int, pair: bytes) -> bytes:
    """What a dealer publishes of both shares of one holder."""
    return share_digest(sid, dealer, holder, "own", pair[:HALF]) + share_digest(
        sid, dealer, holder, "masking", pair[HALF:]
    )


# ── of the server ─────────────────────────────────────────────────────────────────────────────


class AbortedError(RunError):
    """Too few nodes were left, and nothing was released.

    Attributes:
        dropped: who dropped out, and why.
        revealed: shares had been asked for, so a server that lies about the abort could have
            the sum; an accountant must charge it.
    """

    def __init__(self, sentence: str, dropped: Iterable[tuple[int, str]], revealed: bool) -> None:
        super().__init__(sentence)
        self.dropped = tuple(dropped)
        self.revealed = revealed


@dataclass
class Participants:
    """Who answered, who did not, and why a reply was not used."""

    dropped: list[tuple[int, str]] = field(default_factory=list)

    def answers(
        self, stage: str, asked: Collection[int], replies: Iterable[tuple[int, Plain]]
    ) -> Iterator[tuple[int, Plain]]:
        """The first reply of every node that was asked and did not refuse."""
        waiting = set(asked)
        for node, reply in replies:
            if node not in waiting:
                self.dropped.append((node, f"sent a reply to {stage!r} that nobody asked for"))
                continue
            waiting.discard(node)
            if REFUSED in reply:
                self.dropped.append((node, f"refused to {stage}: {str(reply[REFUSED])[:300]}"))
                continue
            yield node, reply
        self.dropped += [(node, f"did not answer {stage!r}") for node in sorted(waiting)]

    @contextmanager
    def drop_on_error(self, node: int) -> Iterator[None]:
        """What goes wrong inside is the fault of this node's message."""
        try:
            yield
        except ValueError as error:
            self.dropped.append((node, str(error)))

    def note(self, nodes: Iterable[int], what: str) -> None:
        """Something about nodes that does not drop them."""
        self.dropped += [(node, what) for node in nodes]

    def enough(self, what: str, count: int, needed: int) -> None:
        """Go on only with as many nodes as are needed."""
        if count < needed:
            raise AbortedError(
                f"the secure sum was given up: {count} nodes {what}, {needed} are needed",
                self.dropped,
                revealed=False,
            )


def floor(terms: Terms) -> int:
    """The fewest nodes that may begin."""
    return max(terms.min_cohort, MALICIOUS_FROM if terms.mode == "malicious" else 2)


def read_offer(
    node: int,
    reply: Plain,
    terms: Terms,
    known: "Contract | None",
    others: Collection[tuple[bytes, Member]],
) -> tuple[bytes, Member]:
    """A node's contract and its advertisement, signed for these terms and unlike anybody else's."""
    own = blob(reply, "contract")
    terms = under(terms, own)
    if blob(reply, "ticket") != terms.ticket:
        raise RefusalError("model", "the node has another model or other terms than this round's")
    if known is not None:
        differing = known.differs(known.read(own))
        if differing:
            raise RefusalError("contract", f"the node has {_other(differing)} than this run")
    member = Member(
        node=node,
        sealing=blob(reply, "sealing"),
        masking=blob(reply, "masking"),
        identity=blob(reply, "identity"),
        certificate=blob(reply, "certificate"),
        signature=blob(reply, "signature"),
    )
    if not member.genuine(terms.ticket):
        raise RefusalError("identity", "the node's keys are not signed by its identity")
    new = {member.sealing, member.masking, member.identity}
    if len(new) < 3 or any(new & {o.sealing, o.masking, o.identity} for _, o in others):
        raise RefusalError("identity", "the node's keys or identity are another node's")
    return own, member


@lru_cache(maxsize=64)
def under(terms: Terms, contract: bytes) -> Terms:
    """These terms with a contract."""
    return replace(terms, contract=contract)


def agreed(
    terms: Terms, offers: Mapping[int, tuple[bytes, Member]], present: Participants
) -> tuple[Terms, dict[int, Member]]:
    """The terms under the contract of most nodes, and the nodes that have it; others drop out."""
    count = Counter(contract for contract, _ in offers.values())
    if not count:
        return terms, {}
    chosen = max(count, key=lambda contract: (count[contract], contract))
    members = {node: member for node, (own, member) in offers.items() if own == chosen}
    others = [node for node in offers if node not in members]
    present.note(others, "contract: the node has another app, options or layers than most")
    return under(terms, chosen), members


def _other(parts: Sequence[str]) -> str:
    return " and ".join(f"another {part}" if part == "app" else f"other {part}" for part in parts)


def check_signed(
    stage: str, roster: Roster, node: int, reply: Plain, fields: Collection[str]
) -> None:
    """The reply is of this session and stage and signed by its sender, every field of it."""
    if blob(reply, "sid") != roster.sid:
        raise RefusalError("replay", "the reply belongs to another session")
    content = {name: reply[name] for name in fields if name in reply}
    identity = roster.members[roster.index[node]].identity
    message = signable(stage, roster.sid, node, content)
    if not keys.verify(identity, message, blob(reply, "signature")):
        raise RefusalError("message", "the reply is not signed by its sender")


def checked_vector(roster: Roster, node: int, reply: Plain, key: keys.KeyPair) -> bytes:
    """The masked vector as its sender sent it: its tag is right, and the tag is signed."""
    member = roster.members[roster.index[node]]
    vector = blob(reply, "vector")
    if not keys.has_tag(
        vector_key(key, member.sealing, roster.sid), vector, blob(reply, "tag", 16)
    ):
        raise RefusalError("message", "the vector was changed on its way")
    return vector


def check_agreed(roster: Roster, node: int, reply: Plain, listed: bytes) -> None:
    """The reply signs the list of included nodes."""
    identity = roster.members[roster.index[node]].identity
    if not keys.verify(identity, included_message(roster.sid, listed), blob(reply, "signature")):
        raise RefusalError("message", "the list of included nodes is not signed by the sender")


@dataclass(frozen=True)
class ShareBundle:
    """What one node sent when it shared its secrets.

    Attributes:
        sealed: by position of the receiver, the sealed pair of shares.
        digests: by position of the holder, the digests of both shares.
        commitment: to the node's own secret b.
        trust: how it checked the others' identities.
    """

    sealed: dict[int, bytes]
    digests: dict[int, bytes]
    commitment: bytes
    trust: Trust

    @staticmethod
    def read(roster: Roster, place: int, reply: Plain) -> "ShareBundle":
        """Takes a reply apart; RefusalError says what is missing."""
        neighbours, holders = roster.neighbours[place], roster.holders(place)
        sealed = unpack_fields(blob(reply, "sealed"))
        joined = blob(reply, "digests", DIGESTS * len(holders))
        if len(sealed) != len(neighbours) or any(len(one) != 2 * HALF + 16 for one in sealed):
            raise RefusalError("message", "the node did not share its secrets with each neighbour")
        parts = [joined[DIGESTS * at :][:DIGESTS] for at in range(len(holders))]
        trust = next((known for known in _TRUST if known == text(reply, "trust")), _TRUST[0])
        return ShareBundle(
            dict(zip(neighbours, sealed, strict=True)),
            dict(zip(holders, parts, strict=True)),
            blob(reply, "commitment", keys.DIGEST_BYTES),
            trust,
        )


def deal_for(roster: Roster, deals: dict[int, ShareBundle], place: int) -> Plain:
    """What the server passes on to one node: who is left, and what they sealed for it."""
    senders = [i for i in roster.neighbours[place] if i in deals]
    return {
        "sid": roster.sid,
        "left": bitmap(deals, len(roster.members)),
        "sealed": pack_fields(deals[i].sealed[place] for i in senders),
        "digests": b"".join(deals[i].digests[place] for i in senders),
    }


def weakest(trusts: Iterable[Trust]) -> Trust:
    """The least of several kinds of trust."""
    return min(trusts, key=_TRUST.index, default=_TRUST[0])
