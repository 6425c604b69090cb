"""The policy of a node: one TOML file of its owner, which no coordinator and no app can change.

    answer = ["train", "evaluate"]      kinds of message that are answered at all
    min-noise = 1.0                     noise that an update must carry when it leaves
    [options]
    local-epochs = {min = 1, max = 5}   values that the run's options may have

What a file says holds in addition to what is always so (beside a secure or private stack nothing
travels). `umbel client policy` prints the file and what is in force. Who enforces it, and on what,
says `umbel.clients.gate`. Every key may be left out; see `KEYS` for all of them.
"""

import math
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from umbel.core.errors import ConfigError, RunError
from umbel.strategies.secure.policy import Policy

if TYPE_CHECKING:  # a node's connection, which imports this, holds no tensor
    from umbel.strategies.protection import Protection

POLICY = "policy"
"""Key of a node's configuration that names its policy file."""
FORMER = "secure-policy"
"""Its former name, which is read too."""

ANSWERS = ("train", "evaluate", "statistics", "private-mean", "query")
UNLIMITED = "unlimited"
"""What an epsilon may be that no first promise shall limit; TOML's `inf` says the same."""
LEVELS = ("none", "noised", "summed", "clear")
"""How metrics and counts may leave: what stands later in the list tells more."""


class PolicyError(RunError):
    """What was asked of a node is outside its owner's policy.

    Attributes:
        key: of the policy.
    """

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


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


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _positive(value: Any) -> bool:
    return _number(value) and 0 < value < math.inf


def _budget(value: Any) -> bool:
    return value == UNLIMITED or (_number(value) and value > 0)


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
        limits = [each for each in value.values() if _number(each) and not math.isnan(each)]
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


