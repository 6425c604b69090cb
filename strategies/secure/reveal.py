"""The end of a secure sum on the server: from shares to the masks that must come off.

Of an included node the secret b is put together again, of a node that dropped out after it had
shared its secrets the masking key; never both. What comes out is checked against what the node
published. Where it does not fit, every share is checked against its dealer's digest: a forged one
is laid at its sender's door and the others are used.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from umbel.privacy.masking import keys, shamir
from umbel.privacy.masking.session import (
    Roster,
    Secret,
    commitment,
    mask_key,
    self_mask_key,
    share_digest,
)
from umbel.strategies.secure.checks import HALF, LOST, AbortedError, Participants, ShareBundle
from umbel.strategies.secure.policy import RefusalError


@dataclass
class Reveal:
    """Collects shares, and makes mask keys of them.

    Attributes:
        roster: of the session.
        deals: by position; who is in them shared its secrets.
        included: positions whose vectors are in the sum.
    """

    roster: Roster
    deals: Mapping[int, ShareBundle]
    included: frozenset[int]
    _shares: dict[int, dict[int, bytes]] = field(default_factory=dict)

    def take(self, holder: int, shares: bytes) -> None:
        """One node's shares: of every holder's secrets one, in the order of positions."""
        dealers = [i for i in self.roster.holders(holder) if i in self.deals]
        if len(shares) != HALF * len(dealers):
            raise RefusalError("message", f"{len(shares)} bytes of shares for {len(dealers)} nodes")
        for at, dealer in enumerate(dealers):
            share = shares[HALF * at :][:HALF]
            if share != LOST:
                self._shares.setdefault(dealer, {})[holder] = share

    def keys(self, present: Participants) -> tuple[list[bytes], list[bytes]]:
        """Keys of the masks to add, and of those to subtract.

        Raises:
            AbortedError: some node's secret has too few holders left.
        """
        roster, sid = self.roster, self.roster.sid
        plus: list[bytes] = []
        minus: list[bytes] = []
        for i in sorted(self.included):
            minus.append(self_mask_key(sid, self._secret(i, "own", present)))
        for i in sorted(set(self.deals) - self.included):
            pair = keys.KeyPair.of(self._secret(i, "masking", present))
            for j in sorted(self.included.intersection(roster.neighbours[i])):
                # The neighbour added the mask if it stands before the node that is gone.
                (minus if j < i else plus).append(mask_key(pair, roster, j))
        return plus, minus

    def _secret(self, dealer: int, kind: Secret, present: Participants) -> bytes:
        shares = self._shares.get(dealer, {})
        secret = self._combine(shares)
        if secret is not None and self._fits(dealer, kind, secret):
            return secret
        good = {}
        for holder, share in shares.items():
            published = self.deals[dealer].digests[holder]
            if share_digest(self.roster.sid, dealer, holder, kind, share) in (
                published[: keys.DIGEST_BYTES],
                published[keys.DIGEST_BYTES :],
            ):
                good[holder] = share
            else:
                present.note(
                    [self.roster.members[holder].node],
                    f"forged its share of a secret of node {self.roster.members[dealer].node}",
                )
        secret = self._combine(good)
        if secret is not None and self._fits(dealer, kind, secret):
            return secret
        node = self.roster.members[dealer].node
        if secret is not None:
            present.note([node], "shared another secret than it promised")
        raise AbortedError(
            f"the secure sum was given up: {len(good)} usable shares of a secret of node {node}",
            present.dropped,
            revealed=True,
        )

    def _fits(self, dealer: int, kind: Secret, secret: bytes) -> bool:
        if kind == "own":
            return commitment(self.roster.sid, secret) == self.deals[dealer].commitment
        return keys.KeyPair.of(secret).public == self.roster.members[dealer].masking

    def _combine(self, shares: Mapping[int, bytes]) -> bytes | None:
        threshold = self.roster.degree.threshold
        if len(shares) < threshold:
            return None
        first = {holder + 1: shares[holder] for holder in sorted(shares)[:threshold]}
        try:
            return shamir.combine(first)
        except ValueError:  # a share that is no element of the field; its digest tells whose
            return None
