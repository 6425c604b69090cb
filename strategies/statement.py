"""What a node says, over its signature, that its data have been charged: one a protected reply.

    node     ledger charged -> statement -> signature -> beside its reply
    server   reads it, keeps it, and sets it beside its own ledger

In a reply's content the ConfigRecord `umbel.statement` has three fields, all of them bytes:

    statement   canonical JSON (UTF-8, sorted keys, no spaces, no NaN or Infinity)
    signature   over the bytes "umbel-statement-1:" followed by the statement's;
                empty where the node has no key (a simulated one): the statement is then unsigned
    key         the node's public key, DER (SubjectPublicKeyInfo; Ed25519 or P-256)

A reply that was charged twice (noise on the node over DP-SGD) has a second one, with `.2` behind
the record's name. The fields of the JSON are those of `Statement` with dashes for underscores.
A statement of a secure sum says what will have left once the sum is made: it travels with the
node's first message. A reply that is lost takes its statement along, so a chain can have gaps:
`previous` tells them apart from statements that somebody changed or made up.
"""

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from umbel.core.contents import find_record
from umbel.privacy.masking import keys

RECORD = "umbel.statement"
"""Name of the record in a reply's content."""
VERSION = 1
UNITS = ("record", "node")
RELATIONS = ("add-or-remove-one", "replace-one", "zero-out-one")
_CONTEXT = b"umbel-statement-1:"
"""Before what is signed: no signature of the link or of a secure sum is over such bytes."""
_MOST = 4
"""More statements are in no reply."""
_LONGEST = 1 << 14


class StatementError(ValueError):
    """Something that is called a statement and is none."""


@dataclass(frozen=True, kw_only=True)
class Statement:
    """What a node's ledger holds once a reply was charged.

    Attributes:
        node: the node's id in the federation.
        unit: whose presence is hidden: one `record` of the node, or the `node` as a whole.
        mechanism: `dp-sgd`, `local-gaussian`, `skellam` or `discrete-gaussian`.
        epsilon: spent so far, this reply included, over all runs that count for the population
            or for the node's data, whichever is more; None (null) is without bound.
        run_epsilon: of that, what this run has spent.
        limit: the epsilon beyond which the node gives no answer; None is without.
        delta: of all three.
        relation: which data sets are neighbours: add-or-remove-one, replace-one, zero-out-one.
        noise_multiplier: of this reply: standard deviation of the noise over the norm.
        sampling_rate: of each record in each step; 1 where nothing is sampled.
        steps: releases of that kind in this reply.
        norm: the longest contribution of one unit.
        population: as the run named it.
        run: the run's id, as the node was told it.
        round: from 1.
        participations: replies that were charged so far, counted as epsilon is.
        previous: SHA-256 in hex of the node's statement before, of the same run, unit and
            population (in a run's first one: of the population's last); empty for the first.
    """

    node: str
    unit: str
    mechanism: str
    epsilon: float | None
    run_epsilon: float | None
    limit: float | None
    delta: float
    relation: str
    noise_multiplier: float
    sampling_rate: float
    steps: int
    norm: float
    population: str
    run: str
    round: int
    participations: int
    previous: str = ""
    version: int = VERSION

    def canonical(self) -> bytes:
        """The bytes that are signed and hashed.

        Raises:
            StatementError: a value that no statement can have.
        """
        _check(self)
        plain = {field.name.replace("_", "-"): getattr(self, field.name) for field in fields(self)}
        return _bytes(plain)