@dataclass(frozen=True)
class NodePolicy:
    """What one node allows. The default is a node without a policy file.

    Attributes:
        answer: kinds of message.
        apps: SHA-256 in hex of the apps that may run; None is any.
        unprotected: whether a bare update may leave.
        max_norm: of an update; None is any, and none at all.
        min_noise: noise multiplier, made on the nodes; None is none.
        sums: the limits on secure sums.
        only_sums: the key for whose sake updates leave in secure sums alone, or empty.
        participations: of this node; None is no limit.
        epsilon: of this node; None is what was promised first, infinity is no limit.
        record_epsilon: of each of its records, likewise.
        metrics: the most telling way in which they may leave; None follows the run.
        counts: of examples, likewise.
        errors: `place` or `full`; None follows the run.
        other_options: `any` or `app`.
        options: rules by option.
        given: the keys that the file has.
    """

    answer: frozenset[str] = frozenset(ANSWERS)
    apps: frozenset[str] | None = None
    unprotected: bool = True
    max_norm: float | None = None
    min_noise: float | None = None
    sums: Policy = field(default_factory=Policy)
    only_sums: str = ""
    participations: int | None = None
    epsilon: float | None = None
    record_epsilon: float | None = None
    metrics: str | None = None
    counts: str | None = None
    errors: str | None = None
    other_options: str = "any"
    options: Mapping[str, Any] = field(default_factory=dict)
    given: tuple[str, ...] = ()

    @staticmethod
    def load(path: Path) -> "NodePolicy":
        """Reads a policy file.

        Raises:
            ConfigError: it cannot be read, has an unknown key or a value of the wrong kind.
        """
        try:
            found = tomllib.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ConfigError(f"the policy file {path} cannot be read: {error}") from error
        known = {key.name: key for key in KEYS}
        for name, value in found.items():
            if name not in known or not known[name].fits(value):
                raise ConfigError(
                    f"{path} says {name} = {value!r}, which is no such setting; known are "
                    f"{', '.join(sorted(known))}; umbel client policy explains them"
                )
        for name in ("epsilon", "record-epsilon"):
            if found.get(name) == UNLIMITED:
                found[name] = math.inf
        protecting = [
            key.name for key in KEYS if key.protects and found.get(key.name) not in (None, math.inf)
        ]
        if protecting and found.get("unprotected") is True:
            raise ConfigError(
                f"{path} says unprotected = true and {protecting[0]}, which asks for protection; "
                "leave out one of them"
            )
        sums = [key.name for key in KEYS if key.sums and key.name in found]
        plain = {name.replace("-", "_"): found[name] for name in found if name not in sums}
        for name in ("answer", "apps"):
            if name in plain:
                plain[name] = frozenset(each.lower() for each in plain[name])
        return NodePolicy(
            **{"unprotected": not protecting, **plain},
            sums=_sums(path, {name: found[name] for name in sums}),
            only_sums=sums[0] if sums else "",
            given=tuple(found),
        )

    # ---- what is asked

    def check_kind(self, kind: str) -> None:
        """Raises PolicyError where messages of a kind are not answered."""
        if kind not in self.answer:
            raise PolicyError(
                "answer",
                f"it answers {_listed(sorted(self.answer))}, and not {kind}; the node's owner can "
                f'add "{kind}" to answer',
            )

    def check_app(self, digest: str) -> None:
        """Raises PolicyError where an app may not run here, or where nobody knows its files."""
        if self.apps is None or digest in self.apps:
            return
        what = f"this app is {digest[:12]}" if digest else "this engine cannot tell which app runs"
        raise PolicyError(
            "apps", f"only the listed apps run here, and {what}; install one that the owner listed"
        )

    def check_options(self, options: Mapping[str, Any], own: Mapping[str, Any] | None) -> None:
        """Whether a run's options may be what they are.

        Args:
            options: complete ones.
            own: what they are in the app's own files; None where those are not known.

        Raises:
            PolicyError: naming the option, its value and what is allowed.
        """
        for name, rule in self.options.items():
            if name in options and not _allows(rule, options[name]):
                raise PolicyError(
                    f"options.{name}",
                    f"{name} may be {_said(rule)}, and the run has {options[name]!r}; run it with "
                    f"an allowed {name}",
                )
        if self.other_options == "any":
            return
        if own is None:
            raise PolicyError(
                "other-options",
                'other-options = "app" needs the app\'s files, which this engine does not show; '
                "list the options, or use the link engine",
            )
        for name, value in options.items():
            if name not in self.options and (name not in own or not _same(own[name], value)):
                raise PolicyError(
                    "other-options",
                    f"{name} is {value!r}, and the app's own value is {own.get(name)!r}; run it "
                    f"without changing {name}, or have the owner list it under options",
                )

    # ---- what is about to leave

    def check_protection(self, protection: "Protection", *, records: bool = False) -> None:
        """Whether an update that is protected in this way may leave.

        Args:
            protection: of the update, read off the stack.
            records: it is trained with record-level privacy, with real noise.

        Raises:
            PolicyError: naming the key, what it says and what would leave.
        """
        if self.only_sums and not protection.sealed:
            raise PolicyError(
                self.only_sums,
                f"{self.only_sums} asks for secure sums, and in this run the node's update would "
                "leave without one; run it with secure=true",
            )
        limited = self.epsilon is not None and self.epsilon < math.inf
        if protection.seeded and (self.min_noise is not None or limited):
            key = "min-noise" if self.min_noise is not None else "epsilon"
            raise PolicyError(
                key,
                f"{key} asks for noise, and insecure-noise-seed makes noise that the coordinator "
                "can repeat; leave that option out",
            )
        if self.min_noise is not None and not protection.noise >= self.min_noise:
            raise PolicyError(
                "min-noise",
                f"updates leave with a noise multiplier of at least {self.min_noise:g}, and the "
                f"nodes of this run make {protection.noise:g}; run it with secure=true and more "
                "noise (a smaller epsilon), or with mechanism=local",
            )
        if limited and not protection.noise > 0:
            raise PolicyError(
                "epsilon",
                "epsilon is limited, and in this run nodes add no noise, which costs infinity; "
                "run it with secure=true epsilon=..., or with mechanism=local",
            )
        each = self.record_epsilon is not None and self.record_epsilon < math.inf
        if each and not (records or protection.noise > 0):
            raise PolicyError(
                "record-epsilon",
                "record-epsilon is limited, and in this run nothing protects a single record, "
                "which costs infinity; train with PrivateSgd, or run it with mechanism=local",
            )
        if self.max_norm is not None and not (protection.norm or math.inf) <= self.max_norm:
            norm = "no bound" if protection.norm is None else f"a norm of {protection.norm:g}"
            raise PolicyError(
                "max-norm",
                f"updates are clipped to at most {self.max_norm:g}, and those of this run have "
                f"{norm}; run it with secure-norm={self.max_norm:g} (with epsilon: clipping-norm)",
            )
        if not (self.unprotected or protection.hides or records):
            raise PolicyError(
                "unprotected",
                "no bare update leaves, and this run neither sums in secret nor adds noise on the "
                "nodes; run it with secure=true, or with mechanism=local",
            )

    def check_level(self, key: str, level: str) -> None:
        """Whether `metrics` or `counts` may leave in a way; see LEVELS.

        Raises:
            PolicyError: naming what is allowed.
        """
        allowed = getattr(self, key)
        if allowed is not None and LEVELS.index(level) > LEVELS.index(allowed):
            raise PolicyError(
                key,
                f"{key} may leave {_LEVEL[allowed]}, and in this run they would leave "
                f"{_LEVEL[level]}; run it without them, or have the owner allow {key} = "
                f'"{level}"',
            )

    @property
    def protects(self) -> bool:
        """Whether it asks for anything that only Umbel's own nodes can vouch for."""
        asks = self.metrics not in (None, "clear") or self.counts not in (None, "clear")
        return not self.unprotected or asks

    def in_force(self) -> dict[str, Any]:
        """Every key with its value, those that are not in the file with what then holds."""
        own = {
            "answer": sorted(self.answer),
            "apps": "any" if self.apps is None else sorted(self.apps),
            "unprotected": self.unprotected,
            "max-norm": self.max_norm,
            "min-noise": self.min_noise,
            "mode": self.sums.mode,
            "min-cohort": self.sums.min_cohort,
            "min-neighbours": self.sums.min_neighbours,
            "bits": list(self.sums.bits),
            "roster": None if self.sums.roster is None else f"{len(self.sums.roster)} nodes",
            "authority": None if self.sums.authority is None else "of the file",
            "participations": self.participations,
            "epsilon": _epsilon(self.epsilon),
            "record-epsilon": _epsilon(self.record_epsilon),
            "metrics": self.metrics or "as the run",
            "counts": self.counts or "as the run",
            "errors": self.errors or "as the run",
            "other-options": self.other_options,
            "options": dict(self.options),
        }
        return {name: "no limit" if value is None else value for name, value in own.items()}


