"""PrivateMean: a private sum that is not training, asked before, between or after rounds.

    server -> node   the question's name, the norm, what earlier questions released
    node             its examples' vector, clipped to the norm, on the grid      (Clip)
    node -> server   the clipped vector, seen by the server
    ledger           the question's Gaussian event, before the release
    server           sum + noise, over the number of nodes                      (Gaussian)
    server -> all    the mean: a buffer of the model where it has one of that name

A question has a stack of its own, made of the layers that training uses, so what is said of
clipping, lattice noise and broken updates holds for it too. Every node is asked, so nothing is
amplified by sampling. What is made of the answer (`derive`) is post-processing and free.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from umbel.core.errors import StackError
from umbel.privacy.bounds.bundle import Bundle, Grams, Vectors
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.private.gaussian import Gaussian
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Claim, Facts

Public = Mapping[str, Tensor]
"""What questions have released so far, by name."""

Contribution = Callable[..., Tensor | Bundle]
"""`of(examples, public)`: what each example adds, shape (n, *shape); a node sends the mean."""

END = -1
"""As `after`: once training is over."""


@dataclass(frozen=True)
class PrivateMean:
    """The mean over all nodes of a vector of each, with noise.

    Args:
        name: of the answer; if the model has a buffer of that name, the answer becomes it.
        of: a node's examples and what is public to a vector for each example.
        shape: of one vector.
        noise_multiplier: standard deviation of the noise on the sum, over `norm`.
        norm: the longest vector of a node, as flat L2 norm; longer ones are scaled down.
        after: asked after this many rounds; 0 is before training, `END` after the last round.
        symmetric: the answer is a symmetric matrix: its noise is averaged over both halves.
        derive: from the mean and what is public to what is released in its place.
        insecure_seed: for tests only, as in `Gaussian`.

    Raises:
        StackError: the norm or the multiplier is not a finite number above 0, or a shape or
            place that cannot be.

    Example:
        >>> PrivateMean("brightness", of=lambda e, public: e.x.mean((1, 2))[:, None], shape=(1,),
        ...             noise_multiplier=30.0).claims()[0].event
        GaussianDpEvent(noise_multiplier=30.0)
    """

    name: str
    of: Contribution
    shape: tuple[int, ...]
    noise_multiplier: float
    norm: float = 1.0
    after: int = 0
    symmetric: bool = False
    derive: Callable[[Tensor, Public], Tensor | Public] | None = None
    insecure_seed: int | None = None

    def __post_init__(self) -> None:
        if not self.shape or min(self.shape) < 1 or self.after < END:
            raise StackError(
                f"the private mean {self.name!r} has the shape {self.shape} and is asked after "
                f"{self.after} rounds; give at least one coordinate, and 0 or more rounds (or END)"
            )
        if self.symmetric and (len(self.shape) != 2 or self.shape[0] != self.shape[1]):
            raise StackError(f"a symmetric answer is a square matrix, not of shape {self.shape}")
        self.stack  # noqa: B018 - raises where norm or noise cannot be

    def without_seed(self) -> "PrivateMean":
        """This question with real noise."""
        return replace(self, insecure_seed=None)

    @property
    def size(self) -> int:
        """Coordinates of a vector."""
        return math.prod(self.shape)

    @property
    def stack(self) -> Stack:
        """The layers that a vector passes."""
        noise = Gaussian(self.noise_multiplier, self.insecure_seed)
        return Stack((Clip(self.norm), noise), PlainSum(weighting="fixed"))

    def facts(self, number: int = 0) -> Facts:
        """At the bottom of the question's stack."""
        stack = self.stack
        return stack.check(Facts(size=self.size, round=number), stack.init(self.size))

    def claims(self, number: int = 0) -> list[Claim]:
        """What asking costs: every node answers, so no sampling amplifies it."""
        claims = self.stack.claims(self.facts(number))
        return [replace(claim, sampled=False) for claim in claims]

    def due(self, finished: int, rounds: int) -> bool:
        """Whether it is asked once `finished` of `rounds` rounds are over."""
        return finished == (rounds if self.after == END else self.after)

    def bundle(self, examples: object, public: Public) -> Bundle:
        """Every example's vector.

        Raises:
            StackError: `of` gives another shape than it promises.
        """
        found = self.of(examples, public)
        bundle: Bundle = (
            Vectors(found.reshape(len(found), -1)) if isinstance(found, Tensor) else found
        )
        size = (
            bundle.values.shape[1] ** (2 if isinstance(bundle, Grams) else 1)
            if isinstance(bundle, Grams | Vectors)
            else self.size
        )
        if size != self.size:
            raise StackError(
                f"the private mean {self.name!r} promises {self.size} coordinates, but its "
                f"function gives {size}; correct shape={self.shape}"
            )
        return bundle

    def vector(self, examples: object, public: Public) -> Tensor:
        """One node's vector: the mean over its examples, shape (size,), float64."""
        bundle = self.bundle(examples, public)
        return bundle.total() / max(1, bundle.count)

    def answer(self, mean: Tensor, public: Public) -> dict[str, Tensor]:
        """What is released, by name."""
        result = mean.to(torch.float32).reshape(self.shape)
        if self.symmetric:
            result = (result + result.T) / 2
        made = self.derive(result, public) if self.derive is not None else result
        return dict(made) if isinstance(made, Mapping) else {self.name: made}


def private_second_moment(
    name: str,
    of: Callable[..., Tensor],
    side: int,
    noise_multiplier: float,
    *,
    norm: float = 1.0,
    after: int = 0,
    derive: Callable[[Tensor, Public], Tensor | Public] | None = None,
) -> PrivateMean:
    """The mean of x x^T over nodes, where `of` gives x with shape (n, side, columns).

    Args:
        norm: of x x^T, so x counts up to a length of the square root of it.
    """

    def grams(examples: object, public: Public) -> Grams:
        return Grams(of(examples, public))

    shape = (side, side)
    return PrivateMean(name, grams, shape, noise_multiplier, norm, after, True, derive)


def private_histogram(
    name: str,
    of: Callable[..., Tensor],
    bins: int,
    noise_multiplier: float,
    *,
    after: int = 0,
) -> PrivateMean:
    """The share of nodes in each bin, where `of` gives each example's bin, shape (n,).

    Shares are noisy: they can be a little negative and need not add up to 1.
    """

    def one_hot(examples: object, public: Public) -> Tensor:
        return torch.nn.functional.one_hot(of(examples, public), bins).float()

    return PrivateMean(name, one_hot, (bins,), noise_multiplier, after=after)
