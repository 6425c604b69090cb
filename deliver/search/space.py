"""A search space in one line: `learning-rate=log(0.001,1) batch-size=[16,32]`.

    log(a,b)    a number between, its logarithm uniform
    real(a,b)   a number between, uniform
    int(a,b)    a whole number from a to b
    [a,b,...]   one of these

A range of an option that takes whole numbers has whole ends, and gives whole numbers.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from umbel.core.errors import ConfigError
from umbel.core.options import Value, checked

Kind = Literal["log", "real", "int", "choice"]
_PART = re.compile(r"\s*([A-Za-z][\w.-]*)\s*=\s*(?:(log|real|int)\(([^()]*)\)|\[([^\[\]]*)\])\s*")
EXAMPLE = "such as 'learning-rate=log(0.001,1) batch-size=[16,32] local-epochs=int(1,5)'"


class Trial(Protocol):
    """Who picks values: a trial of Optuna, or chance alone."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        """A number of the range."""
        ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        """A whole number of the range, ends included."""
        ...

    def suggest_categorical(self, name: str, choices: list[Any]) -> Any:
        """One of these."""
        ...


@dataclass(frozen=True)
class Dimension:
    """One option and the values that it can take.

    Attributes:
        name: of the option.
        kind: how values lie.
        low: smallest, where they are a range.
        high: largest.
        choices: all, where they are none.
        whole: whether they are whole numbers.
    """

    name: str
    kind: Kind
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()
    whole: bool = False

    def pick(self, trial: Trial) -> Value:
        """A value for a trial."""
        if self.kind == "choice":
            value: Value = trial.suggest_categorical(self.name, list(self.choices))
            return value
        log = self.kind == "log"
        if self.whole:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=log)
        return trial.suggest_float(self.name, self.low, self.high, log=log)

    def __str__(self) -> str:
        if self.kind == "choice":
            return f"{self.name}=[{','.join(map(str, self.choices))}]"
        return f"{self.name}={self.kind}({self.low:g},{self.high:g})"


def parse_space(text: str, known: Mapping[str, Value]) -> list[Dimension]:
    """The dimensions that a text names.

    Args:
        text: dimensions with spaces between them.
        known: every option of the app, with its default.

    Raises:
        ConfigError: a typo: of the form, of a name, or of a value.
    """
    found: list[Dimension] = []
    place = 0
    while place < len(text.rstrip()):
        match = _PART.match(text, place)
        if match is None:
            raise ConfigError(
                f"--space cannot be read at {text[place:].split()[0]!r}; write {EXAMPLE}"
            )
        name, kind, ends, listed = match.groups()
        found.append(_dimension(name, kind, ends, listed, known))
        place = match.end()
    if not found:
        raise ConfigError(f"--space is empty; write {EXAMPLE}")
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--space names {name} twice; give one range for it")
    return found


def _dimension(
    name: str, kind: str | None, ends: str | None, listed: str | None, known: Mapping[str, Value]
) -> Dimension:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else "see: umbel options APP"
        raise ConfigError(f"--space names the option {name!r}, which there is not; {hint}")
    default = known[name]
    if kind is None:
        values = list(_values(name, listed or ""))
        choices = tuple(checked(name, value, default) for value in values)
        if len(set(choices)) != len(choices):
            raise ConfigError(f"--space gives one value of {name} twice")
        return Dimension(name, "choice", choices=choices)
    both = list(_values(name, ends or ""))
    numbers = [v for v in both if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(both) != 2 or len(numbers) != 2:
        raise ConfigError(f"--space gives {name} {kind}({ends}); a range has two numbers, its ends")
    if isinstance(default, bool | str):
        raise ConfigError(
            f"--space gives {name} a range, but it is {type(default).__name__}, such as "
            f"{default!r}; list its values: {name}=[a,b]"
        )
    low, high = numbers
    whole = isinstance(default, int)
    if whole or kind == "int":
        for end in (low, high):
            if float(end) != int(end):
                raise ConfigError(f"--space gives {name} the end {end}, but it takes whole numbers")
    if not low < high or (kind == "log" and low <= 0):
        cure = "of a logarithm are above 0 and " if kind == "log" else ""
        raise ConfigError(f"--space gives {name} {kind}({ends}); the ends {cure}grow")
    chosen: Kind = "log" if kind == "log" else "int" if whole or kind == "int" else "real"
    return Dimension(name, chosen, float(low), float(high), whole=whole or kind == "int")


def _values(name: str, text: str) -> Iterator[Value]:
    for part in text.split(","):
        word = part.strip()
        if not word:
            raise ConfigError(f"--space has an empty value for {name}; write {EXAMPLE}")
        try:
            value = tomllib.loads(f"value = {word}")["value"]
        except tomllib.TOMLDecodeError:
            value = word
        yield value
