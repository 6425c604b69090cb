"""The box with which a run's report and model card begin: six questions, and nothing beside them.

Who is protected, against whom, under which conditions, how much, what is not protected, and how
to check it. Every sentence follows from the certificate; no other place of a page says anything
about privacy.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import loads

Answers = list[tuple[str, str]]
QUESTIONS = (
    "Who is protected",
    "Against whom",
    "Under which conditions",
    "How much",
    "What is not protected",
    "How to check it",
)
_NOBODY = "Nobody: this run made no promise of differential privacy about nodes or records."


def promise_of(run: RunDirectory) -> Answers:
    """The box of a run, from the files of its directory; it does not check the certificate."""
    path = run.certificate_path
    if path.is_file():
        try:
            certificate = loads(path.read_text(encoding="utf-8"))
            return promise(certificate, run.config(), certificate["key"])
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError):
            return _answers("Unknown: certificate.json cannot be read.", "", "", "", "", _check())
    charged = [
        line["epsilon"]
        for line in run.rounds()
        if isinstance(line.get("epsilon"), int | float) and not isinstance(line["epsilon"], bool)
    ]
    if charged:
        return _answers(
            "Nobody yet: a private run promises something once it has ended with a certificate.",
            "",
            "",
            f"Charged against model users so far: epsilon {said(charged[-1])}.",
            "",
            "",
        )
    return _answers(_NOBODY, "", _sums(_secure_of(run)), "", "", "")


def _secure_of(run: RunDirectory) -> Mapping[str, Any] | None:
    """How the secure sums of a run without a certificate were made."""
    told = [line["secure"] for line in run.rounds() if isinstance(line.get("secure"), Mapping)]
    keys = {"mode", "identities", "quorum", "nodes"}
    return told[-1] if told and keys <= told[-1].keys() else None


def promise(certificate: Mapping[str, Any], config: Mapping[str, Any], key: str) -> Answers:
    """The box of a run with a certificate.

    Args:
        certificate: or what it will say, before it is signed.
        config: the run's `config.json`.
        key: the coordinator's public key.
    """
    rows = {row["against"]: row for row in certificate["guarantees"]}
    record = rows["server"]["unit"] == "record"
    finite = [who for who, row in rows.items() if math.isfinite(row["epsilon"])]
    if not record and not certificate["events"]:
        return _answers(
            "Nobody had to be: no round of this run has released anything.",
            "",
            "",
            "",
            "",
            _check(key),
        )
    if not finite:
        return _answers(_none(certificate), "", "", "", "", _check(key))
    return _answers(
        _who(certificate, rows[finite[0]], record),
        _against(rows, record),
        " ".join(_conditions(certificate, config, record)),
        " ".join(_how_much(certificate, rows, finite, record)),
        " ".join(_not_protected(certificate, rows, record)),
        _check(key),
    )


def _answers(*texts: str) -> Answers:
    return [(q, text) for q, text in zip(QUESTIONS, texts, strict=True) if text]


def _none(certificate: Mapping[str, Any]) -> str:
    mechanism = certificate["mechanism"]
    if mechanism and mechanism["insecure"]:
        return "Nobody: the noise was seeded, so anyone with the seed can take it away."
    told = certificate["statements"]
    if told and told["without"]:
        return (
            f"Nobody as a whole: {len(told['without'])} of the nodes replied without a statement "
            "about their records."
        )
    return "Nobody: something was released without noise."


def _who(certificate: Mapping[str, Any], row: Mapping[str, Any], record: bool) -> str:
    if record:
        nodes = len({line["node"] for line in certificate["statements"]["nodes"]})
        return (
            f"Each record (such as one patient's) at each of the {nodes} nodes that took part: "
            "whether it is among its node's data. Not a node as a whole."
        )
    nodes = certificate["mechanism"]["nodes"]
    what = {
        "add-or-remove-one": "whether it took part at all, whatever its data",
        "zero-out-one": "what it contributed, if anything",
        "replace-one": "which data it has",
    }[row["relation"]]
    return f"Each of the {nodes} nodes, with all of its data as one unit: {what}."


def _against(rows: Mapping[str, Mapping[str, Any]], record: bool) -> str:
    if record:
        return (
            "Everyone outside the record's own node: the coordinator, other nodes, and whoever "
            "sees the models."
        )
    if math.isfinite(rows["server"]["epsilon"]):
        return "The coordinator, which receives what nodes send, and whoever sees the models."
    return "Whoever sees the models. Not against the coordinator, which sees each node's update."


def _conditions(
    certificate: Mapping[str, Any], config: Mapping[str, Any], record: bool
) -> Iterator[str]:
    if record:
        yield "Each node clips, samples and adds noise itself, with the parameters that it states."
        told = certificate["statements"]["nodes"]
        unsigned = sum(not row["signed"] for row in told)
        if unsigned:
            yield (
                f"{unsigned} of the {len(told)} statements are not signed, because simulated nodes "
                "have no keys: they are the word of whoever ran the simulation."
            )
        else:
            yield "Each statement is signed with its node's key, which you must know to be its."
    elif certificate["secure_sum"] is not None:
        rows = {row["against"]: row["epsilon"] for row in certificate["guarantees"]}
        if math.isfinite(rows["server"]):
            yield "Each node adds its share of the noise and runs its own software."
        else:
            yield "The coordinator adds the noise to the sum; you trust it to do so."
    elif certificate["mechanism"]["against"] == "server":
        yield "Each node adds all of its noise itself and runs its own software."
    else:
        yield "The coordinator adds the noise and keeps its draws secret; you trust it to do so."
    if certificate["secure_sum"] is not None:
        yield _sums(certificate["secure_sum"])
    if not record:
        if any(row["sampling"] == "poisson" for row in certificate["guarantees"]):
            yield "Who is drawn for a round stays secret from model users."
        yield "A person's data are on one node only."
    if config.get("engine") == "embedded":
        yield "The nodes of this run were simulated on one machine."


def _sums(secure: Mapping[str, Any] | None) -> str:
    if secure is None:
        return ""
    mode, share = {
        "malicious": ("even if it deviates from the protocol (malicious mode)", "a third"),
        "semi-honest": ("as long as it follows the protocol (semi-honest mode only)", "half"),
    }.get(secure["mode"], (str(secure["mode"]), "half"))
    identities = {
        "first-use": "taken on first use, so a coordinator that made some up from the start is "
        "not noticed",
        "roster-file": "from a roster file that each node holds",
        "authority": "certified by the federation's authority",
    }.get(secure["identities"], str(secure["identities"]))
    return (
        f"The coordinator sees sums of updates and no single one, {mode}; identities of nodes are "
        f"{identities}; at least {secure['quorum']} of a round's {secure['nodes']} nodes agree on "
        f"who is in the sum (quorum), and fewer than {share} of them work with the coordinator."
    )


def _how_much(
    certificate: Mapping[str, Any],
    rows: Mapping[str, Mapping[str, Any]],
    finite: list[str],
    record: bool,
) -> Iterator[str]:
    numbers = {(rows[who]["epsilon"], rows[who]["delta"]) for who in finite}
    for epsilon, delta in sorted(numbers):
        whom = ""
        if len(numbers) > 1:
            who = [who for who in finite if rows[who]["epsilon"] == epsilon]
            whom = f" against {_WHO[who[0]]}"
        yield (
            f"Epsilon {said(epsilon)} at delta {delta:g}{whom}: the odds of any conclusion change "
            f"by a factor of at most {_factor(epsilon)}, except with a probability of about 1 in "
            f"{1 / delta:,.0f}."
        )
    if record:
        least = min(row["epsilon"] for row in certificate["statements"]["nodes"])
        yield f"That is the largest of the nodes' numbers; the smallest is {said(least)}."
        return
    yield from _by_the_nodes(certificate["statements"])
    if certificate["scope"] == "population":
        yield (
            "The number counts everything that this ledger knows of the population "
            f"{certificate['population']!r}, this run and earlier ones."
        )
        return
    total = {row["against"]: row["epsilon"] for row in certificate["total"]}
    yield (
        "The number is of this run alone. Everything that this ledger knows of the population "
        f"{certificate['population']!r}, this run and others, comes to epsilon "
        f"{said(total[certificate['mechanism']['against']])}."
    )


def _by_the_nodes(told: Mapping[str, Any] | None) -> Iterator[str]:
    """What the nodes' own ledgers hold, beside what the coordinator's does."""
    rows = [row for row in told["nodes"] if row["unit"] == "node"] if told else []
    if not told or not rows:
        return
    signed = all(row["signed"] for row in rows)
    whose = "ledgers, which the coordinator cannot change" if signed else "ledgers (not signed)"
    yield (
        f"By their own {whose}, {len(rows)} nodes have spent "
        f"{_between([row['epsilon'] for row in rows])} in all, and "
        f"{_between([row['run_epsilon'] for row in rows])} of it in this run."
    )
    if told["without"]:
        yield f"{len(told['without'])} nodes have stated nothing of theirs."


def _between(values: list[float]) -> str:
    low, high = said(min(values)), said(max(values))
    return f"epsilon {high}" if low == high else f"epsilon {low} to {high}"


def _not_protected(
    certificate: Mapping[str, Any], rows: Mapping[str, Mapping[str, Any]], record: bool
) -> Iterator[str]:
    if record:
        yield "That a node took part, and what all its records have in common."
        yield "A person with several records at one node, or with records at several nodes."
    else:
        if math.isinf(rows["server"]["epsilon"]):
            yield "A node's update from the coordinator."
        yield "A person whose data are on several nodes; how many nodes there are."
    yield "The coordinator's own held-out examples, on which metrics are measured."
    yield "The operator's files (metrics, log, checkpoint, ledger), and how long rounds took."
    yield "Choices made by looking at the data, such as a norm, a learning rate or when to stop."
    for other in certificate["elsewhere"]:
        yield (
            f"Releases in another ledger (population {other['population']!r}), which knows "
            f"{other['nodes']} of these nodes: they are not counted here."
        )


COMMAND = "umbel verify RUN --key FILE"
_WHO = {"model-user": "whoever sees the models", "server": "the coordinator"}


def _check(key: str = "") -> str:
    text = (
        f"{COMMAND}, where RUN is the run's directory and FILE holds the coordinator's public key "
        "as it published it; without Umbel: verify_certificate.py, which comes with its source."
    )
    return f"{text} The certificate is signed with the key {key}." if key else text


def said(epsilon: float) -> str:
    """Epsilon with four digits, rounded up: no reader is told less than was spent."""
    if math.isinf(epsilon):
        return "infinite (no protection)"
    if not epsilon >= 1e-12:  # nothing, or not even a number
        return f"{epsilon:.4g}"
    return f"{_up(epsilon, 4):.4g}"


def _up(value: float, digits: int) -> float:
    """The value rounded up to so many digits."""
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale - 1e-9) / scale


def _factor(epsilon: float) -> str:
    if epsilon >= math.log(1e6):  # nearly no noise: e^epsilon may be larger than any float
        return f"e^{said(epsilon)}"
    size = math.exp(epsilon)
    return f"{math.ceil(size):,}" if size >= 100 else f"{_up(size, 3):.3g}"
