"""What a node insists on in a secure sum, whatever the coordinator asks: its own policy file.

The file belongs to the node's operator and is TOML:

    mode = "malicious"       # the weakest threshold that is good enough; or "semi-honest"
    min-cohort = 5           # never be part of a sum of fewer nodes
    min-neighbours = 20      # share masks with at least so many (or with everybody)
    bits = [8, 62]           # smallest and largest modulus, as powers of two
    max-norm = 10.0          # the largest clipping norm
    min-noise = 1.0          # the smallest noise multiplier of the sum; leaves no round without
    roster = "roster.txt"    # the only nodes to sum with: a line "NAME SHA256-OF-IDENTITY" each
    authority = "ca.pem"     # every member must have a certificate of this authority

Every key may be left out. Without roster and authority, identities are pinned on first use.
"""

import datetime
import hashlib
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from umbel.privacy.masking.session import MALICIOUS_FROM, Member, Mode, Roster, Terms
from umbel.strategies.errors import ConfigError

POLICY = "secure-policy"
"""Key of a node's configuration that names its policy file."""

Trust = Literal["authority", "roster-file", "first-use"]


class RefusalError(ValueError):
    """A node will not go on, and says why.

    Attributes:
        name: what was wrong in one word: cohort, graph, identity, included, message, mode,
            model, modulus, noise, norm, replay, roster, shares, stage or quorum.
    """

    def __init__(self, name: str, sentence: str) -> None:
        super().__init__(f"{name}: {sentence}")
        self.name = name


@dataclass(frozen=True)
class Policy:
    """The limits of one node; the defaults are for a simulation, not for a hospital.

    Attributes:
        mode: the weakest mode that is accepted.
        min_cohort: no sum of fewer nodes.
        min_neighbours: no sparser graph, unless it is complete.
        bits: smallest and largest modulus.
        max_norm: largest clipping norm; None takes any, and none at all.
        min_noise: smallest noise multiplier; None takes sums without noise.
        roster: SHA-256 in hex of the identities that may take part; None is anybody's.
        authority: DER certificate of the authority that must have signed every identity.
    """

    mode: Mode = "semi-honest"
    min_cohort: int = 3
    min_neighbours: int = 2
    bits: tuple[int, int] = (8, 62)
    max_norm: float | None = None
    min_noise: float | None = None
    roster: frozenset[str] | None = None
    authority: bytes | None = None

    @staticmethod
    def load(path: Path) -> "Policy":
        """Reads a policy file.

        Raises:
            ConfigError: it cannot be read, has an unknown key or a value of the wrong kind.
        """
        try:
            found = {k.replace("-", "_"): v for k, v in tomllib.loads(path.read_text()).items()}
        except (OSError, ValueError) as error:
            raise ConfigError(f"the policy file {path} cannot be read: {error}") from error
        known = {field.name for field in fields(Policy)}
        for name, value in found.items():
            if name not in known or not _fits(name, value):
                raise ConfigError(
                    f"{path} says {name.replace('_', '-')} = {value!r}, which is no such setting; "
                    f"known are {', '.join(sorted(k.replace('_', '-') for k in known))}"
                )
        if "roster" in found:
            found["roster"] = _read_roster(path.parent / found["roster"])
        if "authority" in found:
            found["authority"] = _read_authority(path.parent / found["authority"])
        if "bits" in found:
            found["bits"] = tuple(found["bits"])
        return Policy(**found)

    def check_terms(self, terms: Terms, told: Mapping[str, Any]) -> None:
        """Before anything else: the terms, and what the layers were told.

        Args:
            terms: of the session.
            told: the round's configuration, whose hash is in the terms.

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
        norm, noise = _number(told.get(NORM)), _number(_first(told, NOISE))
        if self.max_norm is not None and (norm is None or not norm <= self.max_norm):
            raise RefusalError("norm", f"updates of norm {norm}; the policy allows {self.max_norm}")
        if self.min_noise is not None and (noise is None or not noise >= self.min_noise):
            raise RefusalError("noise", f"a noise multiplier of {noise}, below {self.min_noise}")
        shares = _number(_first(told, SHARES))
        if shares is not None and shares > terms.min_cohort:
            raise RefusalError(
                "noise", f"{shares:g} shares of noise in sums of as few as {terms.min_cohort} nodes"
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


NORM = "clip.norm"
"""Key under which `Clip` tells nodes the clipping norm."""

NOISE = ("skellam.noise-multiplier", "discrete-gaussian.noise-multiplier")
"""Keys under which layers of distributed noise tell nodes the noise multiplier of the sum."""


SHARES = ("skellam.shares", "discrete-gaussian.shares")
"""Keys under which they tell nodes into how many shares the noise is cut."""


def _first(told: Mapping[str, Any], names: Sequence[str]) -> object:
    return next((told[name] for name in names if name in told), None)


def fingerprint(identity: bytes) -> str:
    """SHA-256 of an identity in hex, as in a roster file."""
    return hashlib.sha256(identity).hexdigest()


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _fits(name: str, value: object) -> bool:
    if name in ("roster", "authority"):
        return isinstance(value, str)
    if name == "mode":
        return value in ("malicious", "semi-honest")
    if name == "bits":
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(isinstance(bits, int) for bits in value)
            and 1 <= value[0] <= value[1]
        )
    if name in ("max_norm", "min_noise"):
        return (_number(value) or 0) > 0
    return isinstance(value, int) and not isinstance(value, bool)


def _read_roster(path: Path) -> frozenset[str]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"the roster file {path} cannot be read: {error}") from error
    lines = [line for line in lines if not line[0].startswith("#")]
    for line in lines:
        if len(line) != 2 or len(line[1]) != 64:
            raise ConfigError(f"{path} has the line {' '.join(line)!r}; write NAME and a SHA-256")
    return frozenset(line[1].lower() for line in lines)


def _read_authority(path: Path) -> bytes:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the authority's certificate {path} cannot be read: {error}") from error
    return certificate.public_bytes(serialization.Encoding.DER)


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
