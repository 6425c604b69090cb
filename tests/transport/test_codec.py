"""The codec: round trips, what hostile bytes get, and what they can make us allocate."""

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Error,
    Message,
    Metadata,
    MetricRecord,
    RecordDict,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from umbel.transport.codec import (
    CodecError,
    Limits,
    decode,
    decode_message,
    decode_values,
    encode,
    encode_message,
    encode_values,
    size_of,
)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
integers = st.integers(-(1 << 80), 1 << 80)
reals = st.floats(allow_nan=False)
numbers = integers | reals
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
blobs = st.binary(max_size=30) | st.binary(min_size=4096, max_size=5000)
dtypes = (
    hnp.integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?", sizes=(16, 32, 64))
    | hnp.boolean_dtypes()
    | hnp.complex_number_dtypes(endianness="?", sizes=(64, 128))
    | st.sampled_from(
        [
            np.dtype([("a", "<f4"), ("b", "<i4", (2,))]),
            np.dtype([("a", "u1"), ("b", [("c", ">f8")])], align=True),
            np.dtype({"names": ["a"], "formats": ["<i2"], "offsets": [2], "itemsize": 8}),
        ]
    )
)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
metrics = st.dictionaries(names, numbers | st.lists(integers) | st.lists(reals), max_size=4)
configs = st.dictionaries(
    names,
    numbers
    | texts
    | blobs
    | st.booleans()
    | st.lists(integers)
    | st.lists(reals)
    | st.lists(texts)
    | st.lists(blobs, max_size=3)
    | st.lists(st.booleans()),
    max_size=4,
)
opaque = st.builds(Array, texts, st.tuples(st.integers(0, 9)), st.just("own"), blobs)
records = (
    st.dictionaries(names, arrays.map(Array) | opaque, max_size=4).map(ArrayRecord)
    | metrics.map(MetricRecord)
    | configs.map(ConfigRecord)
)
contents = st.dictionaries(names, records, max_size=4).map(RecordDict)


def message_of(content: RecordDict | None = None, error: Error | None = None) -> Message:
    metadata = Metadata(
        run_id=2**64 - 1,
        message_id="m" * 64,
        src_node_id=1,
        dst_node_id=-(2**63),
        reply_to_message_id="",
        group_id="3",
        created_at=1.25,
        ttl=43200.0,
        message_type="train.own",
    )
    make: Any = Message
    message: Message = make(metadata=metadata, content=content, error=error)
    return message


def typed(content: RecordDict) -> Any:
    """A content with the types of its scalars, which `==` alone does not tell apart."""
    return [
        (name, type(record), [(key, repr(record[key])) for key in record])
        for name, record in content.items()
    ]


@settings(max_examples=80, deadline=None)
@given(contents, st.integers(1, 4000), st.booleans())
def test_decode_undoes_encode_however_the_bytes_are_cut(
    content: RecordDict, size: int, checksum: bool
) -> None:
    parts = encode(content, checksum=checksum)
    data = b"".join(parts)
    assert size_of(parts) == len(data)
    cut = [memoryview(data)[at : at + size] for at in range(0, len(data), size)]
    for form in (data, bytearray(data), memoryview(data), cut, parts):
        got = decode(form, checksum=checksum)
        assert typed(got) == typed(content)
    for record in got.array_records.values():
        assert all(type(array.data) is bytes for array in record.values())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -0.0, 5e-324])
def test_every_float_keeps_its_bits(value: float) -> None:
    content = RecordDict({"m": MetricRecord({"x": value, "list": [value, 1.0]})})
    got = decode(encode(content)).metric_records["m"]
    assert repr(got["x"]) == repr(value)
    assert repr(got["list"]) == repr([value, 1.0])


@settings(max_examples=40, deadline=None)
@given(contents)
def test_a_message_keeps_content_and_metadata(content: RecordDict) -> None:
    message = message_of(content)
    shared = encode(content)
    for parts in (encode_message(message), encode_message(message, body=shared)):
        got = decode_message(b"".join(parts), checksum=True)
        assert got.metadata.__dict__ | {"_delivered_at": ""} == message.metadata.__dict__
        assert typed(got.content) == typed(content)


def test_an_error_reply_keeps_code_and_reason() -> None:
    for reason in ("the trainer ran out of memory", None):
        got = decode_message(encode_message(message_of(error=Error(7, reason))))
        assert got.has_error() and not got.has_content()
        assert (got.error.code, got.error.reason) == (7, reason)