def _epsilon(limit: float | None) -> float | str:
    """A limit of the node's ledger, as `umbel client policy` shows it."""
    if limit is None:
        return "what the first run promises"
    return UNLIMITED if math.isinf(limit) else limit


_LEVEL = {
    "none": "not at all",
    "noised": "inside updates with noise of the nodes",
    "summed": "inside a secure sum",
    "clear": "in the clear",
}


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


def policy_path(config: Mapping[str, Any]) -> str:
    """The policy file that a node's configuration names; empty where it names none.

    Raises:
        ConfigError: it names two.
    """
    named = {str(config[key]) for key in (POLICY, FORMER) if config.get(key)}
    if len(named) > 1:
        raise ConfigError(
            f"this node's policy is {' and '.join(sorted(named))}; name one file, by --policy"
        )
    return next(iter(named), "")


def policy_of(config: Mapping[str, Any]) -> NodePolicy:
    """The policy of a node with this configuration; a changed file is read anew.

    Raises:
        ConfigError: its file cannot be used.
    """
    path = policy_path(config)
    if not path:
        return _NONE
    try:
        stamp = os.stat(path).st_mtime_ns  # noqa: PTH116 - half the time of pathlib's, a message
    except OSError as error:
        raise ConfigError(f"the policy file {path} cannot be read: {error}") from error
    return _read(path, stamp)


_NONE = NodePolicy()


@lru_cache(maxsize=64)
def _read(path: str, stamp: int) -> NodePolicy:  # noqa: ARG001
    return NodePolicy.load(Path(path))


def _sums(path: Path, found: Mapping[str, Any]) -> Policy:
    """The limits on secure sums."""
    sums = Policy()
    for name, value in found.items():
        if name == "roster":
            value = _read_roster(path.parent / value)
        elif name == "authority":
            value = _read_authority(path.parent / value)
        elif name == "bits":
            value = tuple(value)
        sums = replace(sums, **{name.replace("-", "_"): value})
    return sums


def _allows(rule: Any, value: Any) -> bool:
    if isinstance(rule, dict):
        low, high = rule.get("min", -math.inf), rule.get("max", math.inf)
        return _number(value) and bool(low <= value <= high)
    return any(_same(each, value) for each in (rule if isinstance(rule, list) else [rule]))


def _same(one: Any, other: Any) -> bool:
    """Equal, and both or neither true-or-false, which Python takes for numbers."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _said(rule: Any) -> str:
    if isinstance(rule, dict):
        low, high = rule.get("min"), rule.get("max")
        if low is None or high is None:
            return f"at most {high}" if low is None else f"at least {low}"
        return f"from {low} to {high}"
    return _listed([repr(each) for each in rule]) if isinstance(rule, list) else repr(rule)


def _listed(names: Sequence[str]) -> str:
    return " or ".join(names) if names else "nothing"


def _read_roster(path: Path) -> frozenset[str]:
    try:
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise ConfigError(f"the roster file {path} cannot be read: {error}") from error
    lines = [line for line in lines if not line[0].startswith("#")]
    for line in lines:
        if len(line) != 2 or len(line[1]) != 64:
            raise ConfigError(f"{path} has the line {' '.join(line)!r}; write NAME and a SHA-256")
    return frozenset(line[1].lower() for line in lines)


def _read_authority(path: Path) -> bytes:
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"the authority's certificate {path} cannot be read: {error}") from error
    return certificate.public_bytes(serialization.Encoding.DER)
