"""A privacy report as a table, as JSON and CSV, and as one HTML page."""

import base64
import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.table import Table

from umbel.benchmarks.attack.checks import MEMBERSHIP
from umbel.benchmarks.attack.findings import Finding
from umbel.benchmarks.attack.plots import draw
from umbel.benchmarks.attack.suite import Report, Row

WORDS: Mapping[str, str] = {
    "closed form": "If a model begins with a dense layer, its update is the product of an error "
    "and the input. Dividing one by the other gives the input back, exactly and in no time. Only "
    "noise, or enough other nodes in the same sum, stand in its way.",
    "iDLG labels": "The last layer's bias moves down for the class that an example has, and up "
    "for all others. Whoever sees one example's update knows its label.",
    "DLG": "Deep leakage from gradients: start from a random picture and change it until it would "
    "cause the update that was seen. It works on any smooth model.",
    "cosine + TV": "The same with the update's direction only, and with a preference for smooth "
    "pictures. Clipping does not hinder it, because clipping keeps the direction.",
    "imprint": "A malicious server puts a layer before the model that sorts pictures by "
    "brightness into bins. A bin with one picture gives it away, even out of a batch or a sum.",
    "participation": "The attacker guesses which nodes took part in a round: it computes what a "
    "candidate would have sent, and compares that with how the model moved.",
    "property": "The attacker trains many imitated nodes, half of which have a property, and "
    "learns to tell from an update whether its sender has it. The property here is having mostly "
    "one kind of example.",
    "source inference": "The attacker knows an example and wants to know whose it is: it asks "
    "each node's model, and takes the one that knows the example best.",
    "loss threshold": "Members have smaller losses than others, because the model was fitted to "
    "them. Guess that examples with small losses are members.",
    "LiRA offline": "The same, but each example is compared with how models behave that never saw "
    "it: some examples are easy for everybody.",
    "LiRA online": "The same with models of which half were trained on the example: how they "
    "behave with it and without it is known from both sides.",
    "RMIA online": "RMIA with reference models of which half were trained on the example.",
    "RMIA offline": "Each example is compared with many others: is it unusually well known to "
    "this model, given how well other models know it?",
}
"""One paragraph an attack, for somebody who has never heard of it."""

COLUMNS = (
    "data", "defence", "scene", "attack", "adversary", "measure", "value", "low", "high", "chance",
    "ceiling", "excess", "trials",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A row of the table, in texts."""

    data: str
    defence: str
    accuracy: str
    model_user: str
    server: str
    measured_model_user: str
    measured_server: str
    inversion: str
    imprint: str
    participation: str
    membership: str
    hospitals: str
    bytes_: str
    seconds: str


HEADS = (
    "data", "defence", "accuracy", "eps users", "eps server", ">= users", ">= server",
    "inversion", "imprint", "participation", "membership", "hospitals", "bytes/update", "s/round",
)  # fmt: skip


PROMISES = {
    "defence": "defence",
    "accuracy": "accuracy",
    "eps users": "model_user",
    ">=": "measured_model_user",
    "eps server": "server",
    "≥": "measured_server",
    "bytes": "bytes_",
    "s": "seconds",
}
ATTACKS = {
    "defence": "defence",
    "inversion": "inversion",
    "imprint": "imprint",
    "participation": "participation",
    "membership": "membership",
    "hospitals": "hospitals",
}
"""Heads of the terminal's two tables, and the fields of `Line` below them."""


def to_json(report: Report) -> dict[str, Any]:
    """The whole report as a JSON object without infinities."""
    content: dict[str, Any] = _plain(
        {
            "ok": not report.problems(),
            "problems": report.problems(),
            "warnings": report.warnings(),
            "about": dict(report.about),
            "rows": [_row(row) for row in report.rows],
            "faults": [audit.to_json() for audit in report.faults],
            "mechanisms": [audit.to_json() for audit in report.mechanisms],
            "checks": [
                {
                    "name": check.name,
                    "measured": check.measured,
                    "least": check.least,
                    "most": check.most,
                    "ok": check.ok,
                }
                for check in report.checks
            ],
        }
    )
    return content


def lines(report: Report) -> list[Line]:
    """The matrix in texts, a line a defence and data set."""
    return [_line(row) for row in report.rows]


def tables(report: Report) -> list[Table]:
    """The matrix for a terminal, in two halves that fit into 80 columns."""
    shown = []
    for data in dict.fromkeys(row.data for row in report.rows):
        own = [_line(row) for row in report.rows if row.data == data]
        for title, columns in (
            (f"{data}: what is promised, measured and paid", PROMISES),
            (f"{data}: what an attacker gets (95 % intervals)", ATTACKS),
        ):
            half = Table(title=title)
            for head in columns:
                half.add_column(head, overflow="fold")
            for line in own:
                half.add_row(*(getattr(line, name) for name in columns.values()))
            shown.append(half)
    return shown


def write(report: Report, folder: Path) -> list[Path]:
    """Write `report.json`, two CSV files, the plots and `report.html` into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = to_json(report)
    made = [folder / "report.json", folder / "findings.csv", folder / "audits.csv"]
    made[0].write_text(json.dumps(content, indent=1), encoding="utf-8")
    with made[1].open("w", newline="", encoding="utf-8") as file:
        findings = csv.writer(file)
        findings.writerow(COLUMNS)
        for row in report.rows:
            for scene, one in row.findings:
                findings.writerow(
                    [row.data, row.name, scene, *(getattr(one, name) for name in COLUMNS[3:])]
                )
    every = [audit for row in report.rows for audit in row.audits]
    every += [*report.faults, *report.mechanisms]
    with made[2].open("w", newline="", encoding="utf-8") as file:
        rows = [audit.to_json() for audit in every]
        names = list(rows[0]) if rows else []
        audits = csv.DictWriter(file, names)
        audits.writeheader()
        audits.writerows(rows)
    plots = draw(report, folder)
    page = folder / "report.html"
    page.write_text(html(report, plots), encoding="utf-8")
    return [*made, *plots, page]


def html(report: Report, plots: Sequence[Path]) -> str:
    """One page with everything in it: no script, no file beside it, nothing fetched."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape()
    )
    used = {one.attack.partition(":")[0] for row in report.rows for _, one in row.findings}
    return environment.get_template("report.html").render(
        heads=HEADS,
        lines=[list(vars(line).values()) for line in lines(report)],
        problems=report.problems(),
        warnings=report.warnings(),
        defences={row.name: row.words for row in report.rows},
        attacks={name: words for name, words in WORDS.items() if name in used},
        audits=[
            *(audit for row in report.rows for audit in row.audits if audit.claimed is not None),
            *report.mechanisms,
        ],
        faults=report.faults,
        findings=[(row, scene, one) for row in report.rows for scene, one in row.findings],
        checks=report.checks,
        about=report.about,
        plots=[(p.stem, base64.b64encode(p.read_bytes()).decode()) for p in plots],
    )


