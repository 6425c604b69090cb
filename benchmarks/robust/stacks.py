"""What is attacked: an aggregator, alone, over buckets, or under secure sums, by a name.

median                 sees each update
krum/2                 means of random pairs
secure+median/3        secure sums of random buckets of three nodes
"""

from dataclasses import dataclass

from umbel.core.errors import ConfigError
from umbel.core.options import Value
from umbel.strategies.aggregators.named import RULES

SECURE = "secure+"
STANDS_NONE = ("mean", "norm-bound")
"""What makes no claim to stand a share of liars."""


@dataclass(frozen=True)
class Attacked:
    """A stack under attack.

    Attributes:
        rule: the aggregator's name.
        bucket: nodes of a bucket; 0 is none.
        secure: whether the server sees sums only.
    """

    rule: str
    bucket: int = 0
    secure: bool = False

    @classmethod
    def named(cls, name: str) -> "Attacked":
        """From its name.

        Raises:
            ConfigError: there is no such stack.
        """
        rule, _, bucket = name.removeprefix(SECURE).partition("/")
        if rule not in ("mean", *RULES):
            raise ConfigError(f"the rule is {rule!r}; it can be {', '.join(('mean', *RULES))}")
        if bucket and not bucket.isdecimal():
            raise ConfigError(f"the bucket of {name} is {bucket!r}; give a number, as in {rule}/2")
        return cls(rule, int(bucket or 0), name.startswith(SECURE))

    @property
    def claims(self) -> bool:
        """Whether it says to stand liars."""
        return self.rule not in STANDS_NONE

    def options(self, share: float) -> dict[str, Value]:
        """That make it, with what it is told of the share of liars."""
        made: dict[str, Value] = {"aggregator": self.rule}
        if self.rule != "mean":
            made["liars"] = share
        if self.bucket:
            made["bucket-size"] = self.bucket
        if self.secure:
            made["secure"] = True
        return made
