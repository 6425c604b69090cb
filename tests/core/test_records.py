"""Tensors to records and back: the same bits, whatever the dtype and shape; hostile bytes."""

from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from umbel.core.records import (
    Manifest,
    from_array,
    from_kept,
    kept_array,
    same_bits,
    to_array,
)

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.int32, np.int16, np.int8, np.uint8]
ARRAYS = st.sampled_from([*DTYPES, np.bool_]).flatmap(
    lambda dtype: hnp.arrays(
        dtype, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
    )
)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).numpy().tobytes()


@given(ARRAYS)
def test_any_tensor_comes_back_with_the_same_bits(values: np.ndarray[Any, Any]) -> None:
    tensor = torch.from_numpy(np.array(values))
    back = from_array(to_array(tensor))
    assert back.shape == tensor.shape and back.dtype == tensor.dtype
    assert bits(back) == bits(tensor)


@given(ARRAYS)
def test_flower_reads_and_writes_the_same_bytes(values: np.ndarray[Any, Any]) -> None:
    array = to_array(torch.from_numpy(np.array(values)))
    np.testing.assert_array_equal(array.numpy(), values)
    assert array.numpy().dtype == values.dtype
    back = from_array(Array(np.ascontiguousarray(values)))
    np.testing.assert_array_equal(back.numpy(), np.ascontiguousarray(values))


def test_a_view_that_is_not_contiguous_is_written_in_its_own_order() -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    assert torch.equal(from_array(to_array(tensor)), tensor)


def test_bfloat16_travels_as_float32() -> None:
    tensor = torch.tensor([1.5, -2.25, float("inf")], dtype=torch.bfloat16)
    assert torch.equal(from_array(to_array(tensor)), tensor.float())


def test_a_fortran_vector_is_a_vector() -> None:
    values = np.asfortranarray(np.arange(5.0))
    assert torch.equal(from_array(Array(values)), torch.arange(5.0, dtype=torch.float64))


def test_reading_copies_nothing() -> None:
    array = to_array(torch.arange(1000.0))
    start = np.frombuffer(array.data, np.uint8).__array_interface__["data"][0]
    assert 0 < from_array(array).data_ptr() - start < 200


def saved(header: bytes, payload: bytes, version: bytes = b"\x01\x00") -> Array:
    width = 2 if version == b"\x01\x00" else 4
    data = b"\x93NUMPY" + version + len(header).to_bytes(width, "little") + header + payload
    return Array("float32", (1,), "numpy.ndarray", data)


def described(descr: str, shape: str, order: str = "False") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"
    return (text + " " * (-(len(text) + 11) % 64) + "\n").encode()


HOSTILE = {
    "nothing": Array("float32", (1,), "numpy.ndarray", b""),
    "no magic": Array("float32", (1,), "numpy.ndarray", b"0123456789abcdef"),
    "cut": Array("float32", (1,), "numpy.ndarray", b"\x93NUMPY\x01\x00"),
    "no header": saved(b"", b"\0\0\0\0"),
    "objects": saved(described("'|O'", "(1,)"), b"\0" * 8),
    "records": saved(described("[('a', '<f4')]", "(1,)"), b"\0" * 4),
    "text": saved(described("'<U1'", "(1,)"), b"\0" * 4),
    "dates": saved(described("'<M8[s]'", "(1,)"), b"\0" * 8),
    "complex": saved(described("'<c8'", "(1,)"), b"\0" * 8),
    "too short": saved(described("'<f4'", "(2,)"), b"\0" * 4),
    "too long": saved(described("'<f4'", "(1,)"), b"\0" * 8),
    "huge": saved(described("'<f4'", "(10**18,)"), b"\0" * 4),
    "huge shape": saved(described("'<f4'", "(1000000000000000000,)"), b"\0" * 4),
    "negative": saved(described("'<f4'", "(-1, -1)"), b"\0" * 4),
    "overflowing": saved(described("'<f4'", "(4294967296, 4294967296, 0)"), b""),
    "many axes": saved(described("'<f4'", "(" + "1," * 100 + ")"), b"\0" * 4),
    "code": saved(described("__import__('os').getpid()", "(1,)"), b"\0" * 4),
    "nested": saved(b"(" * 5000 + b")" * 5000 + b"\n", b""),
    "not text": saved(bytes(range(128, 256)), b"\0" * 4),
    "matrix in Fortran order": saved(described("'<f4'", "(1, 2)", "True"), b"\0" * 8),
    "the other byte order": saved(described("'>f4'", "(1,)"), b"\0" * 4),
    "long double": saved(described("'<f16'", "(1,)"), b"\0" * 16),
    "a version of the future": saved(described("'<f4'", "(1,)"), b"\0" * 4, b"\x07\x00"),
    "a header longer than the bytes": Array(
        "float32", (1,), "numpy.ndarray", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b"x" * 40
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_a_value_error(name: str) -> None:
    with pytest.raises(ValueError):
        from_array(HOSTILE[name])


def test_another_serialisation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"'torch\.pickle'"):
        from_array(Array("float32", (1,), "torch.pickle", b"\x80"))


@settings(max_examples=300)
@given(st.binary(max_size=160), st.integers(0, 127), st.integers(0, 255))
def test_damaged_bytes_are_numbers_or_a_value_error(tail: bytes, at: int, byte: int) -> None:
    good = bytearray(to_array(torch.arange(4.0)).data)
    good[at % len(good)] = byte
    for data in (bytes(good), b"\x93NUMPY\x01\x00" + tail, b"\x93NUMPY\x02\x00" + tail):
        try:
            tensor = from_array(Array("float32", (4,), "numpy.ndarray", data))
        except ValueError:
            continue
        assert isinstance(tensor, torch.Tensor)


TREES = st.dictionaries(
    st.text("abc.", min_size=1, max_size=5),
    st.sampled_from([np.float32, np.float64, np.float16]).flatmap(
        lambda dtype: hnp.arrays(
            dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
        )
    ),
    max_size=5,
)


@given(TREES)
def test_a_tree_survives_its_flat_vector(arrays: dict[str, np.ndarray[Any, Any]]) -> None:
    tree = {name: torch.from_numpy(np.array(values)) for name, values in arrays.items()}
    manifest = Manifest.of(tree)
    vector = manifest.flatten(tree)
    assert vector.shape == (manifest.size,)
    double = any(tensor.dtype == torch.float64 for tensor in tree.values())
    assert vector.dtype == (torch.float64 if double else torch.float32)
    back = manifest.unflatten(vector)
    assert list(back) == list(tree)
    for name, tensor in tree.items():
        assert back[name].shape == tensor.shape and back[name].dtype == tensor.dtype
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)


