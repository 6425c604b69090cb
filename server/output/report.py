"""A run as one page that a person can look at, keep, mail and print.

`report.html` needs nothing beside itself: no network, no script; its drawings are part of it.
It says what the run directory holds and nothing else: what is missing is left out. What it says of
privacy stands in one box at its head (`umbel.server.private.promise`), and nowhere else.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from umbel.core.options import renamed
from umbel.server.evaluation import direction
from umbel.server.output.figures import Round, metric_text, plots_of, size_text
from umbel.server.output.pages import Table, environment
from umbel.server.output.plots import Plot
from umbel.server.output.progress import count, duration, headline, number
from umbel.server.output.rundir import RunDirectory
from umbel.server.private.promise import promise_of

_STOPPED = {
    "rounds": "It ran all the rounds that were asked for.",
    "early-stop": "It stopped early, because the model had ceased to get better.",
    "budget": "It stopped because another round would have exceeded the privacy budget.",
    "interrupted": "It was interrupted and can be continued with --resume.",
}
NOT_ASKED = "nodes_not_asked"
"""Of `config.json`: why nodes do not evaluate the model, where they were to do it."""
_KNOWN = {"app", "options", "versions", "machine", "model", "command", "provenance", NOT_ASKED}
_FAILING_NODES = 20


@dataclass(frozen=True)
class Section:
    """A part that another room adds to the report, between the plots and the configuration.

    Attributes:
        title: its heading.
        text: plain text; an empty line begins a new paragraph.
        tables: drawn below the text.
        plots: drawn below the tables; their PNGs are written too.
    """

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = field(default=())


def write_report(run: Path, sections: Sequence[Section] = ()) -> Path:
    """Write `report.html` and its PNGs into a run directory.

    Args:
        run: the run's directory; the run may still be going on.
        sections: further parts of the page.

    Returns:
        The path of the page.

    Raises:
        ConfigError: there is no run at `run`, or its files are damaged.
        RunError: the directory cannot be written.
    """
    directory = RunDirectory.open(run)
    config, result = directory.config(), directory.result()
    rounds = [Round.of(line) for line in directory.rounds()]
    plots = plots_of(rounds, directory.nodes())
    page = (
        environment()
        .get_template("report.html")
        .render(
            title=_title(config),
            lead=_lead(config, result, rounds),
            promise=promise_of(directory),
            figures=_key_figures(config, result, rounds),
            summary=_summary(result.get("summary")),
            plots=plots,
            sections=sections,
            options=_pairs(config.get("options")),
            failures=_failures(rounds),
            judged=_judged(rounds),
            about=_about(config, directory),
        )
    )
    for plot in [*plots, *(plot for section in sections for plot in section.plots)]:
        directory.write_bytes(f"{plot.name}.png", plot.png)
    written = directory.write_bytes("report.html", page.encode("utf-8", "replace"))
    if directory.certificate_path.is_file():
        from umbel.server.private.seal import seal  # certified runs only: it imports much

        seal(directory)
    return written


def _title(config: Mapping[str, Any]) -> str:
    return str(config.get("app") or "Federated run")


def _lead(
    config: Mapping[str, Any], result: Mapping[str, Any], rounds: Sequence[Round]
) -> list[str]:
    """What was trained, and with what result, in plain sentences."""
    done = _rounds_done(result, rounds)
    where = f" on {count(config['nodes'], 'node')}" if isinstance(config.get("nodes"), int) else ""
    if done:
        sentences = [f"This model was trained for {count(done, 'round')}{where}."]
    else:
        sentences = [f"This run has not finished a round{where} yet."]
    sentences += _outcome(result, rounds)
    sentences += _no_measurements(config, rounds)
    stopped = result.get("stopped")
    if stopped is not None:
        sentences.append(_STOPPED.get(str(stopped), f"It stopped: {stopped}."))
    elif done:
        sentences.append("It has not ended: this page shows the rounds so far.")
    return [*sentences, *(f"Note: {warning}." for warning in result.get("warnings", ()))]


def _no_measurements(config: Mapping[str, Any], rounds: Sequence[Round]) -> list[str]:
    """Why there is nothing about how the model does on each node, where there is nothing."""
    if any(one.federated for one in rounds):
        return []
    reason = str(config.get(NOT_ASKED, ""))
    if not reason:
        options = config.get("options")
        every = renamed(options).get("client-eval-every", 0) if isinstance(options, Mapping) else 0
        if not isinstance(every, int) or every >= 0:
            return []
        reason = f"nodes are not asked to evaluate the model, because client-eval-every is {every}"
    return [f"Nothing is shown of single nodes: {reason}."]


def _outcome(result: Mapping[str, Any], rounds: Sequence[Round]) -> list[str]:
    final = _final_metrics(result, rounds)
    name = headline(final)
    if name is None:
        return []
    for bad in (name, "loss"):
        if not math.isfinite(final.get(bad, 0.0)):
            text = metric_text(bad, final[bad])
            return [f"Its {bad} is {text}, which means that training diverged."]
    text = "It ended with" if "stopped" in result else "So far it has reached"
    text = f"{text} {_phrase(name, final[name])}"
    if name != "loss" and "loss" in final:
        text += f" and {_phrase('loss', final['loss'])}"
    if result.get("measured") == "nodes":
        text += ", measured by the nodes on their own test examples (means over all of them)."
    else:
        text += ", measured by the coordinator on its own data."
    values = [(one.metrics[name], one.number) for one in rounds if one.has(name)]
    better = direction(name)
    if better and values:
        best, at = max(values, key=lambda value: better * value[0])
        if better * best > better * final[name] and metric_text(name, best) != metric_text(
            name, final[name]
        ):
            text += f" The best was {metric_text(name, best)}, after round {at:,}."
    return [text]


def _key_figures(
    config: Mapping[str, Any], result: Mapping[str, Any], rounds: Sequence[Round]
) -> list[tuple[str, str]]:
    """Name and value of what one looks for first."""
    final = _final_metrics(result, rounds)
    first = headline(final)
    names = [name for name in (first, "loss") if name is not None and name in final]
    figures = [(name, metric_text(name, final[name])) for name in dict.fromkeys(names)]
    fair = next((one.federated for one in reversed(rounds) if one.federated), {})
    if first in fair and "worst_decile" in fair[first]:
        worst = metric_text(first, fair[first]["worst_decile"])
        figures.append((f"{first}, worst tenth of nodes", worst))
    figures.append(("rounds", f"{_rounds_done(result, rounds):,}"))
    if isinstance(config.get("nodes"), int):
        figures.append(("nodes", f"{config['nodes']:,}"))
    trained = [one for one in rounds if one.number > 0]
    replies = [one.clients for one in trained if one.clients is not None]
    if replies:
        figures.append(("replies a round", number(sum(replies) / len(replies))))
    seconds = Round.of(result).seconds or sum(one.seconds or 0 for one in trained)
    if seconds:
        figures.append(("time", duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"))
    traffic = sum((one.bytes_down or 0) + (one.bytes_up or 0) for one in trained)
    if traffic:
        figures.append(("sent and received", size_text(traffic)))
    model = config.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("parameters"), int):
        figures.append(("model parameters", f"{model['parameters']:,}"))
    failed = sum(len(one.failed) for one in rounds)
    return [*figures, ("failed messages", f"{failed:,}")] if failed else figures


def _rounds_done(result: Mapping[str, Any], rounds: Sequence[Round]) -> int:
    said = result.get("rounds")
    return said if isinstance(said, int) else sum(one.number > 0 for one in rounds)


def _final_metrics(result: Mapping[str, Any], rounds: Sequence[Round]) -> dict[str, float]:
    last = next((one.metrics for one in reversed(rounds) if one.metrics), {})
    return Round.of(result).metrics or last  # a result has a round's keys, of the whole run


def _phrase(name: str, value: float) -> str:
    text = metric_text(name, value)
    return f"{text} {name}" if text.endswith("%") else f"{name} {text}"


def _summary(value: object) -> tuple[str, list[Table]]:
    """An app's own summary: its text, and its tables."""
    if isinstance(value, str):
        return value.strip("\n"), []
    if isinstance(value, Mapping) and value and all(_is_row(v) for v in value.values()):
        return "", [_grid(value.items())]
    if isinstance(value, list) and value and all(_is_row(v) for v in value):
        return "", [_grid((None, row) for row in value)]
    if isinstance(value, Mapping):
        nested = {str(key): part for key, part in value.items() if _is_row(part) and part}
        plain = {key: part for key, part in value.items() if str(key) not in nested}
        tables = [_pairs(plain)] if plain else []
        return "", tables + [_pairs(part) for part in nested.values()]
    return ("", []) if value is None else (_cell(value), [])


