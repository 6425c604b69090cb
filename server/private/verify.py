"""Checking a certificate: every number again, from the ledger."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dp_accounting import NoOpDpEvent

from umbel.privacy.budget.events import Charge
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.budget import combined
from umbel.server.private.certificate import (
    ADVERSARIES,
    event_rows,
    guarantee,
    sha256,
    signed_text,
)
from umbel.server.private.coordinator_key import signed_by
from umbel.server.private.ledger import Against, Entry, entries
from umbel.strategies.errors import ConfigError, UmbelError

CLOSE = 1e-3
"""Another version of the accountant may differ in the last digits, relatively."""


def verify(run: Path, *, key: str | None = None) -> list[str]:
    """What is wrong with a run's certificate; empty if everything agrees.

    Args:
        run: the run directory.
        key: the coordinator's public key in base64, as it was published; None takes the one in
            the certificate, which then only shows that the certificate is whole.

    Raises:
        ConfigError: there is no run, or it made no promise.
    """
    directory = RunDirectory.open(run)
    if not directory.certificate_path.is_file():
        raise ConfigError(
            f"{run} has no certificate.json; a run without epsilon promises no privacy, so there "
            "is nothing to verify"
        )
    try:
        certificate = json.loads(directory.certificate_path.read_text(encoding="utf-8"))
        return list(_problems(directory, certificate, key))
    except UmbelError as error:
        return [str(error)]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return [f"certificate.json cannot be read: {type(error).__name__}: {error}"]


def _problems(run: RunDirectory, certificate: Mapping[str, Any], key: str | None) -> Iterator[str]:
    public = certificate["key"]
    if key is not None and key != public:
        yield "the certificate is signed with another key than the one given"
    if not signed_by(public, certificate["signature"], signed_text(certificate)):
        yield "the signature does not fit the certificate: it was changed after it was issued"
    if not run.model_path.is_file():
        yield f"{run.model_path.name} is missing"
    elif sha256(run.model_path) != certificate["model"]["sha256"]:
        yield f"{run.model_path.name} is not the model that the certificate is about"
    rows = entries(run.ledger_path)
    yield from _ledger_problems(rows, certificate)
    yield from _number_problems(rows, certificate)
    yield from _round_problems(run, rows, certificate)


def _ledger_problems(rows: Sequence[Entry], certificate: Mapping[str, Any]) -> Iterator[str]:
    said = certificate["ledger"]
    head = (len(rows), rows[-1].hash) if rows else (0, "")
    if head != (said["entries"], said["head"]):
        yield (
            f"the ledger has {head[0]} entries up to {head[1][:12]}, but the certificate was "
            f"issued for {said['entries']} up to {said['head'][:12]}"
        )
    if rows and rows[0].body.get("population") != certificate["population"]:
        yield (
            f"the ledger is of the population {rows[0].body.get('population')!r}, the certificate "
            f"of {certificate['population']!r}"
        )
    begun = [row.body for row in rows if row.body["kind"] == "run"]
    own = [body for body in begun if body["run"] == certificate["run"]]
    if not own:
        yield f"the ledger knows no run {certificate['run']!r}"
    else:
        last = own[-1]
        for name, value in certificate["mechanism"].items():
            if last.get(name) != value:
                yield f"mechanism: {name} is {value!r}, but the ledger says {last.get(name)!r}"


def charges_in(rows: Sequence[Entry]) -> dict[Against, Counter[Charge]]:
    """All charges of a ledger, by adversary."""
    found: dict[Against, Counter[Charge]] = {who: Counter() for who in ADVERSARIES}
    for row in rows:
        if row.body["kind"] == "charge":
            charge = row.charge()
            if not (isinstance(charge.event, NoOpDpEvent) and charge.slack == 0):
                found[row.body["against"]][charge] += 1
    return found


def _number_problems(rows: Sequence[Entry], certificate: Mapping[str, Any]) -> Iterator[str]:
    charges = charges_in(rows)
    listed = [row for who in ADVERSARIES for row in event_rows(charges[who], who)]
    if listed != certificate["events"]:
        yield "the list of events is not what the ledger adds up to"
    said = {row["against"]: row for row in certificate["guarantees"]}
    for who in ADVERSARIES:
        if who not in said:
            yield f"there is no guarantee against {who}"
            continue
        row = said[who]
        result = combined(
            charges["server"], charges["model-user"], who, row["delta"], cross_check=True
        )
        again = guarantee(result, who, certificate["mechanism"])
        if not _same(row["epsilon"], again["epsilon"]):
            yield (
                f"epsilon against {who} is {row['epsilon']}, but the ledger adds up to "
                f"{again['epsilon']:.6g}"
            )
        checks = (row["epsilon_rdp"], again["epsilon_rdp"])
        if (None in checks and checks != (None, None)) or not _same(*(c or 0.0 for c in checks)):
            yield f"epsilon_rdp against {who} is {checks[0]}, but it should be {checks[1]}"
        for name in ("unit", "relation", "sampling"):
            if row[name] != again[name]:
                yield f"{name} against {who} is {row[name]!r}, but it should be {again[name]!r}"
    if certificate["mechanism"]["insecure"] and not math.isinf(said["model-user"]["epsilon"]):
        yield "the noise was seeded, so epsilon cannot be finite"


def _same(one: float, other: float) -> bool:
    if math.isinf(one) or math.isinf(other):
        return one == other
    return abs(one - other) <= CLOSE * max(abs(one), abs(other)) + 1e-9


def _round_problems(
    run: RunDirectory, rows: Sequence[Entry], certificate: Mapping[str, Any]
) -> Iterator[str]:
    """Every round that was reported must have been paid for."""
    if certificate["mechanism"]["against"] == "server":
        return
    paid = {
        row.body.get("round")
        for row in rows
        if row.body["kind"] == "charge" and row.body["run"] == certificate["run"]
    }
    for line in run.rounds():
        number = line.get("round", 0)
        if number and "aborted" not in line and number not in paid:
            yield f"round {number} is in metrics.jsonl, but the ledger has no charge for it"
    result = run.result().get("epsilon")
    main = next(
        row["epsilon"]
        for row in certificate["guarantees"]
        if row["against"] == certificate["mechanism"]["against"]
    )
    if result is not None and not _same(result, main):
        yield f"result.json says epsilon {result}, the certificate {main}"
