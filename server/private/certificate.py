"""The certificate of a run: what was done, what it cost, and how to check both.

    certificate.json
        guarantees     one an adversary: epsilon, delta, unit, relation, sampling, accountant
        total          the same over everything that the ledger knows about the population
        mechanism      the layers' parameters, the cohort, the plan
        events         every kind of release, how often it happened, against whom
        statements     what nodes have signed of their own budgets, one a node
        provenance     SHA-256 of the model that each start of the run began from
        files          SHA-256 of every file of the run that people read, the model among them
        ledger         entries, last hash, and digests of its tables
        key, signature of the coordinator, Ed25519 over everything else

It is strict JSON; infinity is the text "Infinity". Its form is published as a JSON schema
(`certificate.schema.json` beside this file). `umbel verify` recomputes all of it from the ledger
and the statements (`umbel.server.private.verify`). The report, its drawings and `result.json`
are made after it; `seal.json` covers them (`umbel.server.private.seal`).
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from umbel.core.files import sha256
from umbel.privacy.budget.accounting import Spent
from umbel.privacy.budget.events import ZERO_OUT, Charge, relation_name, to_json
from umbel.server.output.rundir import RunDirectory, versions
from umbel.server.output.strict import canonical
from umbel.server.private.budget import Budget
from umbel.server.private.coordinator_key import public_text, sign
from umbel.server.private.ledger import Against
from umbel.server.private.model_card import write_model_card
from umbel.server.private.plan import APP, PrivacyPlan
from umbel.server.private.population import Elsewhere, LedgerLocation
from umbel.server.private.statements import STATEMENTS, summary_of

FORMAT = 2
ADVERSARIES: tuple[Against, ...] = ("model-user", "server")
CARD = "MODEL_CARD.md"
COVERED = ("config.json", "metrics.jsonl", "nodes.jsonl", "model.safetensors", CARD, STATEMENTS)
"""The files that a certificate is about, as far as a run has them."""
COVERS = (
    "the model and every model of the run that was sent out; not the operator's own files "
    "(metrics.jsonl, log.txt, checkpoint/, ledger.sqlite), which name nodes and count replies"
)


def client_body(
    run: RunDirectory,
    plan: PrivacyPlan,
    budget: Budget,
    place: LedgerLocation,
    elsewhere: Sequence[Elsewhere],
) -> dict[str, Any]:
    """What a certificate says of a run whose unit is a node. The model has been written already.

    The run's end is written into the ledger, which is complete with that.
    """
    description, ledger = plan.description(), budget.ledger
    ledger.end(budget.run, model=sha256(run.model_path))
    number, head = ledger.head
    scope = budget.run if place.scope == "run" else None
    charges = {who: ledger.spent(who, scope) for who in ADVERSARIES}
    return _common(run, budget.run, place.population) | {
        "scope": place.scope,
        "provenance": starts(ledger.runs(budget.run)),
        "elsewhere": [other.to_json() for other in elsewhere],
        "guarantees": [
            guarantee(budget.spent(who, cross_check=True), who, description) for who in ADVERSARIES
        ],
        "total": [total_row(budget.total(who), who) for who in ADVERSARIES],
        "mechanism": description,
        "events": [row for who in ADVERSARIES for row in event_rows(charges[who], who)],
        "ledger": {
            "file": run.ledger_path.name,
            "entries": number,
            "head": head,
            "participation": ledger.participation(budget.run),
        },
    }


def record_body(run: RunDirectory, name: str, population: str, delta: float) -> dict[str, Any]:
    """What a certificate says of a run in which nodes protect their own records.

    Args:
        run: its directory, with the nodes' statements.
        name: of the run.
        population: as the coordinator calls it.
        delta: of the guarantee where no statement names one.
    """
    told = summary_of(run)
    row = {
        "epsilon": told["epsilon"],
        "delta": told["delta"] or delta,
        "unit": "record",
        "relation": told["relation"],
        "sampling": "by each node",
        "accountant": "of each node",
        "epsilon_rdp": None,
    }
    return _common(run, name, population) | {
        "scope": "population",
        "elsewhere": [],
        "guarantees": [{"against": who, **row} for who in ADVERSARIES],
        "total": [],
        "mechanism": None,
        "events": [],
        "ledger": None,
    }


def issue(
    run: RunDirectory,
    body: Mapping[str, Any],
    key: Ed25519PrivateKey,
    metrics: Mapping[str, float],
) -> dict[str, Any]:
    """Write the model card and `certificate.json` for a run that has ended, and return the latter.

    Args:
        run: everything else that the certificate covers is in its directory.
        body: `client_body` or `record_body`.
        key: the coordinator's.
        metrics: of the final evaluation, for the card.
    """
    write_model_card(run, body, metrics, public_text(key))
    certificate: dict[str, Any] = {**body, "files": hashes(run), "key": public_text(key)}
    certificate["signature"] = sign(key, signed_text(certificate))
    run.write_json(run.certificate_path.name, certificate)
    return certificate


def _common(run: RunDirectory, name: str, population: str) -> dict[str, Any]:
    told = summary_of(run)
    return {
        "format": FORMAT,
        "run": name,
        "population": population,
        "issued": datetime.now(UTC).isoformat(timespec="seconds"),
        "secure_sum": secure_sum(run),
        "statements": told if told["nodes"] or told["without"] else None,
        "provenance": run.config().get("provenance", []),
        "model": {"file": run.model_path.name, "sha256": sha256(run.model_path)},
        "covers": COVERS,
        "versions": versions(),
    }


def starts(begun: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each start of a run began from, of the ledger's lines about it."""
    return [
        {"round": body["started_after"], "model": body["started_from"], "time": body["time"]}
        for body in begun
    ]


def hashes(run: RunDirectory) -> dict[str, str]:
    """SHA-256 of the files that a certificate covers."""
    return {name: sha256(run.path / name) for name in COVERED if (run.path / name).is_file()}


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
    if result.relation is ZERO_OUT or str(sampling).startswith(APP):
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


def total_row(result: Spent, against: Against) -> dict[str, Any]:
    """What everything that the ledger knows about a population comes to."""
    return {
        "against": against,
        "epsilon": result.epsilon,
        "delta": result.delta,
        "relation": relation_name(result.relation),
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
    return sorted(rows, key=canonical)


def signed_text(certificate: Mapping[str, Any]) -> bytes:
    """What the signature is over: everything but itself, in one form only."""
    rest = {name: value for name, value in certificate.items() if name != "signature"}
    return canonical(rest).encode()
