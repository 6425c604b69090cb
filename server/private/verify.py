"""Checking a certificate: who signed it, about what, for whom, and every number again."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from dp_accounting import GaussianDpEvent, NoOpDpEvent

from umbel.core.errors import ConfigError, UmbelError
from umbel.core.files import file_problems, sha256
from umbel.core.text import plain as plain_text
from umbel.privacy.budget.accounting import poisson, spent
from umbel.privacy.budget.events import RELATIONS, Charge
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import loads_strictly, plain, revived
from umbel.server.private.budget import combined, in_total
from umbel.server.private.certificate import (
    ADVERSARIES,
    FORMAT,
    event_rows,
    guarantee,
    hashes,
    signed_text,
    starts,
    total_row,
)
from umbel.server.private.coordinator_key import fingerprint, signed_by
from umbel.server.private.ledger import (
    Against,
    Entry,
    digest_of,
    members_of,
    opened,
    participation_of,
    read,
)
from umbel.server.private.seal import SEAL, pages, sealed_text
from umbel.server.private.shape import faults
from umbel.server.private.statements import STATEMENTS, kept, signed_of, summary_of
from umbel.strategies import statement

CLOSE = 1e-3
"""Another version of the accountant may differ in the last digits, relatively."""


@dataclass
class Checked:
    """What was found.

    Attributes:
        problems: what is wrong; empty if everything agrees.
        certificate: as it stands in the file; empty where it cannot be read.
        known: the key that it must be signed with was given, and it is that one.
    """

    problems: list[str] = field(default_factory=list)
    certificate: Mapping[str, Any] = field(default_factory=dict)
    known: bool = False

    def lines(self) -> Iterator[str]:
        """Who signed, about what, for whom."""
        key = self._text("key")
        if self.known:
            yield f"signed by the coordinator whose key was given (fingerprint {fingerprint(key)})"
        else:
            yield (
                f"the signer is unknown: signed with the key {key or 'of nobody'} (fingerprint "
                f"{fingerprint(key)}), and no --key that fits says whose that is"
            )
        model = self.certificate.get("model")
        digest = str(model.get("sha256", ""))[:16] if isinstance(model, Mapping) else ""
        yield (
            f"about: the model {digest}... of the run {self._text('run')!r}, population "
            f"{self._text('population')!r}"
        )
        yield from self._guarantees()

    def _guarantees(self) -> Iterator[str]:
        if self.problems:
            yield "for: what it says is not shown, because it does not hold"
            return
        scope = "this run" if self.certificate["scope"] == "run" else "all about the population"
        for row in self.certificate["guarantees"]:
            epsilon = revived(row["epsilon"])
            number = f"epsilon {epsilon:.4g}" if math.isfinite(epsilon) else "no protection"
            unit = "node" if row["unit"] == "client" else "record"
            yield (
                f"for: each {unit} ({row['relation']}), against {row['against']}: {number} at "
                f"delta {row['delta']:g}, counting {scope}"
            )

    def _text(self, name: str) -> str:
        value = self.certificate.get(name)
        return value if isinstance(value, str) else ""

    def to_json(self) -> dict[str, Any]:
        """For `umbel verify --json`."""
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "signer_known": self.known,
            "key": self._text("key"),
            "fingerprint": fingerprint(self._text("key")),
            "run": self._text("run"),
            "population": self._text("population"),
            "guarantees": [] if self.problems else self.certificate["guarantees"],
        }


def verify(run: Path, *, key: str | None = None) -> list[str]:
    """What is wrong with a run's certificate; see `check`."""
    return check(run, key=key).problems


