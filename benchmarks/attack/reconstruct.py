"""Attacks that make images out of updates, on an adversary's view."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from umbel.benchmarks.attack.findings import Finding, Reconstruction
from umbel.benchmarks.attack.tasks import Pool
from umbel.benchmarks.attack.views import View
from umbel.core.errors import ConfigError
from umbel.privacy.attacks import inversion
from umbel.privacy.attacks.audit import clopper_pearson

RECOVERED_DB = 20.0
"""A copy of this quality or better shows the image: mean error below a tenth of the range."""


def closed_form(
    view: View, images: Mapping[int, Tensor], pool: Pool
) -> tuple[list[Finding], Reconstruction]:
    """The inputs behind the first dense layer's update, from replies or else from sums.

    Args:
        view: of a round in which every node made one step on one image.
        images: each node's image, by partition.
        pool: tells pixels from inputs.
    """
    pixels = pool.pixels or (lambda x: x)
    nodes = sorted(images)
    originals = pixels(torch.stack([images[node] for node in nodes]))
    replies = view.replies[0] if view.replies else {}
    guesses = []
    candidates = pixels(
        torch.cat([inversion.dense_inputs(*first_dense(view, s)) for s in view.sums(1)])
        if view.sums(1)
        else torch.zeros(0, pool.features)
    )
    for at, node in enumerate(nodes):
        own = candidates
        if node in replies:
            found = inversion.dense_input(*first_dense(view, replies[node].float()))
            own = pixels(found)[None]
        guesses.append(_nearest(originals[at], own))
    best = torch.stack(guesses)
    quality = [inversion.psnr(a, b) for a, b in zip(originals, best, strict=True)]
    findings = _quality("closed form", view, quality, blind(originals, pool))
    return findings, _picture("closed form", originals, best)


def labels(view: View, truth: Mapping[int, int], classes: int) -> list[Finding]:
    """iDLG: each node's label from the bias of the last layer; chance where no reply is seen."""
    replies = view.replies[0] if view.replies else {}
    if not replies:
        return []
    # An update is minus the rate times the gradient, so the smallest gradient is the largest.
    right = sum(
        inversion.label(-last_bias(view, replies[node])) == truth[node]
        for node in truth
        if node in replies
    )
    seen = sum(node in replies for node in truth)
    low, high = clopper_pearson(right, seen)
    measure = "labels found"
    return [
        Finding("iDLG labels", view.adversary, measure, right / seen, low, high, 1 / classes, seen)
    ]


def optimised(
    view: View,
    images: Mapping[int, Tensor],
    model: nn.Module,
    pool: Pool,
    *,
    iterations: int,
    seed: int,
) -> tuple[list[Finding], list[Reconstruction]]:
    """DLG and Geiping's cosine inversion on every readable reply; slow, so of few nodes."""
    replies = view.replies[0] if view.replies else {}
    nodes = [node for node in sorted(images) if node in replies]
    if not nodes:
        return [], []
    pixels = pool.pixels or (lambda x: x)
    parameters = dict(zip(view.manifest.names, model.parameters(), strict=True))
    for name, value in view.manifest.unflatten(view.models[0]).items():
        parameters[name].data.copy_(value)

    def gradient_of(x: Tensor, soft: Tensor) -> Sequence[Tensor]:
        loss = nn.functional.cross_entropy(model(x.flatten(1)), soft)
        return torch.autograd.grad(loss, list(parameters.values()), create_graph=True)

    findings: list[Finding] = []
    pictures: list[Reconstruction] = []
    originals = pixels(torch.stack([images[node] for node in nodes]))
    made: dict[str, list[Tensor]] = {"DLG": [], "cosine + TV": []}
    for node in nodes:
        seen = [-part for part in view.manifest.unflatten(replies[node].float()).values()]
        # The server knows the learning rate, so it knows the gradient and not only its direction.
        true = inversion.dlg(
            gradient_of, seen, (1, pool.features), classes=pool.classes,
            iterations=iterations // 4, seed=seed,
        )  # fmt: skip
        made["DLG"].append(pixels(true.inputs[0].clamp(-10, 10).nan_to_num()))
        guess = inversion.label(seen[-1])
        target = nn.functional.one_hot(torch.tensor([guess]), pool.classes).float()
        side = math.isqrt(pool.features)
        shape = (1, 1, side, side) if side * side == pool.features else (1, pool.features)
        box = (float(pool.x.min()), float(pool.x.max()))
        near = inversion.cosine_inversion(
            gradient_of, seen, shape, target=target, iterations=iterations, box=box, seed=seed
        )
        made["cosine + TV"].append(pixels(near.inputs.flatten()))
    for name, guesses in made.items():
        quality = [
            inversion.psnr(a, b) for a, b in zip(originals, torch.stack(guesses), strict=True)
        ]
        findings += _quality(name, view, quality, blind(originals, pool))
        pictures.append(_picture(name, originals, torch.stack(guesses)))
    return findings, pictures


