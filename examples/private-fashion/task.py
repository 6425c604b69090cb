"""60,000 people hold one photograph each; the model must not give any of them away.

Every node describes its photograph by scattering features, which are the same fixed function for
all, and trains one linear layer on them (Tramer and Boneh 2021). The recipe `best` first asks
for private means: the average description, and how descriptions vary, by which every node then
levels its own. Questions and training share one budget and one ledger. `cnn` trains a small
convolutional network on the pixels instead (Papernot et al. 2021); `few` is for 6,000 people with
ten photographs each.
"""

from collections.abc import Mapping
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import group_norm

from umbel import (
    ConfigError,
    FeatureMap,
    Federation,
    OneStep,
    PrecomputedFeatures,
    PrivateMean,
    Scattering,
    SoftmaxTrainer,
    TorchTrainer,
    features_of,
    private_second_moment,
)

# Scales and order of the transform, groups of the normalisation, weight in the whole.
QUICK = [(Scattering(28, 28, scales=2), 27, 1.0)]
BLOCKS = {
    "quick": QUICK,
    "few": QUICK,
    "best": [
        (Scattering(28, 28, scales=2), 27, 0.75),
        (Scattering(28, 28, scales=1, order=1), 9, 0.45),
        (Scattering(28, 28, scales=3), 31, 0.5),
    ],
}


def blocks(options):
    return BLOCKS[options["recipe"]]


def recipe(options) -> FeatureMap:
    """What a node computes of its photographs and keeps."""
    if options["recipe"] == "cnn":
        return FeatureMap("pixels", 28 * 28, lambda images: scaled(images).flatten(1) * 2 - 1)
    parts = blocks(options)

    def describe(images) -> Tensor:
        pixels = scaled(images)
        return torch.cat([group_norm(s(pixels), groups).flatten(1) for s, groups, _ in parts], 1)

    name = "best" if options["recipe"] == "best" else "quick"
    return FeatureMap(f"scattering-{name}", width(options), describe)


def scaled(images) -> Tensor:
    return torch.from_numpy(images).float() / 255


def network() -> nn.Module:
    """26,010 parameters, tanh throughout (Papernot et al. 2021, table 1)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 8, stride=2, padding=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, 10),
    )


def width(options) -> int:
    return sum(s.size for s, _, _ in blocks(options))


def columns(parts) -> list[slice]:
    """Where each block is among the features."""
    ends = [0, *accumulate(s.size for s, _, _ in parts)]
    return [slice(*pair) for pair in pairwise(ends)]


def shaped(block: Tensor, part) -> Tensor:
    """A block's features as (n, channels, places), of length 1."""
    return unit(block.reshape(len(block), part[0].channels, -1))


def unit(x: Tensor) -> Tensor:
    return x / x.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, *[1] * (x.ndim - 1))


def whitener(ridge: float):
    """From a second moment to the matrix that levels it half way: its power -1/4."""

    def derive(moment: Tensor, _: Mapping[str, Tensor]) -> Tensor:
        values, vectors = torch.linalg.eigh(moment.double())
        return ((vectors * (values.clamp_min(0) + ridge) ** -0.25) @ vectors.T).float()

    return derive


def questions(options) -> list[PrivateMean]:
    """What `best` asks before training: per block a mean, then two second moments."""
    if options["recipe"] != "best":
        return []
    parts = blocks(options)
    tight = options["epsilon"] < 2
    ridge = whitener(3e-3 if tight else 1e-3)
    means, moments = [], []
    for i, (s, _, _) in enumerate(parts):
        places = s.size // s.channels

        def block(examples, _, i=i) -> Tensor:
            return shaped(features_of(examples, columns(parts)[i]), parts[i])

        def centred(examples, public, i=i) -> Tensor:
            return block(examples, public, i) - public[f"mean.{i}"]

        def turned(examples, public, i=i) -> Tensor:
            return centred(examples, public, i).mT

        means.append(PrivateMean(f"mean.{i}", block, (s.channels, places), 60 if tight else 30))
        noise = 40 if tight else 20
        moments += [
            private_second_moment(f"left.{i}", centred, s.channels, noise, derive=ridge),
            private_second_moment(f"right.{i}", turned, places, noise, derive=ridge),
        ]
    return means + moments


def buffers(options) -> dict[str, Tensor]:
    """What the answers replace: no shift, no levelling."""
    made = {}
    for i, (s, _, _) in enumerate(blocks(options) if options["recipe"] == "best" else []):
        places = s.size // s.channels
        made[f"mean.{i}"] = torch.zeros(s.channels, places)
        made[f"left.{i}"], made[f"right.{i}"] = torch.eye(s.channels), torch.eye(places)
    return made


def prepare(features: Tensor, buffers) -> Tensor:
    """The levelled blocks, weighted and put together; `quick` takes its features as they are."""
    if not buffers:
        return features
    parts = BLOCKS["best"]
    levelled = []
    for i, where in enumerate(columns(parts)):
        x = shaped(features[:, where], parts[i])
        x = buffers[f"left.{i}"] @ (x - buffers[f"mean.{i}"]) @ buffers[f"right.{i}"]
        levelled.append(unit(x.flatten(1)) * parts[i][2])
    return unit(torch.cat(levelled, 1))


PLAN = {
    "learning-rate": 600.0,  # large: every update is clipped to the norm
    "clipping-norm": 1.0,
    "cohort-size": 8192.0,
    "rounds": 290,
    "server-learning-rate": 100.0,
    "average-from": 0,
}


def derived(options):
    """What a recipe sets, unless it is given; `quick` and `best`: found on a validation split."""
    tight = options["epsilon"] < 2
    changes = {
        "quick": {},
        "best": {"rounds": 200, "server-learning-rate": 28.0 if tight else 71.0},
        # Gradients are clipped to 0.1. The last model wavers, so the run ends with a mean.
        "cnn": {
            "learning-rate": 10.0,
            "cohort-size": 4096.0,
            "rounds": 440,
            "server-learning-rate": 0.8,
            "average-from": 330,
        },
        "few": {
            "cohort-size": 1000.0,
            "rounds": 100,
            "server-learning-rate": 10.0,
            "average-from": 50,
        },
    }
    return PLAN | changes.get(options["recipe"], {})


softmax = SoftmaxTrainer(width, classes=10, prepare=prepare, buffers=buffers)
TRAINERS = {
    "quick": softmax,
    "best": softmax,
    "cnn": OneStep(TorchTrainer(network)),
    "few": softmax,
}


def trainer(options):
    recipe = options["recipe"]
    if recipe not in TRAINERS:
        raise ConfigError(f"recipe is {recipe!r}; it can be {', '.join(TRAINERS)}")
    return TRAINERS[recipe]


federation = Federation(
    name="private-fashion",
    trainer=trainer,
    data=PrecomputedFeatures("fashion-mnist", recipe),
    questions=questions,
    options={"recipe": "quick"},
    derived_options=derived,
)
