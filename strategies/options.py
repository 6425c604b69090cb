"""The options that every federation understands, and how options are read and checked."""

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from umbel.strategies.cohort import cohort_named
from umbel.strategies.errors import ConfigError
from umbel.strategies.optimizers import optimizer_named
from umbel.strategies.schedules import factor

Value = bool | int | float | str
Options = Mapping[str, Value]
Group = TypeVar("Group")


@dataclass(frozen=True)
class RunOptions:
    """How a federation is run; the option names are these with dashes for underscores.

    Attributes:
        rounds: how many rounds to train.
        seed: fixes the partition, the first model, local shuffles and (without privacy) cohorts.
        cohort: `all`, `fixed` or `poisson`.
        cohort_size: nodes in a round; expected nodes for `poisson`.
        cohort_cap: the most nodes of a Poisson round; 0 is no cap.
        min_replies: a round with fewer usable replies leaves the model as it is.
        round_timeout: seconds to wait for the replies of a round; 0 waits for ever.
        optimizer: `fedavg`, `fedavgm`, `fedadam`, `fedyogi` or `fedadagrad`.
        server_learning_rate: of the optimiser; 0 is its own, 1 for the averages and 0.1 for the
            adaptive ones.
        server_momentum: of `fedavgm`.
        beta_1: of the adaptive optimisers; beta_2, tau likewise.
        schedule: of the nodes' learning rate: `constant`, `cosine`, `linear`, `step`,
            `exponential`.
        schedule_gamma: see `umbel.strategies.schedules.factor`; schedule_every likewise.
        warmup_rounds: rounds over which the learning rate rises.
        buffers: `local` keeps running statistics on each node; `mean` averages them.
        evaluate_every: rounds between central evaluations; the last round always has one.
        federated_every: rounds between evaluations on the nodes' own test data; 0 is only at
            the end, -1 never.
        federated_nodes: how many nodes evaluate; 0 is all.
        early_stop_patience: evaluations without improvement before the run stops; 0 is never.
        early_stop_metric: what must improve: `loss`, or any metric that should grow.
        keep: which model the run ends with: the `last` or the `best` one evaluated.
        average_from: from this round on, the run ends with the mean of the models; 0 is off.
    """

    rounds: int = 10
    seed: int = 0
    cohort: str = "all"
    cohort_size: float = 0.0
    cohort_cap: int = 0
    min_replies: int = 1
    round_timeout: float = 3600.0
    optimizer: str = "fedavg"
    server_learning_rate: float = 0.0
    server_momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.99
    tau: float = 1e-3
    schedule: str = "constant"
    schedule_gamma: float = 0.0
    schedule_every: int = 10
    warmup_rounds: int = 0
    buffers: str = "local"
    evaluate_every: int = 1
    federated_every: int = 0
    federated_nodes: int = 0
    early_stop_patience: int = 0
    early_stop_metric: str = "loss"
    keep: str = "last"
    average_from: int = 0

    def __post_init__(self) -> None:
        self._check_counts()
        choose("buffers", self.buffers, ("local", "mean"))
        choose("keep", self.keep, ("last", "best"))
        if self.server_learning_rate < 0:
            raise ConfigError(
                f"server-learning-rate is {self.server_learning_rate}; it must be at least 0"
            )
        for name in ("server_momentum", "beta_1", "beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{dashed(name)} is {getattr(self, name)}; it must be from 0 up to 1"
                )
        if self.tau <= 0:
            raise ConfigError(f"tau is {self.tau}; it must be above 0")
        # each of these raises where its options do not make one, before a run has begun
        self.learning_rate_factor(self.warmup_rounds + 1)
        optimizer_named(self.optimizer, learning_rate=self.server_learning_rate)
        cohort_named(self.cohort, self.cohort_size, self.cohort_cap)

    def _check_counts(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{dashed(name)} is {value}; it must be finite")
        least = {"rounds": 1, "evaluate_every": 1, "schedule_every": 1, "federated_every": -1}
        least["min_replies"] = 1
        for name in (
            *least,
            *("cohort_size", "cohort_cap", "round_timeout", "warmup_rounds", "seed"),
            *("federated_nodes", "early_stop_patience", "average_from", "schedule_gamma"),
        ):
            if getattr(self, name) < least.get(name, 0):
                raise ConfigError(
                    f"{dashed(name)} is {getattr(self, name)}; "
                    f"it must be at least {least.get(name, 0)}"
                )

    @classmethod
    def defaults(cls) -> dict[str, Value]:
        """Every option with its default."""
        return defaults_of(cls)

    @classmethod
    def read(cls, options: Options) -> "RunOptions":
        """The options of a run; others in the mapping are left alone."""
        return read_into(cls, options)

    def learning_rate_factor(self, number: int) -> float:
        """What the nodes' learning rate is multiplied by in round `number`."""
        return factor(
            self.schedule,
            number,
            self.rounds,
            gamma=self.schedule_gamma,
            every=self.schedule_every,
            warmup=self.warmup_rounds,
        )


def dashed(name: str) -> str:
    """A field's name as an option."""
    return name.replace("_", "-")


def choose(name: str, value: str, allowed: Iterable[str]) -> str:
    """`value`, if it is one of `allowed`; else a ConfigError that lists them."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; it can be {', '.join(allowed)}")
    return value


def defaults_of(group: type[Any]) -> dict[str, Value]:
    """The options of a group, a dataclass whose fields all have defaults."""
    return {dashed(field.name): field.default for field in fields(group)}  # type: ignore[misc]  # all have one


def read_into(group: type[Group], options: Options) -> Group:
    """The group with what a run says of it; other names in the mapping are left alone.

    Raises:
        ConfigError: a value has the wrong type, or the group refuses it.
    """
    own = defaults_of(group)
    return group(
        **{
            name.replace("-", "_"): checked(name, value, own[name])
            for name, value in options.items()
            if name in own
        }
    )


def checked(name: str, value: Any, default: Value) -> Value:
    """`value` in the type of `default`: an int is a float too, nothing else is converted.

    Raises:
        ConfigError: another type, or NaN. Infinity is a number: no budget, no bound.
    """
    kind = type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ConfigError(f"{name} is {value!r}, but it must be {words[kind]}, such as {default!r}")
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(f"{name} is NaN; give a number, such as {default!r}")
    return value


def parse(texts: Iterable[str]) -> dict[str, Value]:
    """What `-c "rounds=5 recipe=quick"` says, as TOML values; a bare word is a text.

    A text that ends in `.toml` is a file of options. Later values win.

    Raises:
        ConfigError: something that is not `name=value`, or a file that cannot be read.
    """
    options: dict[str, Value] = {}
    for text in texts:
        if text.strip().endswith(".toml") and "=" not in text:
            options |= _file(text.strip())
            continue
        pairs = re.findall(r"([^\s=]+)\s*=\s*('[^']*'|\"[^\"]*\"|\S+)", text)
        left = re.sub(r"([^\s=]+)\s*=\s*('[^']*'|\"[^\"]*\"|\S+)", "", text).strip()
        if left:
            raise ConfigError(f"{left!r} is not name=value; write for example -c 'rounds=5 seed=1'")
        options |= {name: _value(value) for name, value in pairs}
    return options


def _value(text: str) -> Value:
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, bool | int | float | str) else text


def _file(path: str) -> dict[str, Value]:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return flatten(tomllib.load(file))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the options file {path} cannot be read: {error}") from error


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Nested tables as dotted names, the way Flower does it.

    Raises:
        ConfigError: a value that is neither a table nor a bool, number or text.
    """
    flat: dict[str, Value] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        elif isinstance(value, bool | int | float | str):
            flat[prefix + name] = value
        else:
            raise ConfigError(
                f"the option {prefix + name} is {value!r}; options are true or false, numbers and "
                "texts"
            )
    return flat


def override(known: Options, changes: Options) -> dict[str, Value]:
    """`known` with `changes`, each of a known name and of that option's type.

    Raises:
        ConfigError: an unknown name (with the closest known one), or a wrong type.
    """
    result = dict(known)
    for name, value in changes.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"there is no option {name!r}; {hint}")
        result[name] = checked(name, value, known[name])
    return result