def test_encoding_copies_no_tensor_and_decoding_copies_it_once() -> None:
    array = Array(np.zeros(4_000_000, np.float32))
    content = RecordDict({"a": ArrayRecord({"x": array})})
    tracemalloc.start()
    try:
        parts = encode(content)
        assert tracemalloc.get_traced_memory()[1] < 100_000
        assert any(part is array.data for part in parts)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        got = decode(parts)
        assert tracemalloc.get_traced_memory()[1] - before < len(array.data) + 100_000
    finally:
        tracemalloc.stop()
    assert got == content


SAMPLE = RecordDict(
    {
        "arrays": ArrayRecord({"w": Array(np.arange(6, dtype=np.float32).reshape(2, 3))}),
        "metrics": MetricRecord({"loss": 0.5, "curve": [1.0, 2.0], "n": [1, 2**70]}),
        "config": ConfigRecord({"a": "text", "b": b"x" * 5000, "c": [True], "d": ["s"], "e": []}),
    }
)


VALUES = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=9),
    st.one_of(st.integers(), st.text(max_size=9), st.binary(max_size=5000)),
    max_size=5,
)


@given(VALUES)
def test_values_without_flower_s_objects_are_the_same_bytes(values: dict[str, Any]) -> None:
    content = RecordDict({"secure": ConfigRecord({**values})})
    data = b"".join(encode_values("secure", values))
    assert data == b"".join(encode(content))
    assert decode_values(data, "secure") == values


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord()}),
        RecordDict({"secure": MetricRecord({"a": 1})}),
        RecordDict({"secure": ConfigRecord(), "other": ConfigRecord()}),
    ],
)
def test_values_are_read_from_nothing_else(content: RecordDict) -> None:
    with pytest.raises(CodecError):
        decode_values(b"".join(encode(content)), "secure")


@pytest.mark.parametrize("checksum", [True, False])
def test_every_cut_and_every_added_byte_is_refused(checksum: bool) -> None:
    data = b"".join(encode(SAMPLE, checksum=checksum))
    for size in [*range(len(data) - 4900), len(data) - 1]:
        with pytest.raises(CodecError):
            decode(data[:size])
    with pytest.raises(CodecError, match="follow the end"):
        decode(data + b"x")


def test_with_a_checksum_every_changed_byte_is_noticed() -> None:
    data = b"".join(encode(SAMPLE))
    for at in [*range(500), *range(500, len(data), 97)]:
        changed = bytearray(data)
        changed[at] ^= 0x10
        with pytest.raises(CodecError):
            decode(changed, checksum=True)


def test_a_message_without_a_checksum_is_refused_where_one_is_due() -> None:
    with pytest.raises(CodecError, match="without a checksum"):
        decode(encode(SAMPLE, checksum=False), checksum=True)


plain = b"".join(encode(SAMPLE, checksum=False))
edits = st.lists(st.tuples(st.integers(0, len(plain) - 4900), st.binary(max_size=9)), max_size=5)


@settings(max_examples=800, deadline=None)
@given(edits, st.integers(0, 5000))
def test_hostile_bytes_give_a_codec_error_or_a_content(
    edits: list[tuple[int, bytes]], cut: int
) -> None:
    """Edited where it hurts: without a checksum, so that the edits reach every parser."""
    data = bytearray(plain)
    for at, replacement in edits:
        data[at : at + len(replacement)] = replacement
    if cut < 400:
        del data[cut : cut + 3]
    try:
        content = decode(data)
    except CodecError:
        return
    for record in content.array_records.values():
        for array in record.values():
            if array.stype == "numpy.ndarray":
                assert array.numpy().shape == array.shape


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode(data)
    with pytest.raises(CodecError):
        decode_message(data)


def unannounced(data: bytes) -> RecordDict:
    """An array as Flower's older interface sends it: without dtype, without shape."""
    return RecordDict({"r": ArrayRecord({"0": Array("", (), "numpy.ndarray", data)})})


@given(arrays)
def test_arrays_of_flowers_older_interface_come_back(array: np.ndarray[Any, Any]) -> None:
    content = unannounced(Array(array).data)
    back = decode(b"".join(encode(content)))
    assert back == content
    check_equal(back.array_records["r"]["0"].numpy(), array)


