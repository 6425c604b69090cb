"""`umbel privacy`: planning, before anything runs."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from umbel.commands.groups import Commands
from umbel.core.errors import ConfigError
from umbel.core.options import parse
from umbel.privacy.budget.accounting import Spent, curve, poisson, spent
from umbel.privacy.budget.calibrate import calibrate
from umbel.privacy.budget.calibrate import noise_multiplier as noise_for
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge, relation_name
from umbel.server.output import strict
from umbel.server.output.progress import count

if TYPE_CHECKING:
    from umbel.planning import Schedule

app = Commands(
    name="privacy",
    help="Plan a private run: epsilon of a schedule, or noise for a budget.",
    no_args_is_help=True,
)

SamplingRate = Annotated[
    float,
    typer.Option(help="Probability that a node takes part in a round (Poisson); 1 is everyone."),
]
Rounds = Annotated[int, typer.Option(help="Number of rounds.")]
Delta = Annotated[float, typer.Option(help="Well below 1 / number of nodes.")]
Accountant = Annotated[
    str, typer.Option(help="pld, which is reported; or rdp, a looser upper bound.")
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        "-c", "--run-config", metavar="'K=V ...'",
        help="Options of a run, such as mechanism=tree separation=10, or secure=true.",
    ),
]  # fmt: skip
Nodes = Annotated[int, typer.Option(help="How many nodes there are; for --run-config.", min=0)]
Parameters = Annotated[int, typer.Option(help="Of the model; for --run-config.", min=0)]
Plot = Annotated[
    Path | None, typer.Option(help="Draw epsilon against rounds to this file (.png, .svg, .pdf).")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def epsilon(
    noise_multiplier: Annotated[
        float, typer.Option(help="Standard deviation of the noise over the clipping norm.")
    ],
    sampling_rate: SamplingRate,
    rounds: Rounds,
    delta: Delta,
    accountant: Accountant = "pld",
    config: Config = None,
    nodes: Nodes = 0,
    parameters: Parameters = 0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Epsilon of a schedule of rounds."""
    plan = _plan(config, nodes, parameters, sampling_rate, rounds)
    if plan is not None and not plan.stack.waiting:
        raise ConfigError(
            f"the noise of {plan.stack} follows from epsilon; ask for it with: umbel privacy noise"
        )
    try:
        _whole(rounds)
        charges = _charges(plan, noise_multiplier, sampling_rate, rounds)
        result = spent(charges, delta, accountant=accountant, cross_check=True)  # type: ignore[arg-type]  # Typer has checked the choice
        if not math.isfinite(result.epsilon):
            raise ValueError(
                f"noise-multiplier is {noise_multiplier:g}, which is no noise: epsilon is "
                "infinite; give a larger one, such as 1"
            )
    except ValueError as error:
        raise ConfigError(_options(error)) from error
    if plot is not None:
        _draw(plot, charges, rounds, delta)
    said = _about(plan, noise_multiplier, sampling_rate, rounds, delta, result)
    said["epsilon_rdp"] = result.cross_check if accountant == "pld" else result.epsilon
    _say(said, f"epsilon {result.epsilon:.4f} at delta {delta:g}", as_json, plot, accountant)


