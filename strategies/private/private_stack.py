"""The layers of a private stack: how updates are bounded, and what noise there is.

    clipping   fixed, adaptive                 Clip, AdaptiveClip
    mechanism  gaussian, local, tree, banded   Gaussian, Local-, Tree-, BandedGaussian

In which order they stand, and what else there is, is in `umbel.strategies.recipe`.
"""

from collections.abc import Sequence
from typing import Any

from umbel.strategies.private.adaptive_clip import AdaptiveClip
from umbel.strategies.private.banded_gaussian import BandedGaussian
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.private.local_gaussian import LocalGaussian
from umbel.strategies.private.options import PrivacyOptions
from umbel.strategies.private.tree_gaussian import TreeGaussian
from umbel.strategies.run_options import RunOptions
from umbel.strategies.transform import Transform


def clip_layer(privacy: PrivacyOptions, layers: Sequence[Transform[Any]]) -> Transform[Any]:
    """The layer that bounds updates, as the options say, to stand among these layers."""
    if privacy.clipping == "adaptive":
        return AdaptiveClip(
            privacy.clipping_norm,
            privacy.clipping_quantile,
            name=free_name("adaptive-clip", layers),
        )
    return Clip(privacy.clipping_norm, name=free_name("clip", layers))


def noise_layer(privacy: PrivacyOptions, run: RunOptions) -> Transform[Any]:
    """The layer of noise that the options ask for; central noise may wait for the budget."""
    given = privacy.noise_multiplier or None
    match privacy.mechanism:
        case "local":
            return LocalGaussian(privacy.epsilon, privacy.delta, run.rounds, privacy.seed)
        case "tree":
            return TreeGaussian(privacy.separation, given, privacy.seed)
        case "banded":
            bands = privacy.bands or min(16, privacy.separation)
            momentum = run.server_momentum if run.optimizer == "fedavgm" else 0.0
            return BandedGaussian(
                bands,
                privacy.separation,
                given,
                privacy.seed,
                rounds=run.rounds,
                momentum=momentum,
            )
    return Gaussian(given, privacy.seed)


def free_name(name: str, layers: Sequence[Transform[Any]]) -> str:
    """The usual name for one more layer, or another where that is taken."""
    taken = {layer.name for layer in layers}
    return f"{name}-below" if name in taken else name