def check_equal(found: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> None:
    """Field by field: a NaN in a structure equals nothing, and what lies between fields is none."""
    assert (found.dtype, found.shape) == (right.dtype, right.shape)
    if right.dtype.names is None:
        np.testing.assert_array_equal(found, right)
    for name in right.dtype.names or ():
        check_equal(found[name], right[name])


@pytest.mark.parametrize("items", [0, 2, 4, 1 << 61])
def test_an_unannounced_array_is_held_to_the_bytes_behind_its_header(items: int) -> None:
    data = Array(np.arange(3.0)).data.replace(b"(3,), }", b"(%d,), }" % items)
    with pytest.raises(CodecError, match=r"are there|no memory"):
        decode(b"".join(encode(unannounced(data))))
    with pytest.raises(CodecError, match="NumPy header"):
        decode(b"".join(encode(unannounced(b"no array"))))
    objects = Array(np.arange(3.0)).data.replace(b"<f8", b"|O8")
    with pytest.raises(CodecError, match=r"do not travel|NumPy header"):
        decode(b"".join(encode(unannounced(objects))))


def test_a_huge_claim_allocates_nothing() -> None:
    data = b"".join(encode(SAMPLE, checksum=False))
    tracemalloc.start()
    try:
        for at in range(400):
            for claim in (b"\xff" * 8, (1 << 62).to_bytes(8, "little"), b"\xff\xff\xff\x7f"):
                changed = bytearray(data)
                changed[at : at + len(claim)] = claim
                with pytest.raises(CodecError):
                    decode(changed, limits=Limits(total=1 << 63, table=1 << 63))
                    raise CodecError("a change in the numbers themselves is no lie")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # the smallest claim is 2 GB
    finally:
        tracemalloc.stop()


def test_a_numpy_file_must_be_what_it_was_announced_to_be() -> None:
    good = Array(np.zeros((2, 3), np.float32))
    lies = [
        Array("float32", (2, 4), "numpy.ndarray", good.data),
        Array("float64", (2, 3), "numpy.ndarray", good.data),
        Array("float32", (2, 3), "numpy.ndarray", good.data[:-1]),
        Array("float32", (2, 3), "numpy.ndarray", good.data + b"\0"),
        Array("float32", (2, 3), "numpy.ndarray", b""),
        Array("object", (2, 3), "numpy.ndarray", good.data),
        Array("no-such-type", (2, 3), "numpy.ndarray", good.data),
        Array("float32", (-2, -3), "numpy.ndarray", good.data),
        Array("float32", (1 << 40, 1 << 40), "numpy.ndarray", good.data),
        Array("float32", (2, 3), "numpy.ndarray", good.data.replace(b"(2, 3)", b"(9, 9)")),
    ]
    for lie in lies:
        with pytest.raises(CodecError):
            decode(encode(RecordDict({"a": ArrayRecord({"x": lie})})))


def test_numpy_files_that_numpy_would_write_otherwise_are_read() -> None:
    fortran = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    odd = Array(np.zeros((2, 3), np.float32))
    spaced = odd.data.replace(b"'shape': (2, 3), }  ", b"'shape': ( 2, 3), } ")
    for array in (Array(fortran), Array("float32", (2, 3), "numpy.ndarray", spaced)):
        content = RecordDict({"a": ArrayRecord({"x": array})})
        got = decode(encode(content)).array_records["a"]["x"].numpy()
        assert np.array_equal(got, array.numpy())


def test_limits_are_kept() -> None:
    data = b"".join(encode(SAMPLE))
    with pytest.raises(CodecError, match="over the limits"):
        decode(data, limits=Limits(total=1000))
    with pytest.raises(CodecError, match="over the limits"):
        decode(data, limits=Limits(table=100))


@pytest.mark.parametrize("text", ["\ud800", "x" * 70_000])
def test_a_name_without_encoding_is_refused_before_sending(text: str) -> None:
    with pytest.raises(CodecError):
        encode(RecordDict({text: ConfigRecord({"a": 1})}))


def test_names_that_appear_twice_are_refused() -> None:
    data = b"".join(
        encode(
            RecordDict({"aa": ConfigRecord({"cc": 1, "dd": 2}), "bb": ConfigRecord()}),
            checksum=False,
        )
    )
    for old, new in ((b"bb", b"aa"), (b"dd", b"cc")):
        with pytest.raises(CodecError, match=r"twice|two entries"):
            decode(data.replace(old, new))
