"""Records between processes: large bytes travel once, and nobody's changes reach another."""

import copy
import gc
import pickle
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from umbel.core.held import HeldArray
from umbel.core.records import from_array, record_of, to_array
from umbel.server.embedded.mapped import PAGE, File, Mapped
from umbel.server.embedded.packing import BY_FILE, Packed, by_file, pack, receive, send, unpack


def records(size: int = 5000) -> RecordDict:
    values = Array(np.arange(size, dtype=np.float32))
    return RecordDict({"m": ArrayRecord({"w": values}), "c": ConfigRecord({"n": [1, 2]})})


def test_large_bytes_stand_beside_and_are_shared() -> None:
    content = records()
    packed = pack(content)
    assert len(packed.text) < 2000 and len(packed.blobs) == 1
    first, second = unpack(packed), unpack(packed)
    assert first["m"]["w"].data is second["m"]["w"].data is content["m"]["w"].data  # type: ignore[index,union-attr]
    first["c"]["n"].append(3)
    first["m"]["more"] = first["m"]["w"]
    assert second == content and list(second["m"]) == ["w"] and second["c"]["n"] == [1, 2]


def test_what_stands_beside_has_no_meaning_to_plain_pickle() -> None:
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(pack(records()).text)


BLOBS = st.lists(st.binary(max_size=50), max_size=5)


@given(st.binary(max_size=200), BLOBS, st.booleans())
def test_the_pipe_carries_anything(text: bytes, blobs: list[bytes], slowly: bool) -> None:
    left, right = socket.socketpair()
    if slowly:
        left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    packed = Packed(text, (*blobs, bytes(300_000 if slowly else 3)))
    sender = threading.Thread(target=send, args=(left, packed))
    with left, right:
        sender.start()
        found = receive(right)
        sender.join()
    assert found.text == text and tuple(map(as_bytes, found.blobs)) == packed.blobs
    with pytest.raises(OSError):
        receive(right)


def test_half_a_message_is_the_end() -> None:
    left, right = socket.socketpair()
    with right:
        left.sendall(b"\x10\0\0\0\x01\0\0\0\x05")
        left.close()
        with pytest.raises(EOFError):
            receive(right)


def test_large_blobs_go_by_file_and_are_mapped() -> None:
    blobs = (bytes(range(256)) * 257, b"small" * 1000, b"x" * BY_FILE, b"y" * (BY_FILE + PAGE))
    found = sent(Packed(b"text", blobs))
    assert [type(blob) for blob in found.blobs] == [Mapped, bytes, Mapped, Mapped]
    assert tuple(map(as_bytes, found.blobs)) == blobs


def as_bytes(blob: bytes | Mapped) -> bytes:
    return bytes(blob.view) if isinstance(blob, Mapped) else blob


def sent(packed: Packed, *, keep: bool = False) -> Packed:
    """What the other end of a pipe gets."""
    left, right = socket.socketpair()
    with left, right:
        sender = threading.Thread(target=send, args=(left, packed))
        sender.start()
        found = receive(right, keep=keep)
        sender.join()
        return found


def arrived(record: ArrayRecord) -> ArrayRecord:
    found: ArrayRecord = unpack(sent(pack(record)))
    return found


def test_a_large_array_is_read_where_it_lies_and_is_an_ordinary_one_once_asked_for_bytes() -> None:
    values = np.arange(50_000, dtype=np.float32)
    own = ArrayRecord({"w": Array(values), "v": Array(values[:30_000])})
    got = arrived(own)
    array = got["w"]
    assert isinstance(array, HeldArray) and array == own["w"] and own["w"] == array
    mine = array.numpy()
    np.testing.assert_array_equal(mine, values)
    mine += 1  # the app's own copy
    np.testing.assert_array_equal(array.numpy(), values)
    assert isinstance(array, HeldArray)  # nobody has copied it to bytes yet
    assert pickle.loads(pickle.dumps(array)) == own["w"] == copy.deepcopy(array)
    assert array.data == own["w"].data and type(array) is Array and type(array.data) is bytes
    assert got.object_id == own.object_id and got == own
    other = arrived(own)["w"]
    other.data = b"other"
    assert other.data == b"other" and type(other) is Array
    with pytest.raises(AttributeError):
        arrived(own)["w"].nothing  # noqa: B018


@pytest.mark.parametrize(
    "values",
    [
        np.asfortranarray(np.arange(40_000.0).reshape(200, 200)),
        np.arange(40_000, dtype=">f4"),
        np.zeros(20_000, [("a", np.int32), ("b", np.float32)]),
        np.full(20_000, 1 + 2j),
        np.full(20_000, "text"),
    ],
    ids=["Fortran", "big-endian", "structured", "complex", "text"],
)
def test_arrays_of_every_kind_arrive_as_flower_reads_them(values: np.ndarray[Any, Any]) -> None:
    own = ArrayRecord({"w": Array(values)})
    found, expected = arrived(own)["w"].numpy(), own["w"].numpy()
    assert found.dtype == expected.dtype and found.flags.writeable
    np.testing.assert_array_equal(found, expected)


def test_bytes_that_are_no_array_arrive_as_bytes() -> None:
    own = RecordDict({"c": ConfigRecord({"blob": b"x" * (2 * BY_FILE)})})
    assert unpack(sent(pack(own))) == own


def test_a_round_of_large_replies_leaves_no_file_open() -> None:
    """Whoever holds thousands of replies must not run into the limit of open files."""
    own = ArrayRecord({f"w{i}": Array(np.ones(20_000, np.float32)) for i in range(3)})
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [arrived(own) for _ in range(20)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all(record == own for record in held)


def test_what_comes_back_as_it_was_goes_by_the_file_it_came_in() -> None:
    record = ArrayRecord({f"w{i}": Array(np.full(20_000, i, np.float32)) for i in range(3)})
    there = sent(pack(record), keep=True)
    content = unpack(there)
    file = by_file(pack(content))
    assert file is not None and by_file(pack(unpack(there))) is file
    assert unpack(sent(pack(content))) == record
    content["w0"], content["w1"] = content["w1"], content["w0"]
    assert by_file(pack(content)) is not file  # they lie there in another order
    assert np.all(unpack(sent(pack(content)))["w0"].numpy() == 1)


def test_nobody_writes_to_anothers() -> None:
    vector = torch.arange(50_000, dtype=torch.float32)
    array = to_array(vector, lambda parts: File().fill(parts))
    np.testing.assert_array_equal(array.numpy(), vector.numpy())
    packed = pack(RecordDict({"m": record_of({"w": array})}))
    own, others = (from_array(unpack(sent(packed))["m"]["w"]) for _ in range(2))
    own += 1  # never to be done, and of no consequence to others
    assert torch.equal(others, vector) and torch.equal(from_array(array), vector)


def test_files_go_with_the_last_who_has_them() -> None:
    def files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = files()
    blob = File().fill([b"a" * 5000, b"b"])
    assert bytes(blob.view[4999:]) == b"ab" and files() > before
    del blob
    assert files() == before