def _row(row: Row) -> dict[str, Any]:
    accuracy = row.accuracy()
    training = row.main
    return {
        "data": row.data,
        "defence": row.name,
        "accuracy": None
        if accuracy is None
        else dict(zip(("value", "low", "high"), accuracy, strict=True)),
        "claimed": {} if training is None else dict(training.claimed),
        "bytes_per_update": None if training is None else training.bytes_up,
        "seconds_per_round": None if training is None else training.seconds,
        "findings": [{"scene": scene, **one.to_json()} for scene, one in row.findings],
        "audits": [audit.to_json() for audit in row.audits],
        "notes": list(row.notes),
    }


def _line(row: Row) -> Line:
    accuracy = row.accuracy()
    training = row.main
    return Line(
        data=row.data,
        defence=row.name,
        accuracy="-"
        if accuracy is None
        else f"{accuracy[0]:.1%} ±{(accuracy[2] - accuracy[1]) / 2:.1%}",
        model_user=_epsilon(row.claimed("model-user")),
        server=_epsilon(row.claimed("server")),
        measured_model_user=_measured(row, "model-user"),
        measured_server=_measured(row, "server"),
        inversion=_worst(row, "examples recovered", ("closed form", "DLG", "cosine + TV")),
        imprint=_worst(row, "examples recovered", ("imprint",)),
        participation=_worst(row, "AUC", ("participation",)),
        membership=_worst(row, "AUC", MEMBERSHIP, "training"),
        hospitals=_worst(row, "AUC", MEMBERSHIP, "hospitals"),
        bytes_="-" if training is None else f"{training.bytes_up:,.0f}",
        seconds="-" if training is None else f"{training.seconds:.2f}",
    )


def _epsilon(value: float | None) -> str:
    return "none" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _measured(row: Row, adversary: str) -> str:
    own = [a.measured for a in row.audits if a.adversary == adversary and a.unit == "client"]
    return f"{max(own):.2f}" if own else "-"


def _worst(row: Row, measure: str, attacks: Sequence[str], scene: str = "") -> str:
    """The attack that came furthest (in one scene, if it is named), with its interval."""
    own: list[Finding] = [
        one
        for place, one in row.findings
        if one.measure == measure and one.attack.startswith(tuple(attacks)) and scene in ("", place)
    ]
    if not own:
        return "-"
    worst = max(own, key=lambda one: (one.value, one.trials))
    return f"{worst.value:.2f} ({worst.low:.2f}–{worst.high:.2f})"


def _plain(value: Any) -> Any:
    """JSON has no infinity: an infinite number becomes a text."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