def test_flattening_copies_and_unflattening_does_not() -> None:
    tree = {"a": torch.ones(2, 3), "b": torch.zeros(())}
    manifest = Manifest.of(tree)
    vector = manifest.flatten(tree)
    manifest.unflatten(vector)["a"].fill_(7)
    assert vector.tolist() == [7.0] * 6 + [0.0]
    assert tree["a"].sum() == 6


def test_the_digest_tells_layouts_apart() -> None:
    tree = {"a": torch.ones(2, 3), "b": torch.zeros(4)}
    digests = {
        Manifest.of(layout).digest
        for layout in (
            tree,
            {"b": tree["b"], "a": tree["a"]},
            {"a": torch.ones(3, 2), "b": tree["b"]},
            {"a": torch.ones(2, 3).double(), "b": tree["b"]},
            {"x": tree["a"], "b": tree["b"]},
        )
    }
    assert len(digests) == 5
    assert Manifest.of({k: v.clone() for k, v in tree.items()}).digest == Manifest.of(tree).digest


@pytest.mark.parametrize("kind", [torch.complex64, torch.complex128])
@given(st.integers(0, 3), st.integers(0, 3))
def test_complex_numbers_keep_both_parts(kind: torch.dtype, before: int, size: int) -> None:
    """Whatever lies before them in the vector: an odd place is no address of a complex number."""
    generator = torch.Generator().manual_seed(size)
    tree = {
        "first": torch.randn(before, generator=generator),
        "c": torch.randn(size, 2, dtype=kind, generator=generator),
        "conjugate": torch.randn(2, dtype=kind, generator=generator).conj(),
        "last": torch.randn(2, generator=generator),
    }
    manifest = Manifest.of(tree)
    vector = manifest.flatten(tree)
    assert vector.shape == (manifest.size,) == (before + 4 * size + 6,)
    assert vector.dtype == kind.to_real()
    back = manifest.unflatten(vector)
    assert all(torch.equal(back[name], tree[name]) for name in tree)


KEPT = [
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.bool,
]


@pytest.mark.parametrize("kind", KEPT)
def test_what_a_node_keeps_comes_back_in_its_own_type(kind: torch.dtype) -> None:
    value = torch.arange(6.0).reshape(2, 3).to(kind)
    back = from_kept(kept_array(value), torch.zeros(2, 3).to(kind))
    assert same_bits(back, value)
    assert back.shape == value.shape
    assert not same_bits(torch.ones(2, 3).to(kind), value)
    assert not same_bits(value, torch.zeros(2, 3, dtype=torch.float32))
    if kind.is_complex:
        with pytest.raises(ValueError, match=r"bytes are no torch\.complex"):
            from_kept(kept_array(value[:1]), value)
