"""Records between processes: large bytes travel once, and nobody's changes reach another."""

import gc
import pickle
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from umbel.core.records import from_array, record_of, to_array
from umbel.server.embedded.mapped import PAGE, File, Mapped
from umbel.server.embedded.packing import BY_FILE, Packed, pack, receive, send, unpack
from umbel.strategies.secure.wire import content_of, plain_of


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
        assert receive(right) == packed
        sender.join()
    with pytest.raises(OSError):
        receive(right)


def test_half_a_message_is_the_end() -> None:
    left, right = socket.socketpair()
    with right:
        left.sendall(b"\x10\0\0\0\x01\0\0\0\x05")
        left.close()
        with pytest.raises(EOFError):
            receive(right)


def test_large_blobs_go_by_file_and_are_mapped_or_copied() -> None:
    left, right = socket.socketpair()
    blobs = (bytes(range(256)) * 257, b"small" * 1000, b"x" * BY_FILE, b"y" * (BY_FILE + PAGE))
    packed = Packed(b"text", blobs)
    with left, right:
        for mapped in (False, True):
            send(left, packed)
            found = receive(right, mapped=mapped)
            assert found == packed
            kind = Mapped if mapped else bytes
            assert [type(blob) for blob in found.blobs] == [kind, bytes, kind, kind]


def test_a_mapped_blob_is_as_good_as_bytes_and_nobody_writes_to_anothers() -> None:
    vector = torch.arange(50_000, dtype=torch.float32)
    array = to_array(vector, lambda parts: File().fill(list(parts)))
    assert isinstance(array.data, Mapped) and array.data == to_array(vector).data
    np.testing.assert_array_equal(array.numpy(), vector.numpy())
    again = pickle.loads(pickle.dumps(array))
    assert type(again.data) is bytes and again == to_array(vector)
    left, right = socket.socketpair()
    packed = pack(RecordDict({"m": record_of({"w": array})}))
    with left, right:
        readers = []
        for _ in range(2):
            send(left, packed)
            readers.append(unpack(receive(right, mapped=True)))
    own, others = (from_array(reader["m"]["w"]) for reader in readers)
    own += 1  # never to be done, and of no consequence to others
    assert torch.equal(others, vector) and torch.equal(from_array(array), vector)


def test_a_large_message_of_a_secure_sum_is_bytes_again() -> None:
    """A masked vector of a worker lies in mapped memory, and its reader wants bytes."""
    vector = bytes(range(256)) * (BY_FILE // 128)
    ends = socket.socketpair()
    sender = threading.Thread(
        target=lambda: send(ends[0], pack(content_of({"vector": vector, "lost": 2})))
    )
    sender.start()
    content = unpack(receive(ends[1], mapped=True))
    sender.join()
    for end in ends:
        end.close()
    assert plain_of(content) == {"vector": vector, "lost": 2}
    assert type(plain_of(content)["vector"]) is bytes


def test_files_go_with_the_last_who_has_them() -> None:
    def files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    before = files()
    blob = File().fill([b"a" * 5000, b"b"])
    assert blob[4999:] == b"ab" and files() > before
    del blob
    assert files() == before
