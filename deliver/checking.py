"""`umbel verify` of a delivered folder: which claims of the run hold for this file, and why.

files         every one is what `delivery.json` says, which the coordinator signed
certificate   signed, about the model in `claims/`; its epsilons computed again from its events
origin        the numbers in the delivered file are those of that model, rounded at most
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel.core.files import file_problems, sha256
from umbel.deliver.claims import certified_model, delivered_text
from umbel.deliver.parcel import CLAIMS, contents, read_parcel, steps_of
from umbel.deliver.tensors import origin_of
from umbel.privacy.budget.events import RELATIONS, Charge, from_json
from umbel.server.output.strict import loads_strictly, revived
from umbel.server.private.budget import combined
from umbel.server.private.certificate import ADVERSARIES, FORMAT, guarantee, signed_text
from umbel.server.private.coordinator_key import fingerprint, signed_by
from umbel.server.private.ledger import Against
from umbel.server.private.shape import faults
from umbel.server.private.verify import same, schema

ZEROING = ("prune",)
COPIED = ("export", "quantize-dynamic", "quantize-static", *ZEROING)
"""Steps after which the run's own numbers can still be seen in a file."""


@dataclass
class Delivered:
    """What was found.

    Attributes:
        problems: what is wrong; empty if everything agrees.
        claims: sentences that hold, each with how that is known.
        delivery: what `delivery.json` says.
        certificate: of the run; None where it promised nothing.
        known: the key that it must be signed with was given, and it is that one.
    """

    delivery: Mapping[str, Any]
    problems: list[str] = field(default_factory=list)
    claims: list[str] = field(default_factory=list)
    certificate: Mapping[str, Any] | None = None
    known: bool = False

    def lines(self) -> Iterator[str]:
        """About what, and which claims hold."""
        yield (
            f"about: {self.delivery['file']} ({self.delivery['form']}), made of the model "
            f"{str(self.delivery['model'])[:16]}... of the run {self.delivery['run']!r}"
        )
        for step in steps_of(self.delivery):
            yield f"step: {step.said()}"
        yield from self.claims

    def to_json(self) -> dict[str, Any]:
        """For `umbel verify --json`."""
        sound = self.certificate is not None and not self.problems
        return {
            "ok": not self.problems,
            "problems": self.problems,
            "signer_known": self.known,
            "run": self.delivery["run"],
            "steps": self.delivery["steps"],
            "claims": self.claims,
            "guarantees": self.certificate["guarantees"] if sound and self.certificate else [],
        }


def check_delivery(folder: Path, *, key: str | None = None) -> Delivered:
    """Check a delivered folder.

    Args:
        folder: that `umbel export` or `umbel compress` made.
        key: the coordinator's public key in base64, as it was published.

    Raises:
        ConfigError: it is no such folder.
    """
    checked = Delivered(read_parcel(folder))
    checked.problems += _file_problems(folder, checked.delivery)
    _check_certificate(folder, checked, key)
    if not checked.problems:
        _check_origin(folder, checked)
    checked.known = key is not None and not checked.problems
    return checked


def _file_problems(folder: Path, delivery: Mapping[str, Any]) -> Iterator[str]:
    said, found = delivery["files"], contents(folder)
    was = "what it was when it was delivered"
    yield from file_problems(said, found, "delivered", lambda _: was)
    model = certified_model(folder)
    if model.is_file() and sha256(model) != delivery["model"]:
        yield f"{CLAIMS}/{model.name} is not the model that this was made of"
    if delivery["file"] not in said:
        yield f"the model's file {delivery['file']} is not among the files that were delivered"


def _check_certificate(folder: Path, checked: Delivered, key: str | None) -> None:
    path = folder / CLAIMS / "certificate.json"
    delivery = checked.delivery
    if not path.is_file():
        checked.claims.append("no claim: the run promised no privacy")
        if key is not None:
            checked.problems.append("there is no certificate, so nobody's key signed this")
        return
    try:
        raw = loads_strictly(path.read_bytes())
        checked.problems += _certificate_problems(folder, raw, key, delivery)
        if not checked.problems:
            checked.certificate = revived(raw)
            checked.claims += _guarantees(checked.certificate, raw["key"])
    # Whatever a forger writes there: the answer is that it does not hold, never a traceback.
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        checked.problems.append(f"certificate.json cannot be read: {said}")


