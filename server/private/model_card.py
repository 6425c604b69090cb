"""MODEL_CARD.md: what a person, or an authority's file, should know before the model is used.

It begins with a YAML head that other programs read, and with the same box as the report. Of the
data it says what is public and nothing that is not. What only the app's author knows stands in the
app's pyproject.toml, and where it does not, the card says "not stated":

    [project]          description, license, authors, urls
    [tool.umbel.card]  intended-use, not-intended-use, data, origin, limits, contact, licence
"""

import json
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from umbel.server.output.rundir import RunDirectory
from umbel.server.private.promise import COMMAND, promise, said

NOT_STATED = "not stated"
_LISTED = 20
"""Nodes that a card names one by one; the certificate has all."""


def write_model_card(
    run: RunDirectory, certificate: Mapping[str, Any], metrics: Mapping[str, float], key: str
) -> None:
    """Write the card of a run.

    Args:
        run: its directory.
        certificate: what its certificate will say.
        metrics: of the final evaluation.
        key: the coordinator's public key.

    Raises:
        RunError: it cannot be written.
    """
    text = model_card(run.config(), certificate, metrics, key)
    run.write_bytes("MODEL_CARD.md", text.encode())


def model_card(
    config: Mapping[str, Any],
    certificate: Mapping[str, Any],
    metrics: Mapping[str, float],
    key: str,
) -> str:
    """The card's text."""
    told = stated(config)
    name = str(config.get("app", "a federation"))
    box = promise(certificate, config, key)
    scores = [f"| {metric} | {value:.4g} |" for metric, value in sorted(metrics.items())]
    parts = [
        _head(name, told, certificate, metrics),
        f"# Model card: {name}",
        "\n".join(f"> **{question}.** {_inline(answer)}  " for question, answer in box),
        f"Trained {certificate['issued'][:10]} by federated learning in Umbel; "
        f"run `{certificate['run']}`.",
        "## Intended use",
        told["intended-use"],
        f"Not intended for: {told['not-intended-use']}.",
        "## Data and their origin",
        f"What: {told['data']}. Origin: {told['origin']}.",
        f"Population: `{certificate['population']}`. {_nodes(certificate)} The data never left the "
        "nodes. How much each of them holds, and what, is private and not summarised here.",
        "## Metrics",
        "\n".join(["| metric | value |", "|---|---|", *scores])
        if scores
        else "No central evaluation.",
        "Measured by the coordinator on its own held-out examples, which are not protected.",
        "## Limits",
        f"{told['limits']}." if told["limits"] == NOT_STATED else told["limits"],
        "The noise that protects the data costs accuracy, most for whatever is rare among the "
        "nodes.",
        "## How it was protected",
        _fine_print(certificate),
        "## Contact and licence",
        f"Contact: {told['contact']}. Licence: {told['licence']}.",
    ]
    return "\n\n".join(parts) + "\n"


def stated(config: Mapping[str, Any]) -> dict[str, str]:
    """What an app's pyproject.toml says of itself; "not stated" where it does not."""
    project, own = _pyproject(config.get("app_path"))
    people = project.get("authors") or project.get("maintainers") or []
    names = [
        " ".join(str(one[part]) for part in ("name", "email") if part in one)
        for one in people
        if isinstance(one, Mapping)
    ]
    licence = project.get("license")
    if isinstance(licence, Mapping):
        licence = licence.get("text") or licence.get("file")
    known = {
        "intended-use": project.get("description"),
        "contact": ", ".join(filter(None, names)),
        "licence": licence,
    }
    names_of_fields = ("intended-use", "not-intended-use", "data", "origin", "limits", "contact")
    return {
        field: " ".join(str(own.get(field) or known.get(field) or NOT_STATED).split())
        for field in (*names_of_fields, "licence")
    }