def _is_row(value: object) -> bool:
    return isinstance(value, Mapping)


def _grid(rows: Iterable[tuple[object, Mapping[str, Any]]]) -> Table:
    rows = list(rows)
    columns = list(dict.fromkeys(name for _, row in rows for name in row))
    named = any(key is not None for key, _ in rows)
    heads = [*([""] if named else []), *map(str, columns)]
    cells = [
        [*([str(key)] if named else []), *(_cell(row.get(name, "")) for name in columns)]
        for key, row in rows
    ]
    return Table(heads, cells)


def _pairs(value: object) -> Table:
    items = value.items() if isinstance(value, Mapping) else ()
    return Table((), [(str(key), _cell(part)) for key, part in items])


def _cell(value: object) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value) if isinstance(value, int) else json.dumps(value, default=str)


def _about(config: Mapping[str, Any], directory: RunDirectory) -> list[tuple[str, Table]]:
    """What one needs to repeat the run, besides the options."""
    command = config.get("command")
    text = shlex.join(map(str, command)) if isinstance(command, list) else command
    run = {"directory": str(directory.path.resolve()), **({"command": text} if text else {})}
    run |= {key.replace("_", " "): value for key, value in config.items() if key not in _KNOWN}
    model = config.get("model")
    if isinstance(model, Mapping) and isinstance(model.get("bytes"), int):
        run["model size"] = size_text(model["bytes"])
    parts = [
        ("Run", _pairs(run)),
        ("Use the model", _use(config, directory)),
        ("Machine", _pairs(_machine(config.get("machine")))),
        ("Versions", _pairs(config.get("versions"))),
    ]
    return [(title, table) for title, table in parts if table.rows]