@dataclass(frozen=True)
class Signed:
    """A statement as it travels.

    Attributes:
        body: the canonical bytes.
        signature: over them; empty if the node has no key.
        key: DER of the node's public key; empty likewise.
    """

    body: bytes
    signature: bytes = b""
    key: bytes = b""

    @property
    def digest(self) -> str:
        """What the next statement calls `previous`."""
        return hashlib.sha256(self.body).hexdigest()

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature; `verify` says whether it is good."""
        return bool(self.signature)

    def statement(self) -> Statement:
        """What it says.

        Raises:
            StatementError: the bytes are no canonical statement.
        """
        return parse(self.body)


def make(statement: Statement, key: keys.SigningKey | None) -> Signed:
    """A statement, signed where there is a key.

    Raises:
        StatementError: a value that no statement can have.
    """
    body = statement.canonical()
    if key is None:
        return Signed(body)
    return Signed(body, keys.sign(key, _CONTEXT + body), keys.public_identity(key))


def verify(signed: Signed, key: bytes | None = None) -> bool:
    """Whether it is signed, by the key that it names, which is `key` if one is given.

    Whose key that is, the caller must know: from the federation's enrolment, or a roster.
    """
    if not signed.signature or (key is not None and key != signed.key):
        return False
    return keys.verify(signed.key, _CONTEXT + signed.body, signed.signature)


def attach(content: RecordDict, statements: Iterable[Signed]) -> None:
    """Put statements into a reply's content."""
    for number, signed in enumerate(statements, 1):
        content[_name(number)] = ConfigRecord(
            {"statement": signed.body, "signature": signed.signature, "key": signed.key}
        )


def read(content: RecordDict) -> list[Signed]:
    """The statements of a reply; empty where there are none. Signatures are not checked here.

    Raises:
        StatementError: a record has that name and another form, or its statement another than
            `Statement`'s.
    """
    found = []
    for number in range(1, _MOST + 1):
        if _name(number) not in content:
            break
        record = find_record(content, _name(number), ConfigRecord) or ConfigRecord()
        parts = [record.get(name) for name in ("statement", "signature", "key")]
        body, signature, key = (part if isinstance(part, bytes) else None for part in parts)
        if body is None or signature is None or key is None or len(record) != len(parts):
            raise StatementError(f"{_name(number)} must be three fields of bytes")
        parse(body)
        found.append(Signed(body, signature, key))
    return found


def parse(body: bytes) -> Statement:
    """What canonical bytes say.

    Raises:
        StatementError: they are not canonical, or a field is missing, unknown or out of range.
    """
    try:
        if len(body) > _LONGEST:
            raise StatementError(f"a statement of {len(body)} bytes is none")
        plain = json.loads(body, parse_constant=_no_constant)
        if not isinstance(plain, dict) or _bytes(plain) != body:
            raise StatementError("it is not written in the canonical way")
        names = {field.name.replace("_", "-"): field.name for field in fields(Statement)}
        if plain.keys() != names.keys():
            odd = sorted(plain.keys() ^ names.keys())
            raise StatementError(f"its fields are not those of version {VERSION}: {odd[:5]}")
        statement = Statement(**{names[name]: value for name, value in plain.items()})
    except (ValueError, RecursionError) as problem:
        if isinstance(problem, StatementError):
            raise
        raise StatementError(f"a statement cannot be read: {problem}") from problem
    _check(statement)
    return statement


def _name(number: int) -> str:
    return RECORD if number == 1 else f"{RECORD}.{number}"


def _bytes(plain: Any) -> bytes:
    return json.dumps(
        plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def _no_constant(name: str) -> float:
    raise StatementError(f"{name} is not JSON")


def _check(it: Statement) -> None:
    """Every field, by name."""
    texts = ("node", "mechanism", "population", "run", "previous")
    good = {name: isinstance(getattr(it, name), str) for name in texts}
    good["version"] = _whole(it.version) and it.version == VERSION
    good["unit"] = it.unit in UNITS
    good["relation"] = it.relation in RELATIONS
    for name in ("epsilon", "run_epsilon", "limit"):
        value = getattr(it, name)
        good[name] = value is None or (_real(value) and value >= 0)
    good["delta"] = _real(it.delta) and 0 < it.delta < 1
    for name in ("noise_multiplier", "norm"):
        good[name] = _real(getattr(it, name)) and getattr(it, name) >= 0
    good["sampling_rate"] = _real(it.sampling_rate) and 0 < it.sampling_rate <= 1
    for name, least in (("steps", 1), ("round", 0), ("participations", 1)):
        good[name] = _whole(getattr(it, name)) and getattr(it, name) >= least
    good["previous"] = good["previous"] and (
        it.previous == ""
        or (len(it.previous) == 64 and set(it.previous) <= set("0123456789abcdef"))
    )
    for name, is_good in good.items():
        if not is_good:
            raise StatementError(
                f"a statement's {name.replace('_', '-')} cannot be {getattr(it, name)!r}"
            )


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
