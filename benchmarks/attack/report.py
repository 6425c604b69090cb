"""A privacy report as a table, as JSON and CSV, and as one HTML page."""

import base64
import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, select_autoescape
from rich.box import SIMPLE_HEAD
from rich.table import Table

from umbel.benchmarks.attack.audits import ADVERSARIES
from umbel.benchmarks.attack.checks import MEMBERSHIP
from umbel.benchmarks.attack.findings import WORDS, Finding
from umbel.benchmarks.attack.plots import draw, worst_auc
from umbel.benchmarks.attack.suite import Report, Row
from umbel.server.output import strict

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


PROMISES = (
    ("defence", "defence"),
    ("accuracy", "accuracy"),
    ("users:\nclaimed", "model_user"),
    ("\nmeasured", "measured_model_user"),
    ("server:\nclaimed", "server"),
    ("\nmeasured", "measured_server"),
    ("bytes", "bytes_"),
    ("s", "seconds"),
)
ATTACKS = (
    ("defence", "defence"),
    ("inversion", "inversion"),
    ("imprint", "imprint"),
    ("took part", "participation"),
    ("member", "membership"),
    ("hospital", "hospitals"),
)
"""Heads of the terminal's two tables, and the fields of `Line` below them."""

HEADINGS = {
    "frontier": "Privacy and usefulness",
    "roc": "Membership, true against false accusations",
    "pictures": "Images that the server reconstructs",
}

BRIEF = (
    "none", "local DP 8", "central DP 8", "secure sum of 5", "secure sum of 20",
    "secure sum + DP 8", "example DP 8",
)  # fmt: skip
"""The rows of a summary, where a report has them."""


