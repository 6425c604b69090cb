"""What options ask for, read off the finished stack: one place, whoever built the stack.

    app's stack + options -> recipe -> finished stack -> its facts and claims -> held, or refused

The same function stands at every door: a run on one machine, a server, Flower's engine (all of
which take their stack from `Federation`), and a node's own process. So an app whose collect or
layers are its own gets what was asked for, or a sentence before the first message.

    secure=true        the server sees a sum, by Umbel's own collect
    epsilon, noise     some layer claims; with secure=true against the server as well
    mechanism          a claim that is made that way
    buffers=mean       the collect averages running statistics, and nothing is private or secure
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from umbel.core.errors import ConfigError, StackError
from umbel.core.options import Options, dashed
from umbel.core.registry import OWN
from umbel.strategies.aggregator import Aggregate
from umbel.strategies.aggregators.named import RobustOptions
from umbel.strategies.declared import Proximal, RoundsToo, shapes
from umbel.strategies.exchange import CapsExamples, Masks, is_own
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim, Facts, RoundContext

SIZE = 64
"""Coordinates for which a stack is asked what it does, where its layers take any number."""
PROXIMAL = "proximal-mu"
"""The option for the strength of FedProx; trainers that take corrections have it."""
MANY = float(1 << 20)
"""Nodes of a round that is so large that no stack is too small for it."""


@dataclass(frozen=True)
class Asked:
    """What the options of a run ask of its stack."""

    run: RunOptions
    privacy: PrivacyOptions
    secure: SecureOptions
    robust: RobustOptions
    proximal: float = 0.0

    @classmethod
    def read(cls, options: Options) -> "Asked":
        """From complete options.

        Raises:
            ConfigError: a value that cannot be used.
        """
        return cls(
            RunOptions.read(options),
            PrivacyOptions.read(options),
            SecureOptions.read(options),
            RobustOptions.read(options),
            float(options.get(PROXIMAL, 0.0)),
        )

    @property
    def protection(self) -> bool:
        """Whether anything is asked that needs other layers than the app's."""
        return self.secure.secure or self.privacy.on


def compose(stack: Stack, options: Options | Asked, size: Callable[[], int]) -> Stack:
    """The stack that an app and the options make together, known to hold what is asked.

    Args:
        stack: the app's own.
        options: complete ones, or what has been read of them.
        size: coordinates of an update, asked for where an app's own layer takes no other.

    Raises:
        ConfigError: what the options ask for is not in the stack, or they contradict each other.
        StackError: layers that do not fit together.
    """
    asked = options if isinstance(options, Asked) else Asked.read(options)
    stack = with_proximal(stack, asked.proximal)
    try:
        return _composed(stack, asked, stack.model_size or SIZE)
    except Exception:
        if all(type(layer).__module__.startswith("umbel.") for layer in stack.layers):
            raise
        return _composed(stack, asked, size())  # an app's layer may be made for one model


def with_proximal(stack: Stack, mu: float) -> Stack:
    """The stack with what the option `proximal-mu` asks for, above all layers.

    Raises:
        ConfigError: the app's stack has a proximal term of its own.
    """
    if not mu:
        return stack
    from umbel.strategies.methods.fedprox import FedProx

    if any(isinstance(layer, Proximal) for layer in stack.layers):
        raise ConfigError(
            f"proximal-mu is {mu:g}, but the app's own stack {stack} has FedProx already; leave "
            "the option out"
        )
    return replace(stack, layers=(FedProx(mu), *stack.layers))


def _composed(stack: Stack, asked: Asked, size: int) -> Stack:
    made = stack
    if asked.protection or stack.private:
        # What it builds with takes a second to import, which other runs need not wait.
        from umbel.strategies.recipe import compose as build

        made = build(stack, asked.run, asked.privacy, asked.secure, size)
    made = _limited(_rounded_once(made), asked.run.max_examples)
    check_asked(made, asked, size)
    return made