def imprinted(view: View, images: Tensor, layer: inversion.Imprint, pool: Pool) -> list[Finding]:
    """What a malicious server's imprint layer recovers of a batch that nodes trained on."""
    pixels = pool.pixels or (lambda x: x)
    vectors = [reply.float() for reply in view.replies[0].values()] if view.replies else []
    found = [layer.recover(*first_dense(view, v)) for v in (*vectors, *view.sums(1))]
    candidates = pixels(torch.cat(found).nan_to_num().clamp(-10, 10))
    quality = inversion.best_matches(pixels(images), candidates)
    hits, trials = int((quality > RECOVERED_DB).sum()), len(images)
    low, high = clopper_pearson(hits, trials)
    measure = "examples recovered"
    return [Finding("imprint", view.adversary, measure, hits / trials, low, high, 0.0, trials)]


def _quality(name: str, view: View, quality: Sequence[float], blind: float) -> list[Finding]:
    """The median quality with its interval by order statistics, and the share recovered."""
    capped = np.sort(np.minimum(quality, 200.0))
    n = len(capped)
    median, low, high = (float(np.quantile(capped, q)) for q in (0.5, *clopper_pearson(n // 2, n)))
    hits = int(np.sum(capped > RECOVERED_DB))
    return [
        Finding(name, view.adversary, "PSNR in dB", median, low, high, blind, n),
        Finding(
            name, view.adversary, "examples recovered", hits / n, *clopper_pearson(hits, n), 0.0, n
        ),
    ]


def blind(originals: Tensor, pool: Pool) -> float:
    """The quality of the best guess without any view: the mean of all images of the pool."""
    pixels = pool.pixels or (lambda x: x)
    mean = pixels(pool.x[:1000]).mean(dim=0)
    return float(np.median([inversion.psnr(original, mean) for original in originals]))


def _nearest(original: Tensor, candidates: Tensor) -> Tensor:
    if not len(candidates):
        return torch.zeros_like(original)
    clean = candidates.nan_to_num()
    return clean[(clean - original).square().mean(dim=1).argmin()]


def first_dense(view: View, vector: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of the first dense layer in a vector of the model's layout.

    Raises:
        ConfigError: the model does not begin with a dense layer that has a bias.
    """
    parts = list(view.manifest.unflatten(vector).values())
    if len(parts) < 2 or parts[0].dim() != 2 or parts[1].shape != parts[0].shape[:1]:
        raise ConfigError(
            f"the model begins with {view.manifest.names[0]}, but the closed form needs a dense "
            "layer with a bias there; leave this attack out"
        )
    return parts[0], parts[1]


def last_bias(view: View, vector: Tensor) -> Tensor:
    """The last parameter of the model in a vector of its layout."""
    return list(view.manifest.unflatten(vector).values())[-1].flatten()


def pooled(group: Sequence[Finding]) -> Finding:
    """Findings of one attack on several rounds as one: shares add up, medians are averaged."""
    first, trials = group[0], sum(one.trials for one in group)
    chance = sum(one.chance * one.trials for one in group) / trials
    value = sum(one.value * one.trials for one in group) / trials
    if first.measure == "PSNR in dB":
        values = np.sort([one.value for one in group])
        ends = clopper_pearson(len(values) // 2, len(values))
        low, high = (float(np.quantile(values, end)) for end in ends)
        return replace(
            first, value=float(np.median(values)), low=low, high=high, chance=chance, trials=trials
        )
    low, high = clopper_pearson(round(value * trials), trials)
    return replace(first, value=value, low=low, high=high, chance=chance, trials=trials)


def _picture(name: str, originals: Tensor, guesses: Tensor) -> Reconstruction:
    return Reconstruction(name, originals.float().numpy(), guesses.float().numpy())
