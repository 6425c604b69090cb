"""What a node insists on in a secure sum, whatever the coordinator asks, and why it refuses.

The numbers come from the policy file; see `umbel.strategies.policy.node_policy`, which has what a
node allows besides. Without roster and authority, identities are pinned on first use.
"""

import datetime
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from umbel.privacy.masking.session import MALICIOUS_FROM, Member, Mode, Roster, Terms

Trust = Literal["authority", "roster-file", "first-use"]


class RefusalError(ValueError):
    """A node will not go on, and says why.

    Attributes:
        name: what was wrong in one word: cohort, contract, graph, identity, included, message,
            mode, model, modulus, noise, replay, roster, round, shares, stage or quorum.
    """

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(f"{name}: {sentence}")
        self.name = name


@dataclass(frozen=True)
class Policy:
    """The limits of one node on its sums; the defaults are for a simulation, not for a hospital.

    Attributes:
        mode: the weakest mode that is accepted.
        min_cohort: no sum of fewer nodes.
        min_neighbours: no sparser graph, unless it is complete.
        bits: smallest and largest modulus.
        roster: SHA-256 in hex of the identities that may take part; None is anybody's.
        authority: DER certificate of the authority that must have signed every identity.
    """

    mode: Mode = "semi-honest"
    min_cohort: int = 3
    min_neighbours: int = 2
    bits: tuple[int, int] = (8, 62)
    roster: frozenset[str] | None = None
    authority: bytes | None = None

    def check_terms(self, terms: Terms, shares: int = 0) -> None:
        """Before anything else: the terms of a session.

        Args:
            terms: of the session.
            shares: into how many shares this node's noise is cut; 0 is no such noise.

        Raises:
            RefusalError: something is outside this policy.
        """
        if self.mode == "malicious" and terms.mode != "malicious":
            raise RefusalError(
                "mode", f"the server offers a {terms.mode} sum, the policy wants more"
            )
        low, high = self.bits
        if not low <= terms.bits <= high:
            raise RefusalError("modulus", f"2^{terms.bits} is not between 2^{low} and 2^{high}")
        if terms.min_cohort < self.min_cohort:
            raise RefusalError(
                "cohort", f"sums of {terms.min_cohort} nodes; the policy wants {self.min_cohort}"
            )
        if shares > terms.min_cohort:
            raise RefusalError(
                "noise", f"{shares} shares of noise in sums of as few as {terms.min_cohort} nodes"
            )

    def check_roster(self, roster: Roster, min_cohort: int) -> None:
        """Once the members are known: how many, and who shares masks with whom.

        Raises:
            RefusalError: too few members, or too sparse a graph.
        """
        count = len(roster.members)
        if count < max(self.min_cohort, min_cohort):
            raise RefusalError("cohort", f"{count} nodes are left; {min_cohort} were promised")
        if roster.mode == "malicious" and count < MALICIOUS_FROM:
            raise RefusalError("mode", f"{count} nodes cannot stand against a malicious server")
        neighbours = roster.degree.neighbours
        if neighbours < min(self.min_neighbours, count - 1):
            raise RefusalError("graph", f"{neighbours} neighbours; the policy wants more")

    def check_identities(self, members: Sequence[Member], pins: dict[int, bytes]) -> Trust:
        """Whether the members are who they should be.

        Where nothing else tells, they are compared with `pins`, to which new ones are added.

        Raises:
            RefusalError: an identity is unknown, has no certificate, or is not the pinned one.
        """
        trust: Trust = "first-use"
        if self.authority is not None:
            trust = "authority"
            now = datetime.datetime.now(datetime.UTC)
            for member in members:
                known = member.certificate, member.identity
                if not _certified(self.authority, *known, now.date()):
                    raise RefusalError("identity", f"node {member.node} has no valid certificate")
        if self.roster is not None:
            trust = "roster-file"
            for member in members:
                if fingerprint(member.identity) not in self.roster:
                    raise RefusalError("identity", f"node {member.node} is not in the roster file")
        for member in members if trust == "first-use" else ():
            print_ = hashlib.sha256(member.identity).digest()[:16]
            if pins.setdefault(member.node, print_) != print_:
                raise RefusalError("identity", f"node {member.node} has another key than before")
        return trust


def fingerprint(identity: bytes) -> str:
    """SHA-256 of an identity in hex, as in a roster file."""
    return hashlib.sha256(identity).hexdigest()


@lru_cache(maxsize=1 << 14)
def _certified(authority: bytes, certificate: bytes, identity: bytes, day: datetime.date) -> bool:
    """Whether the authority signed this identity's certificate, valid on `day`."""
    try:
        root = x509.load_der_x509_certificate(authority)
        leaf = x509.load_der_x509_certificate(certificate)
        leaf.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    public = leaf.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    begin, end = leaf.not_valid_before_utc.date(), leaf.not_valid_after_utc.date()
    return public == identity and begin <= day <= end