def to_json(report: Report) -> dict[str, Any]:
    """The whole report as a JSON object; infinities are texts."""
    content: dict[str, Any] = strict.plain(
        {
            "ok": not report.problems() and not report.untested(),
            "problems": report.problems(),
            "untested": report.untested(),
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
            half = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
            cells = [
                (head, [_folded(getattr(line, name)) for line in own]) for head, name in columns
            ]
            cells = [(head, column) for head, column in cells if set(column) != {"-"}]
            if len(cells) == 1:
                continue  # names alone
            for head, _ in cells:
                width = max(len(part) for part in head.split("\n"))
                half.add_column(head, overflow="fold", min_width=width)
            for line in zip(*(column for _, column in cells), strict=True):
                half.add_row(*line)
            shown.append(half)
    return shown


def _folded(cell: str) -> str:
    """The interval below its number."""
    return cell.replace(" ±", "\n±").replace(" (", "\n").removesuffix(")")


def write(report: Report, folder: Path) -> list[Path]:
    """Write a report's JSON, CSV and Markdown files, plots and page into a folder.

    Returns:
        The files, `report.html` as the last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = to_json(report)
    made = [folder / "report.json", folder / "findings.csv", folder / "audits.csv"]
    made[0].write_text(strict.dumps(content, indent=1), encoding="utf-8")
    table = folder / "results.md"
    table.write_text(markdown(content), encoding="utf-8")
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
    return [*made, table, *plots, page]


def html(report: Report, plots: Sequence[Path]) -> str:
    """One page with everything in it: no script, no file beside it, nothing fetched."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape()
    )
    used = {one.attack.partition(":")[0] for row in report.rows for _, one in row.findings}
    return environment.get_template("report.html").render(
        heads=HEADS,
        lines=[list(vars(line).values()) for line in lines(report)],
        problems=[*report.problems(), *report.untested()],
        verdicts=[(row, one) for row in report.rows for one in row.verdicts],
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
        plots=[(_heading(p.stem), base64.b64encode(p.read_bytes()).decode()) for p in plots],
    )


def _heading(stem: str) -> str:
    """A plot's heading from its file's name, which ends in the data set's."""
    kind, _, data = stem.partition("-")
    return f"{HEADINGS[kind]}: {data}"


def _row(row: Row) -> dict[str, Any]:
    accuracy = row.accuracy()
    training = row.main
    worst = worst_auc(row)
    return {
        "data": row.data,
        "defence": row.name,
        "accuracy": None
        if accuracy is None
        else dict(zip(("value", "low", "high"), accuracy, strict=True)),
        "claimed": {} if training is None else dict(training.claimed),
        "measured": {who: row.measured_bound(who) for who in ADVERSARIES},
        "membership": None
        if worst is None
        else dict(zip(("value", "low", "high"), worst[:3], strict=True)),
        "reconstruction_db": {
            who: max(
                (
                    one.value
                    for _, one in row.findings
                    if one.measure == "PSNR in dB" and one.adversary == seen
                ),
                default=None,
            )
            for who, seen in (("others", "other-node"), ("server", "server"))
        },
        "bytes_per_update": None if training is None else training.bytes_up,
        "seconds_per_round": None if training is None else training.seconds,
        "findings": [{"scene": scene, **one.to_json()} for scene, one in row.findings],
        "audits": [audit.to_json() for audit in row.audits],
        "verdicts": [one.to_json() for one in row.verdicts],
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
    bound = row.measured_bound(adversary)
    return "-" if bound is None else f"{bound:.2f}"


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


# ---- a table for people who read no reports


def markdown(content: Mapping[str, Any], names: Sequence[str] | None = None) -> str:
    """A report as Markdown tables, one a data set, which name the run that made them.

    Args:
        content: of a `report.json`.
        names: the rows wanted, in their own order; all if None.
    """
    rows = [row for row in content["rows"] if names is None or row["defence"] in names]
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        heads = (
            data, "accuracy", "epsilon claimed", "measured at least", "reconstruction",
            "membership AUC", "bytes", "seconds",
        )  # fmt: skip
        table = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        table += [f"| {' | '.join(_cells(row))} |" for row in rows if row["data"] == data]
        parts.append("\n".join(table))
    parts.append(_legend(content))
    return "\n\n".join(parts) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    accuracy, membership, quality = row["accuracy"], row["membership"], row["reconstruction_db"]
    claimed = [_number(row["claimed"].get(who), "{:.2f}", "none") for who in ADVERSARIES]
    measured = [_number(row["measured"].get(who), "{:.2f}") for who in ADVERSARIES]
    decibels = [_number(quality[who], "{:.0f}") for who in ("others", "server")]
    return [
        row["defence"],
        "-" if accuracy is None else f"{accuracy['value']:.1%}",
        " / ".join(claimed),
        " / ".join(measured),
        " / ".join(decibels) + " dB",
        "-" if membership is None else "{value:.2f} ({low:.2f}–{high:.2f})".format(**membership),
        _number(row["bytes_per_update"], "{:,.0f}"),
        _number(row["seconds_per_round"], "{:.2f}"),
    ]


def _number(value: Any, form: str, absent: str = "-") -> str:
    known = value is not None and math.isfinite(float(value))
    return form.format(float(value)) if known else absent


def _legend(content: Mapping[str, Any]) -> str:
    about = content["about"]
    machine, tasks = about.get("machine", {}), about.get("tasks", [])
    draws = ", ".join(f"{task['draws']} on {task['data']}" for task in tasks)
    blind = ", ".join(
        f"{one['chance']:.0f} dB on {row['data']}"
        for row in content["rows"]
        if row["defence"] == "none"
        for one in row["findings"]
        if one["measure"] == "PSNR in dB" and one["adversary"] == "server"
        if one["attack"] == "closed form"
    )
    return (
        "Pairs are for who sees the models / for the server. Epsilon is measured by canaries, a "
        "lower bound at 95 % confidence. Reconstruction is the best median PSNR of all "
        f"inversions{f'; guessing the mean has {blind}' if blind else ''}. Membership is of the "
        "strongest attack, with its 95 % interval; chance is 0.5. Bytes are of one update, "
        "seconds of one round.\n\n"
        f"Run {about.get('id', '-')} of {about.get('date', '-')}: "
        f"`{about.get('command', 'umbel bench privacy')}`, seed {about['seed']}, "
        f"{about['repetitions']} repetition(s) of each audit with "
        f"{about['canaries']:,} canaries"
        f"{f', trainings of each claim: {draws}' if draws else ''}; "
        f"{about.get('seconds', 0):.0f} s on {machine.get('cpus', '-')} cores, "
        f"{machine.get('platform', '-')}, torch {about['versions'].get('torch', '-')}."
    )
