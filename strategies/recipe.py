"""From options to a stack: one order for the layers of an app, of privacy and of secure sums.

    the app's own layers
    Clip, AdaptiveClip            where nothing bounds the update yet
    PrivateMetrics, Weigh         what travels inside the update
    Rotate -> Quantize            what a secure sum needs
    noise                         at the bottom: it covers everything that is made above it
    PlainSum, SecureSum           (or the app's own collect)

epsilon=3                                   Clip -> Gaussian             Poisson cohorts
epsilon=3 clipping=adaptive                 AdaptiveClip -> Gaussian
epsilon=3 mechanism=local                   Clip -> LocalGaussian        noise on every node
epsilon=3 mechanism=tree separation=20      Clip -> TreeGaussian         no sampling needed
epsilon=3 mechanism=banded separation=20    Clip -> BandedGaussian       no sampling needed
secure=true                                 Clip -> Weigh -> Rotate -> Quantize -> SecureSum
secure=true epsilon=3                       Clip -> Rotate -> Quantize -> DistributedSkellam
                                            -> SecureSum

Both sides build the stack from the same options; how much central noise meets the budget is
decided by the coordinator alone, which knows the population (`umbel.server.private.plan`).
Whether the finished stack holds what the options ask for is not this module's word: it is read
off the stack (`umbel.strategies.composition`).
"""

from collections.abc import Sequence
from typing import Any

from umbel.core.errors import ConfigError, StackError
from umbel.strategies.declared import ClipsUpdates, ReleasesMetrics, adapts, shapes, weighs
from umbel.strategies.exchange import Exchange, Masks, Weighs, is_own
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.options import PrivacyOptions, limits_of
from umbel.strategies.private.private_metrics import PrivateMetrics
from umbel.strategies.private.private_stack import clip_layer, free_name, noise_layer
from umbel.strategies.run_options import RunOptions
from umbel.strategies.secure.options import SecureOptions
from umbel.strategies.secure.secure_stack import secret_sum, share_layer, whole_steps
from umbel.strategies.secure.weigh import Weigh
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts, Transform

Layers = list[Transform[Any]]

FINE_LEVELS = 1 << 20
"""Steps of a coordinate of typical size in a secure sum without noise."""
NOISED_LEVELS = 64
"""With noise, which a finer grid would not make less of, and bits on the wire would."""


def compose(
    stack: Stack, run: RunOptions, privacy: PrivacyOptions, secure: SecureOptions, size: int = 64
) -> Stack:
    """The app's stack with the layers that the options ask for.

    Layers of the app stay where they are. A stack that is private already gets no more noise.

    Args:
        stack: the app's own.
        run: how many rounds are planned, and the server's momentum: local noise is divided
            among rounds, banded noise is best for them.
        privacy: what is asked of noise.
        secure: what is asked of a secure sum.
        size: coordinates of an update for which the app's layers are asked what they do.

    Raises:
        ConfigError: options that do not go together, or not with the app's layers.
        StackError: layers that do not fit together.
    """
    if stack.private:
        return _private_already(stack, privacy, secure, size)
    if privacy.on:
        return _with_privacy(stack, run, privacy, secure, size)
    if secure.secure:
        return _summed_in_secret(stack, secure, size)
    return stack


def _private_already(
    stack: Stack, privacy: PrivacyOptions, secure: SecureOptions, size: int
) -> Stack:
    """The app's own noise, decided where the options decide it."""
    if secure.secure and not isinstance(stack.collect, Masks):
        raise ConfigError(
            "the app's stack adds its own noise; leave out secure=true, or let the options make "
            "the private layers"
        )
    _own_bound(stack.layers, privacy, size)
    inside = [layer for layer in stack.layers if isinstance(layer, ReleasesMetrics)]
    missing = limits_of(privacy.release_metrics).keys() - {k for m in inside for k in m.releases}
    if missing:
        raise ConfigError(
            f"release-metrics asks for {min(missing)}, but the app's own private stack does not "
            "release it; put PrivateMetrics into it, before its noise"
        )
    if stack.waiting and privacy.noise_multiplier:
        return stack.with_noise(privacy.noise_multiplier)
    return stack


