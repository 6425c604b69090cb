"""Packing: exact, as small as promised, and sums without unpacking."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.privacy.masking import masks, packing

BITS = st.integers(1, 62)


def draw(size: int, bits: int, seed: int) -> masks.Words:
    return np.random.default_rng(seed).integers(0, 1 << bits, size).astype(masks.word(bits))


@given(st.integers(0, 300), BITS, st.integers(0, 99))
@settings(deadline=None)
def test_unpacking_gives_back_what_was_packed(size: int, bits: int, seed: int) -> None:
    values = draw(size, bits, seed)
    payload = packing.pack(values, bits)
    assert len(payload) == packing.packed_bytes(size, bits)
    assert np.array_equal(packing.unpack(payload, size, bits), values)


@given(st.integers(1, 200), BITS, st.integers(1, 6))
@settings(deadline=None)
def test_packed_vectors_add_up_modulo_the_modulus(size: int, bits: int, count: int) -> None:
    rows = [draw(size, bits, seed) for seed in range(count)]
    total = packing.empty_total(size, bits)
    for row in rows:
        packing.add_packed(total, packing.pack(row, bits), bits)
    expected = np.array([row.astype(object) for row in rows]).sum(axis=0) % (1 << bits)
    assert masks.reduce(total, bits)[:size].tolist() == expected.tolist()


@given(st.integers(1, 3000), BITS, st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_short_and_long_vectors_are_packed_into_the_same_bits(
    size: int, bits: int, seed: int
) -> None:
    """There are two ways to do it, one by single bits and one by rows; either must give what the
    other gives, whatever the length at which they take turns."""
    values, found = draw(size, bits, seed), []
    for narrow in (0, 1000):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(packing, "_NARROW", narrow)
            total = packing.empty_total(size, bits)
            total[:size] = values
            payload = packing.pack(values, bits)
            packing.add_packed(total, payload, bits)
            found.append((payload, masks.reduce(total, bits).tolist()))
    assert found[0] == found[1]


@given(st.integers(1, 100), BITS)
@settings(deadline=None)
def test_bits_above_the_modulus_never_reach_the_wire(size: int, bits: int) -> None:
    values = draw(size, bits, 0)
    dirty = values | masks.word(bits).type(~((1 << bits) - 1) & ((1 << 8 * values.itemsize) - 1))
    assert packing.pack(dirty, bits) == packing.pack(values, bits)


@pytest.mark.parametrize("bits", [8, 16, 20, 24, 32, 40])
def test_a_million_integers_cost_their_bits_and_less_than_one_percent(bits: int) -> None:
    assert packing.packed_bytes(1_000_000, bits) <= 1.01 * 1_000_000 * bits / 8


@pytest.mark.parametrize("change", [-1, 1, 4, 1000])
def test_a_payload_of_another_length_is_refused(change: int) -> None:
    """A vector that is cut, or too long, must not be folded into a part of the sum."""
    payload = packing.pack(draw(100, 20, 0), 20)
    wrong = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(ValueError, match="has 320 bytes, not"):
        packing.add_packed(packing.empty_total(100, 20), wrong, 20)