def _certificate_problems(
    folder: Path, raw: Any, key: str | None, delivery: Mapping[str, Any]
) -> Iterator[str]:
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        yield f"certificate.json is not of format {FORMAT}, which this version checks"
        return
    if key is not None and key != raw.get("key"):
        yield "the certificate is signed with another key than the one given"
    if not signed_by(raw.get("key"), raw.get("signature"), signed_text(raw)):
        yield "the signature does not fit the certificate: it was changed after it was issued"
    odd = list(faults(raw, schema()))
    if odd:
        yield f"certificate.json cannot be read: {'; '.join(odd[:3])}"
        return
    certificate = revived(raw)
    if certificate["model"]["sha256"] != delivery["model"]:
        yield "the certificate is about another model than the one that this was made of"
    card = folder / CLAIMS / "MODEL_CARD.md"
    if card.is_file() and sha256(card) != certificate["files"].get(card.name):
        yield f"{CLAIMS}/{card.name} is not the card that was certified"
    if "signature" not in delivery:
        yield "nobody signed the list of steps, so nothing says what was done to the model"
    elif delivery.get("key") != raw["key"]:
        yield "the list of steps is signed by another coordinator than the certificate"
    else:
        body = {name: value for name, value in delivery.items() if name != "signature"}
        if not signed_by(raw["key"], delivery["signature"], delivered_text(body)):
            yield "the list of steps was changed after it was signed"
    yield from _number_problems(certificate)


def _number_problems(certificate: Mapping[str, Any]) -> Iterator[str]:
    if certificate["mechanism"] is None:
        told = certificate["statements"]["nodes"]
        largest = max((row["epsilon"] for row in told if row["unit"] == "record"), default=None)
        for row in certificate["guarantees"]:
            without = certificate["statements"]["without"]
            again = float("inf") if without or largest is None else largest
            if not same(row["epsilon"], again):
                yield (
                    f"epsilon against {row['against']} is {row['epsilon']}, but the nodes' "
                    f"statements come to {again}"
                )
        return
    charges: dict[Against, Counter[Charge]] = {who: Counter() for who in ADVERSARIES}
    for row in certificate["events"]:
        charge = Charge(from_json(row["event"]), RELATIONS[row["relation"]], row["slack"])
        charges[row["against"]][charge] += row["times"]
    told = {row["against"]: row for row in certificate["guarantees"]}
    for who in ADVERSARIES:
        if who not in told:
            yield f"there is no guarantee against {who}"
            continue
        row = told[who]
        result = combined(charges["server"], charges["model-user"], who, row["delta"])
        again = guarantee(result, who, certificate["mechanism"])
        if not same(row["epsilon"], again["epsilon"]):
            yield (
                f"epsilon against {who} is {row['epsilon']}, but the events of the certificate "
                f"come to {again['epsilon']:.6g}"
            )
        for name in ("unit", "relation", "sampling"):
            if row[name] != again[name]:
                yield f"{name} against {who} is {row[name]!r}, but it should be {again[name]!r}"
    seeded = certificate["mechanism"]["insecure"]
    if seeded and told.get("model-user", {}).get("epsilon") != float("inf"):
        yield "the noise was seeded, so epsilon cannot be finite"


def _guarantees(certificate: Mapping[str, Any], key: str) -> Iterator[str]:
    yield f"signed with the key {key} (fingerprint {fingerprint(key)})"
    scope = "this run" if certificate["scope"] == "run" else "all about the population"
    for row in certificate["guarantees"]:
        unit = "node" if row["unit"] == "client" else "record"
        finite = row["epsilon"] != float("inf")
        number = f"epsilon {row['epsilon']:.4g}" if finite else "no protection"
        yield (
            f"the released model: for each {unit} ({row['relation']}), against "
            f"{row['against']}: {number} at delta {row['delta']:g}, counting {scope} "
            "(computed again from the certificate's events)"
        )


def _check_origin(folder: Path, checked: Delivered) -> None:
    """Say what of the run's promise holds for the delivered file, and how that is known."""
    delivery, steps = checked.delivery, steps_of(checked.delivery)
    if checked.certificate is None:
        return
    if private := [step for step in steps if step.private]:
        checked.claims.append(
            f"this file: the same, by post-processing of the model in {CLAIMS}/; its run is the "
            f"step {private[0].what}, which trained on the nodes' data and was charged for it"
        )
        return
    copied = all(step.what in COPIED for step in steps)
    model = certified_model(folder)
    if not copied or not model.is_file():
        shown = sorted({step.data for step in steps if step.data != "none"}) or ["none"]
        checked.claims.append(
            "this file: the same, by post-processing, if the steps above are all that was done "
            f"(examples used: {', '.join(shown)}); the coordinator signed them, and the file's "
            "numbers cannot show it"
        )
        return
    zeros = any(step.what in ZEROING for step in steps)
    origin = origin_of(folder / delivery["file"], delivery["form"], model, zeros=zeros)
    if origin.missing:
        checked.claims.append(
            f"this file: the same, by post-processing, on the coordinator's word: "
            f"{len(origin.missing)} of {origin.parts} tensors of the model are in it in another "
            f"form ({origin.missing[0]!r}, ...)"
        )
        return
    checked.claims.append(
        f"this file: the same, by post-processing (shown here: all {origin.parts} tensors of the "
        "released model are in it, rounded at most)"
    )
