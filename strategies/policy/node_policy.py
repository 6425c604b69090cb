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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from umbel.core.errors import RunError
from umbel.strategies.policy.keys import ANSWERS, LEVELS, UNLIMITED, is_number
from umbel.strategies.secure.policy import Policy

if TYPE_CHECKING:  # a node's connection, which imports this, holds no tensor
    from umbel.strategies.protection import Protection


class PolicyError(RunError):
    """What was asked of a node is outside its owner's policy.

    Attributes:
        key: of the policy.
    """

    def __init__(self, key: str, sentence: str) -> None:
        super().__init__(sentence)
        self.key = key


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


def _allows(rule: Any, value: Any) -> bool:
    if isinstance(rule, dict):
        low, high = rule.get("min", -math.inf), rule.get("max", math.inf)
        return is_number(value) and bool(low <= value <= high)
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