@app.command()
def noise(
    epsilon: Annotated[float, typer.Option(help="The budget.")],
    sampling_rate: SamplingRate,
    rounds: Rounds,
    delta: Delta,
    accountant: Accountant = "pld",
    config: Config = None,
    nodes: Nodes = 0,
    parameters: Parameters = 0,
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Noise multiplier that keeps a schedule of rounds within a budget."""
    budget = (f"epsilon={epsilon} delta={delta}",)
    plan = _plan([*(config or []), *budget] if config else None, nodes, parameters, sampling_rate,
                 rounds)  # fmt: skip
    try:
        _whole(rounds)
        if plan is not None and not plan.stack.waiting:
            found = plan.own_noise or plan.stack.noise_multiplier or 0.0
        elif plan is not None:
            found = calibrate(plan.charges, epsilon, delta, accountant=accountant)  # type: ignore[arg-type]  # Typer has checked the choice
        else:
            found = noise_for(epsilon, delta, sampling_rate, rounds, accountant=accountant)  # type: ignore[arg-type]  # Typer has checked the choice
        charges = _charges(plan, found, sampling_rate, rounds)
        reached = spent(charges, delta, accountant=accountant)  # type: ignore[arg-type]  # Typer has checked the choice
    except ValueError as error:
        raise ConfigError(_options(error)) from error
    if plot is not None:
        _draw(plot, charges, rounds, delta)
    said = _about(plan, found, sampling_rate, rounds, delta, reached)
    said["target_epsilon"] = epsilon
    sentence = f"noise multiplier {found:g} spends epsilon {reached.epsilon:.4f} at delta {delta:g}"
    _say(said, sentence, as_json, plot, accountant)


def _plan(
    config: list[str] | None, nodes: int, parameters: int, sampling_rate: float, rounds: int
) -> "Schedule | None":
    """The schedule that the options describe; None is Poisson cohorts with central noise."""
    if not config and not (nodes and parameters):
        return None
    if not nodes or not parameters:
        raise ConfigError(
            "--run-config needs --nodes and --parameters: what a mechanism costs depends on how "
            "many nodes there are, and of how many numbers the model is"
        )
    from umbel.planning import schedule

    return schedule(
        parse(config or []), rounds=rounds, sampling_rate=sampling_rate, nodes=nodes,
        parameters=parameters,
    )  # fmt: skip


def _charges(
    plan: "Schedule | None", multiplier: float, sampling_rate: float, rounds: int
) -> Mapping[Charge, int]:
    if plan is not None:
        return plan.charges(multiplier)
    return {Charge(poisson(multiplier, sampling_rate)): rounds}


def _about(
    plan: "Schedule | None",
    multiplier: float,
    sampling_rate: float,
    rounds: int,
    delta: float,
    result: Spent,
) -> dict[str, Any]:
    """What both commands say of a schedule."""
    said = {
        "epsilon": result.epsilon,
        "delta": delta,
        "noise_multiplier": multiplier,
        "sampling_rate": sampling_rate,
        "rounds": rounds,
        "accountant": result.accountant,
        "relation": relation_name(result.relation),
        "unit": "client",
        "against": "model-user",
    }
    if plan is not None:
        claim = plan.claim(multiplier)
        said |= {
            "unit": claim.unit,
            "against": claim.against,
            "stack": str(plan.stack),
            "cohort": plan.cohort.name,
            "nodes": plan.nodes,
            "noise_over_norm": plan.noise_over_norm(multiplier),
        }
    return said


def _whole(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be a whole number of 1 or more, but it is {rounds!r}")


def _options(error: ValueError) -> str:
    """The mathematics' sentence with the option's dashes, so that it reads as typed."""
    text = str(error)
    return f"--{text}" if text.partition(" ")[0] in _OPTIONS else text


_OPTIONS = ("epsilon", "delta", "noise-multiplier", "sampling-rate", "rounds", "accountant")


def _say_how_loud(ratio: float) -> None:
    from umbel.planning import DROWNED

    typer.echo(f"noise in the average update: {ratio:.3g} times the clipping norm")
    if ratio > DROWNED:
        typer.echo(
            "note: that noise drowns the sum at this cohort; take more nodes a round, fewer "
            "parameters, or a larger epsilon"
        )


_NOTES = {
    "rdp": "out of reach of the exact accountant (epsilon above 60, little noise, or a very small "
    "delta), so this is the upper bound of Renyi DP",
    "gaussian": "out of reach of the exact accountant (epsilon above 60, little noise, or a very "
    "small delta), so this is the upper bound of the rounds without their sampling",
}
"""What to say where another accountant than the one that was asked for has answered."""


def _say(said: dict[str, Any], sentence: str, as_json: bool, plot: Path | None, asked: str) -> None:
    if as_json:
        typer.echo(strict.dumps(said))
        return
    sampling = "Poisson sampling" if "cohort" not in said else f"{said['cohort']} cohorts, sampling"
    whom = "whoever sees the models, not from the server"
    if said["against"] == "server":
        whom = "the server and whoever sees the models"
    typer.echo(
        f"{sentence}\n{count(said['rounds'], 'round')}, {sampling} rate "
        f"{said['sampling_rate']:g}, accountant {said['accountant']}; hides whether one node takes "
        f"part ({said['relation'].replace('-', ' ')}) from {whom}"
    )
    if "noise_over_norm" in said:
        _say_how_loud(said["noise_over_norm"])
    note = _NOTES.get(said["accountant"])
    if note is not None and asked == "pld" and said["relation"] == relation_name(ADD_OR_REMOVE):
        typer.echo(f"note: {note}")
    if plot is not None:
        typer.echo(f"drawn to {plot}")


def _draw(path: Path, charges: Mapping[Charge, int], rounds: int, delta: float) -> None:
    from matplotlib.figure import Figure

    if len(charges) != 1:
        raise ConfigError(
            "--plot draws rounds that all cost the same; those of this mechanism do not"
        )
    (charge,) = charges
    points = curve(charge, rounds, delta)
    figure = Figure(figsize=(6, 3.7), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot([n for n, _ in points], [value for _, value in points], color="#2a6f97")
    axes.set_xlabel("rounds")
    axes.set_ylabel("epsilon")
    axes.set_title(f"Epsilon at delta {delta:g}", loc="left", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} cannot be written ({error}); name a .png, .svg or .pdf file in a "
            "folder that exists"
        ) from error