def _with_privacy(
    stack: Stack, run: RunOptions, privacy: PrivacyOptions, secure: SecureOptions, size: int
) -> Stack:
    secret = secure.secure
    _go_together(stack, privacy, secret)
    above, below = _parts(stack.layers)
    _own_bound(above, privacy, size)
    above = _with_bound(above, clip_layer(privacy, above), size)
    limits = limits_of(privacy.release_metrics)
    if limits and not any(isinstance(layer, ReleasesMetrics) for layer in above):
        above.append(PrivateMetrics(limits))
    if secret:
        below = whole_steps(below, secure.secure_levels or NOISED_LEVELS, "stochastic")
        noise: Transform[Any] = share_layer(privacy, secure)
    else:
        noise = noise_layer(privacy, run)
    return Stack((*above, *below, noise), _counting_once(stack.collect, secure))


def _summed_in_secret(stack: Stack, secure: SecureOptions, size: int) -> Stack:
    if isinstance(stack.collect, Masks):
        return stack  # the app's own layers; what they hold is read off the finished stack
    collect = secret_sum(stack.collect, secure, "equal")
    above, below = _parts(stack.layers)
    above = _with_bound(above, Clip(secure.secure_norm, name=free_name("clip", above)), size)
    limits = limits_of(secure.secure_metrics)
    by_examples = secure.secure_weighting == "examples"
    if isinstance(collect, Weighs) and (by_examples or limits) and not any(map(weighs, above)):
        above.append(Weigh(secure.secure_weight_cap if by_examples else 0.0, limits))
    below = whole_steps(below, secure.secure_levels or FINE_LEVELS, "nearest")
    return Stack((*above, *below), collect)


# ---- the parts


def _parts(layers: Sequence[Transform[Any]]) -> tuple[Layers, Layers]:
    """The layers above the first that rotates or quantises, and the rest."""
    place = next((i for i, layer in enumerate(layers) if shapes(layer)), len(layers))
    return list(layers[:place]), list(layers[place:])


def _through(layers: Sequence[Transform[Any]], size: int) -> Facts:
    stack = Stack(tuple(layers))
    before = Facts(size=size, round=1, expected_replies=1024.0)
    return stack.places(before, stack.init(size))[-1]


def _with_bound(layers: Layers, clip: Transform[Any], size: int) -> Layers:
    """The layers, with `clip` where the first of them needs a bound, or else at their end."""
    for place in range(len(layers)):
        try:
            _through(layers[: place + 1], size)
        except StackError:
            if _through(layers[:place], size).l2_bound is not None:
                raise
            return [*layers[:place], clip, *layers[place:]]
    return layers if _through(layers, size).l2_bound is not None else [*layers, clip]


def _own_bound(layers: Sequence[Transform[Any]], privacy: PrivacyOptions, size: int) -> None:
    """Refuse options of clipping that the app's own layers would not follow."""
    try:
        bounded = _through(layers, size).l2_bound is not None
    except StackError:
        return  # it is said where the finished stack is checked
    if not bounded:
        return
    adaptive = any(map(adapts, layers))
    if privacy.clipping == "adaptive" and not adaptive:
        raise ConfigError(
            "clipping=adaptive asks for another clipping than the app's stack has; leave it out, "
            "or put AdaptiveClip into the stack"
        )
    norms = [layer.clips_to for layer in layers if isinstance(layer, ClipsUpdates)]
    given = privacy.clipping_norm != PrivacyOptions.clipping_norm
    if given and norms and privacy.clipping_norm not in norms:
        raise ConfigError(
            f"clipping-norm is {privacy.clipping_norm:g}, but the app's own stack clips to "
            f"{norms[-1]:g}; leave the option out, or read it in the app's stack"
        )


def _counting_once(collect: Exchange, secure: SecureOptions) -> Exchange:
    """The exchange under noise: every update counts once, over a public denominator."""
    if secure.secure:
        return secret_sum(collect, secure, "fixed")
    if is_own(collect) and isinstance(collect, Weighs):
        return collect.weighted("fixed")
    return collect


def _go_together(stack: Stack, privacy: PrivacyOptions, secret: bool) -> None:
    if privacy.mechanism == "local" and isinstance(stack.collect, Masks) and not secret:
        raise ConfigError(
            "mechanism=local makes updates of any length, which the app's SecureSum cannot sum; "
            "leave out one of them"
        )
    refused = {
        f"mechanism={privacy.mechanism}": privacy.mechanism != "gaussian",
        "clipping=adaptive": privacy.clipping == "adaptive" or any(map(adapts, stack.layers)),
    }
    for what, is_so in refused.items():
        if secret and is_so:
            raise ConfigError(
                f"secure=true makes its noise on the nodes, which {what} does not fit; leave out "
                "one of them"
            )
