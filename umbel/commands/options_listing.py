"""Every option of an app in one list: its name, type, default, values, meaning and reader.

The list is drawn from where the options are read: the groups that every federation has, the
trainer's own, and those that the app names in `Federation(options={...})` and in its pyproject.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from umbel.clients.given import HasOptions
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.trainers.private_sgd import PrivateSgd
from umbel.core.limits import limits_of
from umbel.core.options import Value, dashed, shown
from umbel.federation import Federation
from umbel.strategies.groups import GROUPS

_TYPES = {bool: "true or false", int: "whole number", float: "number", str: "text"}


@dataclass(frozen=True)
class OptionRow:
    """One option.

    Attributes:
        name: the name, as after `-c`.
        type: the kind of value, in words.
        default: the value where nobody says another; infinity as the text "inf".
        values: the values that it may have, in words; empty where any of its type will do.
        meaning: what it does.
        reader: who reads it: a group of `GROUPS`, a trainer's name, or "the app".
    """

    name: str
    type: str
    default: Value
    values: str
    meaning: str
    reader: str


def listing(federation: Federation | None, options: Mapping[str, Value]) -> list[OptionRow]:
    """All options of an app.

    Args:
        federation: the app's; None for an app that is not made with Umbel's `Federation`, which
            has just the options of its pyproject.
        options: those of the app's pyproject.
    """
    if federation is None:
        return [_row(name, value, None, "", "the app") for name, value in options.items()]
    complete = federation.complete(options)
    rows = [
        _row(name, complete[name], limit, meaning, reader)
        for name, (limit, meaning, reader) in _known(federation.trainer_for(complete)).items()
        if name in complete
    ]
    named = {row.name for row in rows}
    own = [_row(n, v, None, "", "the app") for n, v in complete.items() if n not in named]
    return [*rows, *own]


def reference() -> str:
    """The options as a page in Markdown, for the documentation."""
    trainer = PrivateSgd(trainer=TorchTrainer(torch.nn.Module))
    known = _known(trainer)
    defaults: dict[str, Value] = dict(trainer.OPTIONS)
    for kind in GROUPS.values():
        defaults |= kind.defaults()
    readers = dict.fromkeys(reader for _, _, reader in known.values())
    lines = [
        "# Options",
        "",
        "Written by `umbel options --markdown`; `umbel options APP` lists those of an app, its own",
        'among them. Change them with `-c "rounds=5 epsilon=2"` or in `[tool.flwr.app.config]`.',
    ]
    for reader in readers:
        lines += [
            "",
            f"## {reader}",
            "",
            "| option | default | values | meaning |",
            "|---|---|---|---|",
        ]
        for name, (limit, meaning, whose) in known.items():
            if whose == reader:
                row = _row(name, defaults[name], limit, meaning, whose)
                lines.append(
                    f"| `{name}` | `{shown(row.default)}` | {row.values or row.type} | {meaning} |"
                )
    return "\n".join(lines) + "\n"


def as_json(rows: Iterable[OptionRow]) -> list[dict[str, Any]]:
    """The rows for `--json`."""
    return [asdict(row) for row in rows]


def _row(name: str, value: Value, limit: Any, meaning: str, reader: str) -> OptionRow:
    default: Value = "inf" if isinstance(value, float) and value == float("inf") else value
    values = "" if limit is None else limit.words()
    return OptionRow(name, _TYPES[type(value)], default, values, meaning, reader)


def _known(trainer: Any) -> dict[str, tuple[Any, str, str]]:
    """Limit, meaning and reader of each option that is declared somewhere."""
    known: dict[str, tuple[Any, str, str]] = {}
    for reader, kind in GROUPS.items():
        meanings = meanings_of(kind)
        limits = limits_of(kind)
        for name in kind.defaults():
            known[name] = (limits.get(name), meanings.get(name, ""), reader)
    for part in _with_parts(trainer):
        meanings = {k: v for c in reversed(type(part).__mro__) for k, v in meanings_of(c).items()}
        limits = limits_of(part) if hasattr(part, "__dataclass_fields__") else {}
        for name in part.OPTIONS:
            reader = f"trainer {type(part).__name__}"
            known.setdefault(name, (limits.get(name), meanings.get(name, ""), reader))
    return known


def _with_parts(trainer: Any) -> Iterator[Any]:
    """A trainer that has options, and the trainers that it is made of before it."""
    for value in vars(trainer).values():
        inner = value.values() if isinstance(value, Mapping) else [value]
        for part in inner:
            if isinstance(part, HasOptions):
                yield from _with_parts(part)
    if isinstance(trainer, HasOptions):
        yield trainer


def meanings_of(kind: type[Any]) -> dict[str, str]:
    """What a class's docstring says of each attribute, by option name."""
    _, _, text = (kind.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    name, indent = "", 0
    for line in text.splitlines():
        if not line.strip():
            break
        depth = len(line) - len(line.lstrip())
        start = re.match(r"\s*(\w+): (.*)", line)
        if start and (not name or depth <= indent):
            name, indent = dashed(start[1]), depth
            found[name] = start[2].strip()
        elif name:
            found[name] += " " + line.strip()
    return found