def _rounded_once(stack: Stack) -> Stack:
    """Above a layer that quantises, clipping leaves rounding to it.

    Its grid follows from the number of coordinates; the grid of clipping alone would take all of
    an update that is much shorter than the norm, a little in each of very many coordinates.
    """
    quantised = [i for i, layer in enumerate(stack.layers) if shapes(layer, "quantises")]
    if not quantised:
        return stack
    layers = [
        layer.without_rounding() if isinstance(layer, RoundsToo) and i < quantised[-1] else layer
        for i, layer in enumerate(stack.layers)
    ]
    return replace(stack, layers=tuple(layers))


def _limited(stack: Stack, most: int) -> Stack:
    """The stack with the limit `max-examples`; 0 leaves it to the collect."""
    collect = stack.collect
    if not most:
        return stack
    limited = collect.with_max_examples(most) if isinstance(collect, CapsExamples) else None
    if limited is None:
        raise ConfigError(
            f"max-examples is {most}, but {stack} does not weigh nodes by their examples (a "
            "secure sum has secure-weight-cap); leave max-examples out"
        )
    return replace(stack, collect=limited)


def check_asked(stack: Stack, asked: Asked, size: int = SIZE) -> None:
    """Refuse a stack that does not hold what is asked of it.

    Args:
        stack: finished, its noise perhaps undecided.
        asked: by the options.
        size: coordinates of an update.

    Raises:
        ConfigError: names the option and what the stack has in its place.
        StackError: layers that do not fit together.
    """
    decided = stack.with_noise(1.0)
    before = Facts(size=size, round=1, expected_replies=MANY)
    bottom = decided.check(before, decided.init(size))
    claims = decided.claims(bottom)
    if asked.secure.secure:
        _check_secret(stack, bottom, asked.secure)
    if stack.waiting and not asked.privacy.on:
        raise ConfigError(
            f"a layer of {stack} waits for its noise, and nothing decides it; give a budget such "
            "as epsilon=3, or noise-multiplier"
        )
    if asked.privacy.on:
        _check_noise(stack, claims, asked)
    _check_buffers(stack, bottom, asked.run.buffers)
    _check_idle(stack, bottom, asked)


def _check_secret(stack: Stack, bottom: Facts, secure: SecureOptions) -> None:
    if bottom.server_sees != "sum" or not is_own(stack.collect):
        raise ConfigError(
            f"secure=true lets the server see a sum only, but in the app's stack {stack} it would "
            "see each update; leave out secure=true, or collect with PlainSum or SecureSum"
        )
    if bottom.min_replies < secure.secure_min_cohort:
        raise ConfigError(
            f"secure-min-cohort is {secure.secure_min_cohort}, but the app's own collect makes "
            f"sums of {bottom.min_replies}; leave it out, or raise the app's min_cohort"
        )
    mode = stack.collect.mode if isinstance(stack.collect, Masks) else ""
    if secure.secure_mode not in ("auto", mode):
        raise ConfigError(
            f"secure-mode is {secure.secure_mode}, but the app's own collect is {mode}; leave it "
            "out, or set the app's mode"
        )


def _check_noise(stack: Stack, claims: Sequence[Claim], asked: Asked) -> None:
    privacy = asked.privacy
    wanted = f"epsilon={privacy.epsilon:g}"
    if math.isinf(privacy.epsilon):
        wanted = f"noise-multiplier={privacy.noise_multiplier:g}"
    if not claims:
        raise ConfigError(f"{wanted} asks for noise, but {stack} promises nothing; leave it out")
    if asked.secure.secure and not any(claim.against == "server" for claim in claims):
        raise ConfigError(
            f"secure=true {wanted} asks for noise that the server cannot take off, but {stack} "
            "adds it at the server; leave out secure=true, or the app's own layer of noise"
        )
    made = {claim.mechanism for claim in claims}
    if privacy.mechanism not in ("gaussian", *made):
        raise ConfigError(
            f"mechanism={privacy.mechanism} asks for other noise than the app's own stack {stack} "
            "makes; leave it out, or leave the noise to the options"
        )
    given, own = privacy.noise_multiplier, stack.noise_multiplier
    if given and own is not None and own != given:
        raise ConfigError(
            f"noise-multiplier is {given:g}, but the app's own stack has {own:g}; leave it out, or "
            "give the app's layer none, so that the option decides"
        )


