"""Attacks on nodes rather than on examples: who took part, whose example it is, what data is like.

    cosine, likelihood_ratio   did this client take part in the round?
    source                     which client was this example trained by?   Hu et al. 2021
    property_scores            does this client's data have a property?    Melis et al. 2019

All work on flat updates, so that they can be pointed at any adversary's view.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from umbel.privacy.attacks.audit import Scores


def cosine(candidates: Tensor, released: Tensor) -> Scores:
    """The cosine of each candidate's recomputed update with what was released.

    Args:
        candidates: shape (n, d); what each candidate would have sent.
        released: shape (d,); the round's sum or average, or the change of the model.

    Returns:
        Shape (n,); 0 for a candidate or a release of length 0.
    """
    candidates, released = candidates.double(), released.double()
    lengths = candidates.norm(dim=1) * released.norm()
    return _numbers((candidates @ released) / lengths.clamp_min(1e-300))


def likelihood_ratio(candidates: Tensor, released: Tensor, background: Tensor) -> Scores:
    """ln p(released | candidate took part) - ln p(released | it did not), rest as Gaussian.

    The rest of the sum is modelled as N(mean, s^2 I): its mean is a projection onto the direction
    of `background` (what rounds without the candidate look like), its variance what remains.

    Args:
        candidates: shape (n, d); each candidate's update, on the scale on which it was summed.
        released: shape (d,); the sum.
        background: shape (d,); a sum of the same kind that the attacker made from data of its own.

    Returns:
        Shape (n,).
    """
    candidates, released = candidates.double(), released.double()
    background = background.double()
    scale = (released @ background) / (background @ background).clamp_min(1e-300)
    rest = released - scale * background
    variance = rest.square().mean().clamp_min(1e-300)
    return _numbers((candidates @ rest - candidates.square().sum(dim=1) / 2) / variance)


def source(losses: Scores) -> NDArray[np.intp]:
    """Whose example it is: the client whose own model has the smallest loss on it.

    Hu et al. 2021 (arXiv:2109.05659), section IV. Chance is 1 / clients.

    Args:
        losses: shape (clients, examples).

    Returns:
        Shape (examples,); the index of a client.
    """
    nearest: NDArray[np.intp] = np.argmin(losses, axis=0)
    return nearest


def sketch(updates: Tensor, width: int, seed: int) -> Tensor:
    """Updates of shape (n, d) on `width` random directions, shape (n, width).

    A count sketch: each coordinate is added to one random cell with a random sign, so it costs
    O(n d) and keeps inner products on average.
    """
    generator = torch.Generator().manual_seed(seed)
    size = updates.shape[1]
    cells = torch.randint(width, (size,), generator=generator)
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    cells_of = torch.zeros(len(updates), width, dtype=torch.float64)
    return cells_of.index_add(1, cells, updates.double() * signs)


def property_scores(
    known: Tensor, has_property: Tensor, attacked: Tensor, *, penalty: float = 1e-2
) -> Scores:
    """Scores of a logistic regression that learnt the property on updates it made itself.

    Args:
        known: shape (n, d); (sketched) updates of clients that the attacker simulated.
        has_property: shape (n,), bool.
        attacked: shape (m, d); updates of clients it wants to know about.
        penalty: of the squared weights, against more directions than examples.

    Returns:
        Shape (m,); log-odds.

    Raises:
        ValueError: all simulated clients are of one kind.
    """
    if bool(has_property.all()) or not bool(has_property.any()):
        raise ValueError(
            "the attacker's simulated clients all do or all do not have the property; "
            "it learns nothing from one kind alone"
        )
    known, attacked = known.double(), attacked.double()
    mean, spread = known.mean(dim=0), known.std(dim=0).clamp_min(1e-12)
    inputs = (known - mean) / spread
    weights = torch.zeros(inputs.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        odds = inputs @ weights[:-1] + weights[-1]
        value = torch.nn.functional.binary_cross_entropy_with_logits(odds, has_property.double())
        value = value + penalty * weights[:-1].square().sum()
        value.backward()  # type: ignore[no-untyped-call]  # torch has no types for it
        return value

    optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch has no types for it
    with torch.no_grad():
        return _numbers(((attacked - mean) / spread) @ weights[:-1] + weights[-1])


def _numbers(values: Tensor) -> Scores:
    return np.asarray(values.detach().cpu().numpy(), dtype=np.float64)