def _pyproject(folder: object) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    if not isinstance(folder, str):
        return {}, {}
    try:
        with (Path(folder) / "pyproject.toml").open("rb") as file:
            found = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError):
        return {}, {}
    own = found.get("tool", {}).get("umbel", {}).get("card", {})
    return found.get("project", {}), own if isinstance(own, Mapping) else {}


def _head(
    name: str,
    told: Mapping[str, str],
    certificate: Mapping[str, Any],
    metrics: Mapping[str, float],
) -> str:
    """YAML, every text in double quotes."""
    lines = [
        "---",
        f"model_name: {_quoted(name)}",
        "library_name: umbel",
        f"license: {_quoted(told['licence'])}",
        "tags: [federated-learning, differential-privacy]",
        f"metrics: [{', '.join(_quoted(metric) for metric in sorted(metrics))}]",
        f"run: {_quoted(certificate['run'])}",
        f"date: {_quoted(certificate['issued'])}",
        "privacy:",
    ]
    for row in certificate["guarantees"]:
        epsilon = row["epsilon"]
        number = ".inf" if math.isinf(epsilon) else f"{epsilon:.6f}"
        lines += [
            f"  - against: {row['against']}",
            f"    unit: {row['unit']}",
            f"    epsilon: {number}",
            f"    delta: {row['delta']:.6e}",
            f"    relation: {row['relation']}",
        ]
    return "\n".join([*lines, "---"])


def _quoted(text: str) -> str:
    """Text in double quotes, as JSON and YAML both read it.

    Beyond the first 65,536 characters JSON escapes in halves, which YAML does not put together.
    """
    plain = json.dumps(text, ensure_ascii=False)
    return "".join(one if one.isprintable() else f"\\U{ord(one):08x}" for one in plain)


def _inline(answer: str) -> str:
    return answer.replace("<", "&lt;").replace(COMMAND, f"`{COMMAND}`")


def _nodes(certificate: Mapping[str, Any]) -> str:
    if certificate["mechanism"]:
        return f"{certificate['mechanism']['nodes']} nodes; that number is public."
    nodes = {row["node"] for row in certificate["statements"]["nodes"]}
    return f"{len(nodes | set(certificate['statements']['without']))} nodes took part."


def _fine_print(certificate: Mapping[str, Any]) -> str:
    lines = [
        f"against {row['against']}: epsilon "
        f"{said(row['epsilon'])} at delta {row['delta']:g}, {row['relation']} {row['unit']}, "
        f"sampling {row['sampling']}, accountant {row['accountant']}"
        for row in certificate["guarantees"]
    ]
    mechanism, told = certificate["mechanism"], certificate["statements"]
    if mechanism:
        lines.append(
            f"layers: {mechanism['stack']}; cohorts: {mechanism['cohort']}, "
            f"{mechanism['expected_cohort']:g} of {mechanism['nodes']} nodes expected"
        )
    rows = sorted(told["nodes"], key=lambda row: -row["epsilon"]) if told else []
    for row in rows[:_LISTED]:
        lines.append(
            f"node {row['node']}: {row['mechanism']}, each {row['unit']}, epsilon "
            f"{said(row['epsilon'])} at delta {row['delta']:g}, noise multiplier "
            f"{row['noise_multiplier']:g}, sampling rate {row['sampling_rate']:.4g}, norm "
            f"{row['norm']:g}, {row['participations']} replies"
            + ("" if row["signed"] else ", not signed")
        )
    if len(rows) > _LISTED:
        lines.append(f"{len(rows) - _LISTED} more statements, none of a larger epsilon")
    silent = told["without"] if told else []
    lines += [f"node {node}: no statement of its own budget" for node in silent[:_LISTED]]
    if len(silent) > _LISTED:
        lines.append(f"{len(silent) - _LISTED} more nodes without a statement")
    for other in certificate["elsewhere"]:
        lines.append(
            f"{other['nodes']} nodes are known to the population {other['population']!r} too"
        )
    lines.append(f"covered: {certificate['covers']}")
    return "\n".join(f"- {line}" for line in lines)
