"""`umbel privacy`: planning, before anything runs."""

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from umbel.commands import Commands
from umbel.privacy.budget.accounting import curve, poisson, spent
from umbel.privacy.budget.calibrate import noise_multiplier as noise_for
from umbel.privacy.budget.events import ADD_OR_REMOVE, Charge, relation_name
from umbel.server.output import strict
from umbel.strategies.errors import ConfigError

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
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Epsilon of a schedule of rounds."""
    try:
        charge = Charge(poisson(noise_multiplier, sampling_rate))
        _whole(rounds)
        result = spent(
            {charge: rounds},
            delta,
            accountant=accountant,  # type: ignore[arg-type]
            cross_check=True,
        )
        if not math.isfinite(result.epsilon):
            raise ValueError(
                f"noise-multiplier is {noise_multiplier:g}, which is no noise: epsilon is "
                "infinite; give a larger one, such as 1"
            )
    except ValueError as error:
        raise ConfigError(_options(error)) from error
    if plot is not None:
        _draw(plot, charge, rounds, delta)
    said: dict[str, Any] = {
        "epsilon": result.epsilon,
        "delta": delta,
        "noise_multiplier": noise_multiplier,
        "sampling_rate": sampling_rate,
        "rounds": rounds,
        "accountant": result.accountant,
        "epsilon_rdp": result.cross_check if accountant == "pld" else result.epsilon,
        "relation": relation_name(ADD_OR_REMOVE),
        "unit": "client",
        "against": "model-user",
    }
    _say(said, f"epsilon {result.epsilon:.4f} at delta {delta:g}", as_json, plot, accountant)


@app.command()
def noise(
    epsilon: Annotated[float, typer.Option(help="The budget.")],
    sampling_rate: SamplingRate,
    rounds: Rounds,
    delta: Delta,
    accountant: Accountant = "pld",
    plot: Plot = None,
    as_json: Json = False,
) -> None:
    """Noise multiplier that keeps a schedule of rounds within a budget."""
    try:
        _whole(rounds)
        found = noise_for(
            epsilon,
            delta,
            sampling_rate,
            rounds,
            accountant=accountant,  # type: ignore[arg-type]
        )
        charge = Charge(poisson(found, sampling_rate))
        reached = spent({charge: rounds}, delta, accountant=accountant)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(_options(error)) from error
    if plot is not None:
        _draw(plot, charge, rounds, delta)
    said: dict[str, Any] = {
        "noise_multiplier": found,
        "epsilon": reached.epsilon,
        "target_epsilon": epsilon,
        "delta": delta,
        "sampling_rate": sampling_rate,
        "rounds": rounds,
        "accountant": reached.accountant,
        "relation": relation_name(ADD_OR_REMOVE),
        "unit": "client",
        "against": "model-user",
    }
    sentence = f"noise multiplier {found:g} spends epsilon {reached.epsilon:.4f} at delta {delta:g}"
    _say(said, sentence, as_json, plot, accountant)


def _whole(rounds: int) -> None:
    if rounds < 1:
        raise ValueError(f"rounds must be a whole number of 1 or more, but it is {rounds!r}")


def _options(error: ValueError) -> str:
    """The mathematics' sentence with the option's dashes, so that it reads as typed."""
    text = str(error)
    return f"--{text}" if text.partition(" ")[0] in _OPTIONS else text


_OPTIONS = ("epsilon", "delta", "noise-multiplier", "sampling-rate", "rounds", "accountant")


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
    typer.echo(
        f"{sentence}\n"
        f"{said['rounds']} rounds, Poisson sampling rate {said['sampling_rate']:g}, "
        f"accountant {said['accountant']}; hides whether one node takes part (add or remove one) "
        "from whoever sees the models, not from the server"
    )
    note = _NOTES.get(said["accountant"])
    if note is not None and asked == "pld":
        typer.echo(f"note: {note}")
    if plot is not None:
        typer.echo(f"drawn to {plot}")


def _draw(path: Path, charge: Charge, rounds: int, delta: float) -> None:
    from matplotlib.figure import Figure

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
