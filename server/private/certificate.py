"""The certificate of a private run: what was done, what it cost, and how to check both.

    certificate.json
        guarantees     one an adversary: epsilon, delta, unit, relation, sampling, accountant
        mechanism      the layers' parameters, the cohort, the plan
        events         every kind of release, how often it happened, against whom
        model, ledger  SHA-256 of the model; entries and last hash of the ledger
        key, signature of the coordinator, Ed25519 over everything else

`umbel verify` recomputes all of it from the ledger (`umbel.server.private.verify`).
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.privacy.budget.accounting import Spent
from umbel.privacy.budget.events import ZERO_OUT, Charge, relation_name, to_json
from umbel.server.output.rundir import RunDirectory, versions
from umbel.server.private.budget import Budget
from umbel.server.private.coordinator_key import public_text, sign
from umbel.server.private.ledger import Against
from umbel.server.private.plan import Plan

FORMAT = 1
ADVERSARIES: tuple[Against, ...] = ("model-user", "server")


def issue(run: RunDirectory, plan: Plan, budget: Budget, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Write `certificate.json` for a run that has ended, and return it.

    The model must have been written already; the ledger is complete.
    """
    description = plan.description()
    number, head = budget.ledger.head
    charges = {who: budget.ledger.spent(who) for who in ADVERSARIES}
    certificate: dict[str, Any] = {
        "format": FORMAT,
        "run": budget.run,
        "population": budget.ledger.population,
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "guarantees": [
            guarantee(budget.spent(who, cross_check=True), who, description) for who in ADVERSARIES
        ],
        "mechanism": description,
        "secure_sum": secure_sum(run),
        "events": [row for who in ADVERSARIES for row in event_rows(charges[who], who)],
        "model": {"file": run.model_path.name, "sha256": sha256(run.model_path)},
        "ledger": {"file": run.ledger_path.name, "entries": number, "head": head},
        "covers": (
            "the model and every model of the run that was sent out; not the operator's own "
            "files (metrics.jsonl, log.txt, checkpoint/, ledger.sqlite), which name nodes and "
            "count replies"
        ),
        "versions": versions(),
        "key": public_text(key),
    }
    certificate["signature"] = sign(key, signed_text(certificate))
    run.write_json(run.certificate_path.name, certificate)
    return certificate


def secure_sum(run: RunDirectory) -> dict[str, Any] | None:
    """How the secure sums of a run were made, each figure the weakest of all rounds."""
    told = [line["secure"] for line in run.rounds() if line.get("secure")]
    if not told:
        return None
    weaker = {
        "mode": ("semi-honest", "malicious"),
        "identities": ("first-use", "roster-file", "authority"),
    }
    found: dict[str, Any] = {
        name: min((one[name] for one in told), key=order.index) for name, order in weaker.items()
    }
    smallest = {name: min(one[name] for one in told) for name in ("nodes", "neighbours", "quorum")}
    return found | smallest | {"rounds": len(told), "audited": False}


def guarantee(result: Spent, against: Against, description: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the certificate: what holds against one adversary."""
    sampling = description["cohort"] if against == "model-user" else "known to the server"
    if result.relation is ZERO_OUT:
        sampling = "not counted"
    return {
        "against": against,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "unit": description["unit"],
        "relation": relation_name(result.relation),
        "sampling": sampling,
        "accountant": result.accountant,
        "epsilon_rdp": result.cross_check,
    }


def event_rows(charges: Counter[Charge], against: Against) -> list[dict[str, Any]]:
    """Releases by kind, in a fixed order."""
    rows = [
        {
            "against": against,
            "event": to_json(charge.event),
            "relation": relation_name(charge.relation),
            "slack": charge.slack,
            "times": times,
        }
        for charge, times in charges.items()
    ]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def signed_text(certificate: Mapping[str, Any]) -> bytes:
    """What the signature is over: everything but itself, in one form only."""
    rest = {name: value for name, value in certificate.items() if name != "signature"}
    return json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()


def sha256(path: Path) -> str:
    """The hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
