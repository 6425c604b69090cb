"""Shamir's sharing: any threshold of shares gives the secret, one fewer says nothing."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.masking import shamir


def test_the_modulus_is_prime_by_miller_and_rabin() -> None:
    """Forty random bases: a composite passes with probability below 4^-40."""
    even, twos = shamir.PRIME - 1, 0
    while even % 2 == 0:
        even, twos = even // 2, twos + 1
    for _ in range(40):
        x = pow(random.randrange(2, shamir.PRIME - 1), even, shamir.PRIME)
        if x in (1, shamir.PRIME - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % shamir.PRIME
            if x == shamir.PRIME - 1:
                break
        else:
            pytest.fail("2^256 + 297 is composite")


@given(st.binary(min_size=32, max_size=32), st.integers(1, 12), st.data())
@settings(deadline=None)
def test_any_subset_as_large_as_the_threshold_combines(
    secret: bytes, holders: int, data: st.DataObject
) -> None:
    threshold = data.draw(st.integers(1, holders))
    points = data.draw(
        st.lists(st.integers(1, 5000), min_size=holders, max_size=holders, unique=True)
    )
    shares = dict(zip(points, shamir.split(secret, threshold, points), strict=True))
    chosen = data.draw(st.permutations(points))[:threshold]
    assert shamir.combine({point: shares[point] for point in chosen}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_the_smallest_and_the_largest_secret(secret: bytes) -> None:
    shares = shamir.split(secret, 3, [1, 2, 3])
    assert shamir.combine(dict(enumerate(shares, 1))) == secret


def test_one_share_too_few_fits_every_secret() -> None:
    """For threshold - 1 shares and any secret there is a polynomial: the shares say nothing."""
    secret, other = b"a" * 32, b"b" * 32
    shares = shamir.split(secret, 3, [1, 2, 3, 4])
    # The line through both known shares and the other secret is as good a polynomial.
    forged = {1: shares[0], 2: shares[1]}
    first, second = (int.from_bytes(forged[point]) for point in (1, 2))
    at_zero = int.from_bytes(other)
    # Newton's form through (0, other), (1, first), (2, second), evaluated at 3.
    third = (at_zero - 3 * first + 3 * second) % shamir.PRIME
    forged[3] = third.to_bytes(shamir.SHARE_BYTES)
    assert shamir.combine(forged) == other


def test_too_few_shares_do_not_give_the_secret() -> None:
    shares = shamir.split(b"a" * 32, 3, [1, 2, 3])
    assert shamir.combine({1: shares[0], 2: shares[1]}) != b"a" * 32


@pytest.mark.parametrize(
    ("secret", "threshold", "points"),
    [
        (b"short", 2, [1, 2]),
        (bytes(306), 2, [1, 2]),  # a PEM key, as Flower shares it
        (bytes(32), 0, [1, 2]),
        (bytes(32), 3, [1, 2]),
        (bytes(32), 2, [0, 1]),  # the point zero is the secret
        (bytes(32), 2, [1, 1]),
        (bytes(32), 1, [1 << 32]),
    ],
)
def test_sharing_that_would_not_hide_is_refused(
    secret: bytes, threshold: int, points: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"secret|threshold|Points"):
        shamir.split(secret, threshold, points)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 11])
def test_every_number_of_holders_works_even_and_odd(count: int) -> None:
    """Flower's graph raises IndexError for an even number of shares (defect S7)."""
    points = list(range(1, count + 1))
    shares = shamir.split(b"s" * 32, count // 2 + 1, points)
    some = dict(list(zip(points, shares, strict=True))[-(count // 2 + 1) :])
    assert shamir.combine(some) == b"s" * 32


def test_shares_that_are_no_field_elements_are_refused() -> None:
    shares = shamir.split(bytes(32), 2, [1, 2])
    for bad in (b"\xff" * 33, shares[0][:-1], shares[0] + b"\0"):
        with pytest.raises(ValueError, match="no element"):
            shamir.combine({1: bad, 2: shares[1]})
    with pytest.raises(ValueError, match="no share"):
        shamir.combine({})


def test_inconsistent_shares_never_give_a_wrong_length() -> None:
    results = {shamir.combine({1: bytes(32) + bytes([i]), 2: b"\1" + bytes(32)}) for i in range(64)}
    assert all(result is None or len(result) == 32 for result in results)