def check(run: Path, *, key: str | None = None) -> Checked:
    """Check a run's certificate.

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
    checked = Checked()
    try:
        raw = loads_strictly(directory.certificate_path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("it is no JSON object")
        checked.certificate = raw
        for problem in _problems(directory, raw, key):
            checked.problems.append(problem)
        checked.known = key is not None and not checked.problems
    except UmbelError as error:
        checked.problems.append(str(error))
    # Whatever a forger writes there: the answer is that it does not hold, never a traceback.
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        checked.problems.append(f"certificate.json cannot be read: {said}")
    return checked


def schema() -> Mapping[str, Any]:
    """The JSON schema of certificates."""
    text = resources.files("umbel.server.private").joinpath("certificate.schema.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def of_another_format(raw: Mapping[str, Any]) -> str:
    """What to do with a certificate that this version does not read."""
    told = raw.get("versions")
    version = told.get("umbel") if isinstance(told, Mapping) else None
    issuer = f"Umbel {plain_text(str(version), 20)}" if version else "the version that issued it"
    return (
        f"certificate.json is of format {raw.get('format')!r}, and this version checks format "
        f"{FORMAT}: nothing of it was checked; check it with {issuer}. What its run has spent "
        "counts on: new runs read earlier ledgers"
    )


def _problems(run: RunDirectory, raw: Mapping[str, Any], key: str | None) -> Iterator[str]:
    if raw.get("format") != FORMAT:
        yield of_another_format(raw)
        return
    public = raw.get("key")
    if key is not None and key != public:
        yield "the certificate is signed with another key than the one given"
    if not signed_by(public, raw.get("signature"), signed_text(raw)):
        yield "the signature does not fit the certificate: it was changed after it was issued"
    odd = list(faults(raw, schema()))
    if odd:
        yield f"certificate.json cannot be read: {'; '.join(odd[:3])}"
        return
    certificate = revived(raw)
    yield from _file_problems(run, certificate)
    yield from _statement_problems(run, certificate)
    if certificate["mechanism"] is None:
        yield from _record_problems(run, certificate)
        return
    if certificate["ledger"] is None:
        yield "there is a mechanism and no ledger that it was charged to"
        return
    with opened(run.ledger_path) as database:
        rows = list(read(database, str(run.ledger_path)))
        members = digest_of(members_of(database))
        participation = participation_of(database, certificate["run"])
    yield from _ledger_problems(rows, certificate)
    yield from _table_problems(rows, members, participation, certificate)
    yield from _number_problems(rows, certificate)
    yield from _round_problems(run, rows, certificate)


# ---- files


def _file_problems(run: RunDirectory, certificate: Mapping[str, Any]) -> Iterator[str]:
    said, found = certificate["files"], hashes(run)
    if said["model.safetensors"] != certificate["model"]["sha256"]:
        yield "the certificate names two models"
    yield from file_problems(said, found, "certified", _certified)
    yield from _seal_problems(run, certificate)


def _certified(name: str) -> str:
    """What a file was when it was certified."""
    if name.startswith("model"):
        return "the model that the certificate is about"
    return "what it was when the run was certified"


def _seal_problems(run: RunDirectory, certificate: Mapping[str, Any]) -> Iterator[str]:
    path = run.path / SEAL
    if not path.is_file():
        yield f"{SEAL} is missing, so nobody vouches for {', '.join(pages(run)) or 'any page'}"
        return
    seal = loads_strictly(path.read_bytes())
    if not signed_by(certificate["key"], seal["signature"], sealed_text(seal)):
        yield f"{SEAL} is not signed by the coordinator that signed the certificate"
        return
    if seal["certificate"] != sha256(run.certificate_path):
        yield f"{SEAL} is of another certificate"
    found = pages(run)
    for name in sorted(found.keys() | seal["files"].keys()):
        if found.get(name) != seal["files"].get(name):
            yield f"{name} is not the one that the coordinator signed"


# ---- what nodes said


def _statement_problems(run: RunDirectory, certificate: Mapping[str, Any]) -> Iterator[str]:
    told = certificate["statements"]
    if told is None:
        if (run.path / STATEMENTS).is_file():
            yield f"the certificate says nothing of {STATEMENTS}"
        return
    if plain(told) != plain(summary_of(run)):
        yield f"the statements of the nodes are not those of {STATEMENTS}"
    runs = set()
    for line in kept(run):
        if line["statement"] is None:
            continue
        signed = signed_of(line)
        said = signed.statement()
        runs.add(said.run)
        if signed.is_signed and not statement.verify(signed):
            yield f"the statement of node {line['node']!r} is not signed with the key it names"
        if said.epsilon is not None:
            least = _least(said)
            if said.epsilon < least * (1 - CLOSE) - 1e-9:
                yield (
                    f"node {line['node']!r} states epsilon {said.epsilon:.6g}, but the noise that "
                    f"it states costs {least:.6g}"
                )
    if len(runs) > 1:
        yield f"the statements are of {len(runs)} runs"


def _least(said: statement.Statement) -> float:
    """What the reply alone that a statement was made for has cost."""
    if said.noise_multiplier <= 0:
        return math.inf
    relation = RELATIONS[said.relation]
    if said.mechanism == "dp-sgd":
        event = poisson(said.noise_multiplier, said.sampling_rate)
    elif said.mechanism == "local-gaussian":
        event = GaussianDpEvent(said.noise_multiplier)
    else:  # noise of many nodes: its cost depends on who came
        return 0.0
    return spent({Charge(event, relation): said.steps}, said.delta).epsilon


def _record_problems(run: RunDirectory, certificate: Mapping[str, Any]) -> Iterator[str]:
    told = certificate["statements"]
    if told is None:
        yield "there is neither a mechanism nor a statement of a node"
        return
    if certificate["provenance"] != run.config().get("provenance", []):
        yield "provenance is not what config.json says"
    for row in certificate["guarantees"]:
        if row["unit"] != "record":
            yield f"unit against {row['against']} is {row['unit']!r}, but it should be 'record'"
        if not same(row["epsilon"], told["epsilon"]):
            yield (
                f"epsilon against {row['against']} is {row['epsilon']}, but the nodes' statements "
                f"come to {told['epsilon']}"
            )
        if told["delta"] is not None and row["delta"] != told["delta"]:
            yield f"delta against {row['against']} is {row['delta']}, but nodes say {told['delta']}"
        if row["relation"] != told["relation"]:
            yield f"relation against {row['against']} is not that of the nodes' statements"


# ---- the ledger


def _ledger_problems(rows: Sequence[Entry], certificate: Mapping[str, Any]) -> Iterator[str]:
    said = certificate["ledger"]
    head = (len(rows), rows[-1].hash) if rows else (0, "")
    if head != (said["entries"], said["head"]):
        yield (
            f"the ledger has {head[0]} entries up to {head[1][:12]}, but the certificate was "
            f"issued for {said['entries']} up to {said['head'][:12]}"
        )
    foreign = [row.number for row in rows if not row.signed(certificate["key"])]
    if foreign:
        yield (
            f"entry {foreign[0]} of the ledger ({len(foreign)} in all) is not signed with the key "
            "of the certificate"
        )
    if rows and rows[0].body.get("population") != certificate["population"]:
        yield (
            f"the ledger is of the population {rows[0].body.get('population')!r}, the certificate "
            f"of {certificate['population']!r}"
        )
    own = _own(rows, certificate, "run")
    if not own:
        yield f"the ledger knows no run {certificate['run']!r}"
        return
    for name, value in certificate["mechanism"].items():
        if own[-1].get(name) != value:
            yield f"mechanism: {name} is {value!r}, but the ledger says {own[-1].get(name)!r}"
    if certificate["provenance"] != starts(own):
        yield "provenance: the run did not start from what the certificate says"


def _own(
    rows: Sequence[Entry], certificate: Mapping[str, Any], kind: str
) -> list[Mapping[str, Any]]:
    return [
        row.body
        for row in rows
        if row.body["kind"] == kind and row.body.get("run") == certificate["run"]
    ]


def _table_problems(
    rows: Sequence[Entry], members: str, participation: str, certificate: Mapping[str, Any]
) -> Iterator[str]:
    admitted = [row.body for row in rows if row.body["kind"] == "nodes"]
    if not admitted or admitted[-1].get("members") != members:
        yield "the ledger's list of nodes is not the one that was signed"
    if participation != certificate["ledger"]["participation"]:
        yield "the ledger's table of participations is not the one that was certified"
    ended = _own(rows, certificate, "end")
    if not ended or ended[-1].get("model") != certificate["model"]["sha256"]:
        yield "the ledger does not say that the run ended with this model"


def charges_in(rows: Sequence[Entry], run: str | None = None) -> dict[Against, Counter[Charge]]:
    """All charges of a ledger, or those of one run, by adversary."""
    found: dict[Against, Counter[Charge]] = {who: Counter() for who in ADVERSARIES}
    for row in rows:
        if row.body["kind"] == "charge" and run in (None, row.body["run"]):
            charge = row.charge()
            if not (isinstance(charge.event, NoOpDpEvent) and charge.slack == 0):
                found[row.body["against"]][charge] += 1
    return found


def _number_problems(rows: Sequence[Entry], certificate: Mapping[str, Any]) -> Iterator[str]:
    scope = certificate["run"] if certificate["scope"] == "run" else None
    charges = charges_in(rows, scope)
    listed = [row for who in ADVERSARIES for row in event_rows(charges[who], who)]
    if plain(listed) != plain(certificate["events"]):
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
        if not same(row["epsilon"], again["epsilon"]):
            yield (
                f"epsilon against {who} is {row['epsilon']}, but the ledger adds up to "
                f"{again['epsilon']:.6g}"
            )
        checks = (row["epsilon_rdp"], again["epsilon_rdp"])
        if (None in checks and checks != (None, None)) or not same(*(c or 0.0 for c in checks)):
            yield f"epsilon_rdp against {who} is {checks[0]}, but it should be {checks[1]}"
        for name in ("unit", "relation", "sampling"):
            if row[name] != again[name]:
                yield f"{name} against {who} is {row[name]!r}, but it should be {again[name]!r}"
    yield from _total_problems(rows, certificate)
    if certificate["mechanism"]["insecure"] and not math.isinf(
        said.get("model-user", {"epsilon": math.inf})["epsilon"]
    ):
        yield "the noise was seeded, so epsilon cannot be finite"


def _total_problems(rows: Sequence[Entry], certificate: Mapping[str, Any]) -> Iterator[str]:
    charges = charges_in(rows)
    said = {row["against"]: row for row in certificate["total"]}
    for who in ADVERSARIES:
        if who not in said:
            yield f"there is no total against {who}"
            continue
        result = in_total(
            charges["server"], charges["model-user"], who, certificate["mechanism"]["delta"]
        )
        again = total_row(result, who)
        if not same(said[who]["epsilon"], again["epsilon"]):
            yield (
                f"the population's total against {who} is {said[who]['epsilon']}, but its ledger "
                f"adds up to {again['epsilon']:.6g}"
            )
        if said[who]["delta"] != again["delta"] or said[who]["relation"] != again["relation"]:
            yield f"the population's total against {who} is not of that delta and relation"


def same(one: float, other: float) -> bool:
    """Whether two epsilons agree but for the last digits of another accountant's version."""
    if math.isinf(one) or math.isinf(other):
        return one == other
    return abs(one - other) <= CLOSE * max(abs(one), abs(other)) + 1e-9


def _round_problems(
    run: RunDirectory, rows: Sequence[Entry], certificate: Mapping[str, Any]
) -> Iterator[str]:
    """Every round that was reported must have been paid for."""
    main = next(
        (
            row["epsilon"]
            for row in certificate["guarantees"]
            if row["against"] == certificate["mechanism"]["against"]
        ),
        None,
    )
    result = run.result().get("epsilon")
    if result is not None and (main is None or not same(result, main)):
        yield f"result.json says epsilon {result}, the certificate {main}"
    if certificate["mechanism"]["against"] == "server":
        return
    paid = {body.get("round") for body in _own(rows, certificate, "charge")}
    for line in run.rounds():
        number = line.get("round", 0)
        if number and "aborted" not in line and number not in paid:
            yield f"round {number} is in metrics.jsonl, but the ledger has no charge for it"