def _use(config: Mapping[str, Any], directory: RunDirectory) -> Table:
    """Three lines of Python that load the model; none before there is one."""
    model = config.get("model")
    if not isinstance(model, Mapping) or "use" not in model or not directory.model_path.is_file():
        return Table((), ())
    code = (
        "import umbel",
        f"model = umbel.load({str(directory.path.resolve())!r})",
        f"result = {model['use']}",
    )
    return Table((), [(str(at), line) for at, line in enumerate(code, start=1)])


def _machine(value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {}
    names = {"cpus": "processors", "memory_gb": "memory (GB)", "gpu": "GPU"}
    return {names.get(str(key), str(key)): part for key, part in value.items()}


def _judged(rounds: Sequence[Round]) -> tuple[Table, int]:
    """Nodes that the aggregator left out or weighed down, least heard first; and who is left out
    of the table. A round in which a node is not named counts as one in which it was heard."""
    heard: dict[str, float] = {}
    times: Counter[str] = Counter()
    rules: dict[str, str] = {}
    for one in rounds:
        for node, influence, rule in one.judged:
            heard[node] = heard.get(node, 0.0) + influence
            times[node] += 1
            rules[node] = rule
    least = sorted(heard, key=lambda node: (heard[node] - times[node], node))
    rows = [
        (node, f"{times[node]:,}", f"{100 * heard[node] / times[node]:.0f} %", rules[node])
        for node in least[:_FAILING_NODES]
    ]
    names = ("node", "rounds", "influence in them", "aggregator")
    return Table(names, rows), max(0, len(least) - len(rows))


def _failures(rounds: Sequence[Round]) -> tuple[Table, int]:
    """Failures by node, worst first, and how many nodes the table leaves out."""
    reasons: dict[str, Counter[str]] = {}
    when: dict[str, list[int]] = {}
    for one in rounds:
        for node, reason in one.failed:
            reasons.setdefault(node, Counter())[reason] += 1
            when.setdefault(node, []).append(one.number)
    worst = sorted(reasons, key=lambda node: (-reasons[node].total(), node))
    rows = []
    for node in worst[:_FAILING_NODES]:
        first, last = min(when[node]), max(when[node])
        span = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        why = "; ".join(
            f"{reason} ({times:,} ×)" if times > 1 else reason
            for reason, times in reasons[node].most_common(3)
        )
        rows.append((node, f"{reasons[node].total():,}", span, why))
    return Table(("node", "failures", "rounds", "reason"), rows), max(0, len(worst) - len(rows))
