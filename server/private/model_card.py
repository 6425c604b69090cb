"""MODEL_CARD.md: what a person should know before using the model.

Says of the data what is public (how many nodes there are) and nothing that is not.
"""

import math
from collections.abc import Mapping
from typing import Any

from umbel.server.output.rundir import RunDirectory
from umbel.strategies.errors import RunError

_WHO = {
    "model-user": "someone who sees the models",
    "server": "the coordinator, which receives what nodes send",
}


def write_model_card(
    run: RunDirectory, certificate: Mapping[str, Any], metrics: Mapping[str, float]
) -> None:
    """Write the card of a private run.

    Raises:
        RunError: it cannot be written.
    """
    path = run.path / "MODEL_CARD.md"
    try:
        path.write_text(model_card(run.config(), certificate, metrics), encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be written ({error}); make room") from error


def model_card(
    config: Mapping[str, Any], certificate: Mapping[str, Any], metrics: Mapping[str, float]
) -> str:
    """The card's text."""
    mechanism = certificate["mechanism"]
    scores = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    parts = [
        f"# Model card: {config.get('app', 'a federation')}",
        f"Trained {certificate['issued'][:10]} by federated learning in Umbel; "
        f"run `{certificate['run']}`.",
        "## Data",
        f"{mechanism['nodes']} nodes, each with data of its own that never left it. The number "
        "of nodes is public. How much each node holds, and what, is private and not summarised "
        "here.",
        "## Metrics",
        "\n".join(["| metric | value |", "|---|---|", *scores])
        if scores
        else "No central evaluation.",
        "Measured by the coordinator on its own held-out examples, which are not protected.",
        "## Guarantee",
        _guarantee(certificate),
        "## Fine print",
        _fine_print(certificate),
        "Check it: `umbel verify` on the run directory recomputes every number from the ledger.",
    ]
    return "\n\n".join(parts) + "\n"


def _guarantee(certificate: Mapping[str, Any]) -> str:
    """One plain sentence."""
    mechanism = certificate["mechanism"]
    if mechanism["insecure"]:
        return "**None.** The noise was seeded: anyone with the seed can take it away."
    item = next(row for row in certificate["guarantees"] if row["against"] == mechanism["against"])
    if math.isinf(item["epsilon"]):
        return "**None.** Something was released without noise."
    epsilon = float(item["epsilon"])
    # Nearly no noise: e^epsilon may be larger than any float.
    size = f"{math.exp(epsilon):.3g}" if epsilon < math.log(1e6) else f"e^{epsilon:.3g}"
    what = "Whether any one node took part, whatever its data,"
    if item["relation"] == "zero-out-one":
        what = "What any one node contributed, if anything,"
    return (
        f"{what} changes the odds of anything that "
        f"{_WHO[item['against']]} can conclude by a factor of at most {size} "
        f"(epsilon {epsilon:.4g}), except with a probability of {item['delta']:g} (delta)."
    )


def _fine_print(certificate: Mapping[str, Any]) -> str:
    mechanism = certificate["mechanism"]
    lines = [
        f"against {row['against']} ({_WHO[row['against']]}): epsilon "
        f"{_number(row['epsilon'])} at delta {row['delta']:g}, {row['relation']} {row['unit']}, "
        f"sampling {row['sampling']}, accountant {row['accountant']}"
        for row in certificate["guarantees"]
    ]
    lines += [
        f"layers: {mechanism['stack']}; cohorts: {mechanism['cohort']}, "
        f"{mechanism['expected_cohort']:g} of {mechanism['nodes']} nodes expected",
        "the unit is one node: a person whose data are on several nodes is protected less",
        f"the numbers include everything released about the population "
        f"{certificate['population']!r} so far, this run and earlier ones",
        "choices made by looking at the data (norms, learning rates, stopping) cost privacy that "
        "is not counted here",
        f"covered: {certificate['covers']}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _number(epsilon: float) -> str:
    return "infinite (no protection)" if math.isinf(epsilon) else f"{epsilon:.4g}"
