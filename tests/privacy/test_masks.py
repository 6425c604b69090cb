"""Masks: the keystream itself, cancelling exactly, uniform at every modulus."""

import math

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.masking import masks

KEYS = st.binary(min_size=32, max_size=32)


@given(KEYS, st.integers(0, 70_000), st.sampled_from([20, 32, 33, 62]))
@settings(max_examples=30, deadline=None)
def test_a_mask_is_the_low_bits_of_the_aes_keystream(key: bytes, size: int, bits: int) -> None:
    kind = masks.word(bits)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    words = np.frombuffer(stream.update(bytes(size * kind.itemsize)), kind)
    assert np.array_equal(masks.expand(key, size, bits), words & kind.type((1 << bits) - 1))


@given(st.lists(KEYS, max_size=5), st.sampled_from([7, 32, 48]), st.integers(1, 40_000))
@settings(max_examples=30, deadline=None)
def test_masks_that_are_added_and_subtracted_cancel(
    keys: list[bytes], bits: int, size: int
) -> None:
    values = np.arange(size, dtype=masks.word(bits))
    total = values.copy()
    masks.fold(total, plus=keys)
    masks.fold(total, minus=keys)
    assert np.array_equal(total, values)


def test_every_value_of_the_modulus_occurs_equally_often() -> None:
    """Flower's generator never gives the largest value (defect S3); chi-squared at 1e-7."""
    counts = np.bincount(masks.expand(b"k" * 32, 800_000, 3).astype(int), minlength=8)
    statistic = float(((counts - 100_000) ** 2 / 100_000).sum())
    assert statistic < 45.0  # 7 degrees of freedom: exceeded with probability 1.4e-7


def test_no_bit_of_the_key_is_thrown_away() -> None:
    """Flower folds 256 bits to 28 (defect S2): there, half of all single-bit changes vanish."""
    key = bytes(range(32))
    first = masks.expand(key, 8, 32).tobytes()
    for bit in range(256):
        changed = (int.from_bytes(key) ^ 1 << bit).to_bytes(32)
        assert masks.expand(changed, 8, 32).tobytes() != first


@given(st.integers(1, 62), st.data())
@settings(deadline=None)
def test_the_centred_lift_inverts_reduction(bits: int, data: st.DataObject) -> None:
    half = 1 << (bits - 1)
    value = data.draw(st.integers(-half, half - 1))
    words = np.array([value % (1 << bits)], masks.word(bits))
    assert masks.lift(words, bits).tolist() == [value]


@pytest.mark.parametrize("bits", [0, -1, 63, 64])
def test_a_modulus_out_of_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="cannot be used"):
        masks.word(bits)


def test_a_short_key_and_a_signed_vector_are_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, not 16"):
        masks.expand(b"k" * 16, 4, 20)
    with pytest.raises(ValueError, match="int64"):
        masks.fold(np.zeros(4, np.int64), plus=[b"k" * 32])  # type: ignore[arg-type]


def test_two_keys_give_unrelated_masks() -> None:
    """The correlation of 200,000 words has a standard error of 1/447; six of them are 2e-9."""
    first, second = (masks.expand(bytes([k]) * 32, 200_000, 32).astype(float) for k in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / math.sqrt(200_000)
