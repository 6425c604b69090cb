"""The keys of a node's policy file: their names, what they mean, which values fit.

`default_file` is the file that a node writes on its first start, made of the same list.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

ANSWERS = ("train", "evaluate", "statistics", "private-mean", "query")
UNLIMITED = "unlimited"
"""What an epsilon may be that no first promise shall limit; TOML's `inf` says the same."""
LEVELS = ("none", "noised", "summed", "clear")
"""How metrics and counts may leave: what stands later in the list tells more."""


@dataclass(frozen=True)
class Key:
    """One key of the file.

    Attributes:
        name: in the file.
        example: as TOML, in the commented file that a node writes on its first start.
        meaning: in lines.
        fits: whether a value is of the right kind.
        protects: a file with this key asks for protection, so no bare update may leave.
        sums: it is a limit on secure sums.
    """

    name: str
    example: str
    meaning: tuple[str, ...]
    fits: Callable[[Any], bool]
    protects: bool = False
    sums: bool = False


def _whole(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return is_number(value) and 0 < value < math.inf


def _budget(value: Any) -> bool:
    return value == UNLIMITED or (is_number(value) and value > 0)


def _texts(value: Any, among: Sequence[str] = ()) -> bool:
    return isinstance(value, list) and all(
        isinstance(each, str) and (not among or each in among) for each in value
    )


def _one_of(*among: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and value in among


def _bits(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(_whole(each, 1) for each in value)
        and value[0] <= value[1]
    )


def _digests(value: Any) -> bool:
    return _texts(value) and all(
        len(each) == 64 and not set(each.lower()) - set("0123456789abcdef") for each in value
    )


def _rules(value: Any) -> bool:
    return isinstance(value, dict) and all(_rule(each) for each in value.values())


def _rule(value: Any) -> bool:
    if isinstance(value, dict):
        limits = [each for each in value.values() if is_number(each) and not math.isnan(each)]
        return bool(value) and len(limits) == len(value) and value.keys() <= {"min", "max"}
    if isinstance(value, list):
        return bool(value) and all(isinstance(each, bool | int | float | str) for each in value)
    return isinstance(value, bool | int | float | str)


KEYS = (
    Key(
        "answer",
        '["train", "evaluate", "statistics", "private-mean", "query"]',
        (
            "Kinds of message that this node answers: `statistics` asks for running statistics of",
            "normalisation layers, `query` are an app's own queries. Which partition it holds, a",
            "node always says.",
        ),
        lambda value: _texts(value, ANSWERS),
    ),
    Key(
        "apps",
        '["64 hexadecimal digits"]',
        ("The only apps that this node runs, by SHA-256: umbel client policy prints this one's.",),
        _digests,
    ),
    Key(
        "unprotected",
        "true",
        (
            "Whether an update may leave that neither masks nor noise of the nodes protect.",
            "false, and not to be set to true, in a file that asks for any protection below.",
        ),
        lambda value: isinstance(value, bool),
    ),
    Key(
        "max-norm",
        "10.0",
        ("The longest update that leaves: the run must clip to this norm or a smaller one.",),
        _positive,
        protects=True,
    ),
    Key(
        "min-noise",
        "1.0",
        (
            "The smallest noise multiplier (noise over clipping norm) that an update, or the sum",
            "that it is part of, carries when it leaves; made on the nodes, of the operating",
            "system's randomness. Noise that the coordinator adds does not count.",
        ),
        _positive,
        protects=True,
    ),
    Key(
        "mode",
        '"malicious"',
        ('Secure sums only; the weakest threshold that is good enough, or "semi-honest".',),
        _one_of("malicious", "semi-honest"),
        protects=True,
        sums=True,
    ),
    Key(
        "min-cohort",
        "5",
        ("Secure sums only, and never of fewer nodes.",),
        _whole,
        protects=True,
        sums=True,
    ),
    Key(
        "min-neighbours",
        "20",
        ("Secure sums only; share masks with at least so many nodes, or with everybody.",),
        _whole,
        protects=True,
        sums=True,
    ),
    Key(
        "bits",
        "[8, 62]",
        ("Secure sums only; smallest and largest modulus, as powers of two.",),
        _bits,
        protects=True,
        sums=True,
    ),
    Key(
        "roster",
        '"roster.txt"',
        ("Secure sums only, with these nodes alone: a line NAME SHA256-OF-IDENTITY each.",),
        lambda value: isinstance(value, str),
        protects=True,
        sums=True,
    ),
    Key(
        "authority",
        '"ca.pem"',
        ("Secure sums only, with nodes that have a certificate of this authority.",),
        lambda value: isinstance(value, str),
        protects=True,
        sums=True,
    ),
    Key(
        "participations",
        "100",
        ("How often this node takes part, over all runs about the same data.",),
        lambda value: _whole(value, 1),
    ),
    Key(
        "epsilon",
        "8.0",
        (
            "How much privacy the node as a whole may spend, over all runs about the same data.",
            "Every update must carry noise of the nodes; a bare one would cost infinity.",
            'Left out, what the first run promised is the limit. "unlimited": each run keeps its',
            "own promise, all of them together have no limit, and nothing is asked of updates.",
        ),
        _budget,
        protects=True,
    ),
    Key(
        "record-epsilon",
        "8.0",
        (
            "The same for a single record. Every update must be trained with record-level",
            'privacy, or carry noise of the nodes; nothing is asked with "unlimited".',
        ),
        _budget,
        protects=True,
    ),
    Key(
        "metrics",
        '"clear"',
        (
            "How metrics leave: none; noised or summed, inside a protected update; clear, beside",
            "it. Left out, they follow the run: clear in a plain run, else inside or not at all.",
        ),
        _one_of(*LEVELS),
    ),
    Key(
        "counts",
        '"clear"',
        ("How numbers of examples leave, likewise.",),
        _one_of(*LEVELS),
    ),
    Key(
        "errors",
        '"full"',
        (
            "What the coordinator is told when the app fails: the full text, or the kind of error",
            "and its place in the code. Left out, the full text in a plain run only.",
        ),
        _one_of("place", "full"),
    ),
    Key(
        "other-options",
        '"any"',
        ('Options that are not listed below: any value, or those of the app\'s own files, "app".',),
        _one_of("any", "app"),
    ),
    Key(
        "options",
        "",
        ("Values that options of the run may have: one, a list, or a range. At the file's end.",),
        _rules,
    ),
)


def default_file() -> str:
    """The commented file that a node writes on its first start; it changes nothing."""
    lines = [
        "# The policy of this node. It belongs to the node's owner: neither the coordinator nor an",
        "# app can change it, and what is outside of it is refused by name, here and over there.",
        "# A line counts once its # is taken away; a changed file counts from the next message on.",
        "# What is in force says: umbel client policy --state DIR",
    ]
    for key in KEYS:
        lines += ["", *(f"# {line}" for line in key.meaning)]
        if key.example:
            lines.append(f"#{key.name} = {key.example}")
    lines += ["#[options]", "#local-epochs = {min = 1, max = 5}", '#optimizer = ["fedavg"]', ""]
    return "\n".join(lines)