def _check_buffers(stack: Stack, bottom: Facts, buffers: str) -> None:
    if buffers == "local":
        return
    if stack.private:
        raise ConfigError(
            f"buffers={buffers} would send running statistics without noise; use "
            "buffers=local, or a model with group normalisation"
        )
    if bottom.server_sees == "sum":
        raise ConfigError(
            f"buffers={buffers} sends running statistics in the clear beside a secure sum; use "
            "buffers=local, or group normalisation"
        )
    if not bottom.averages_buffers:
        raise ConfigError(
            f"buffers={buffers} asks for averages of running statistics, which "
            f"{stack.collect.name} does not say that it makes (averages_buffers among its facts); "
            "use buffers=local"
        )


def _check_idle(stack: Stack, bottom: Facts, asked: Asked) -> None:
    """Refuse options of a protection that nobody has asked for, and that would do nothing."""
    if not asked.privacy.on and not stack.private:
        for name in ("mechanism", "clipping", "release_metrics"):
            value = getattr(asked.privacy, name)
            if value != getattr(PrivacyOptions, name):
                raise ConfigError(
                    f"{dashed(name)} is {value}, but nothing asks for noise, so nothing would be "
                    f"private; give a budget such as epsilon=3, or leave {dashed(name)} out"
                )
    if bottom.kind == "sum" and asked.run.aggregator in (OWN, "mean"):
        for name, value in RobustOptions.defaults().items():
            given = getattr(asked.robust, name.replace("-", "_"))
            if given != value:
                raise ConfigError(
                    f"{name} is {given}, but {stack} averages and stands no liar; give "
                    f"aggregator=median or another rule, or leave {name} out"
                )
    if not asked.secure.secure and bottom.server_sees != "sum":
        for name in ("secure_mode", "secure_min_cohort", "secure_colluders"):
            value = getattr(asked.secure, name)
            if value != getattr(SecureOptions, name):
                raise ConfigError(
                    f"{dashed(name)} is {value}, but the run has no secure sum; give secure=true, "
                    f"or leave {dashed(name)} out"
                )


def check_rounds(stack: Stack, facts: Facts, rounds: int = 2) -> None:
    """Refuse a stack that would not last: the facts of its first rounds, as its layers make them.

    A layer may ask of a round what only the one before can show, such as a bound that does not
    move. So the server's half is played on a few coordinates, with no node and a sum of ones, or
    of less where that is longer than updates may be.

    Args:
        stack: with all noise decided.
        facts: of an update before the stack, in the real run.
        rounds: to play.

    Raises:
        StackError: what a layer says, and in which round it would have said it.
    """
    stack.check(facts.replace(round=1), stack.init(facts.size))
    try:
        _play(stack, facts.replace(size=stack.model_size or SIZE), rounds)
    except StackError:
        raise
    except Exception:
        _play(stack, facts, rounds)  # a layer may be made for one number of coordinates


def _play(stack: Stack, facts: Facts, rounds: int) -> None:
    states = stack.init(facts.size)
    for number in range(1, rounds + 1):
        before = facts.replace(round=number)
        try:
            bottom = stack.check(before, states)
        except StackError as error:
            raise StackError(f"{error} (in round {number})") from error
        cohort = max(1.0, facts.expected_replies)
        each = 1.0 if bottom.l2_bound is None else min(1.0, bottom.l2_bound)
        total = torch.full((bottom.size,), each, dtype=torch.float64)
        sum_ = Aggregate(total, cohort, round(cohort), cohort)
        generator = torch.Generator().manual_seed(number)
        rnd = RoundContext(
            number, cohort, round(cohort), cohort, bottom, generator, learning_rate=1.0
        )
        _, states, _ = stack.decode(sum_, states, rnd, before)
