"""Records between processes: large bytes travel once, and nobody's changes reach another."""

import pickle
import socket
import threading
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from umbel.server.embedded.packing import LARGE, BlobCache, Packed, pack, receive, send, unpack


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


@given(st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=20), st.integers(1, 3))
def test_both_sides_of_a_cache_agree(tasks: list[list[int]], keep: int) -> None:
    """Whatever is sent in whatever order: the receiver has it, and repeats cost nothing."""
    blobs = [bytes([i]) * (LARGE + i) for i in range(7)]
    sender, receiver = BlobCache(keep), BlobCache(keep)
    recent: list[set[int]] = []
    for wanted in tasks:
        numbers, new = sender.split([blobs[i] for i in wanted])
        assert receiver.join(numbers, new) == [blobs[i] for i in wanted]
        known: set[int] = set().union(*recent[-keep:])
        assert len(new) == len(set(wanted) - known)
        recent.append(set(wanted))


def test_a_cache_forgets() -> None:
    cache: Any = BlobCache(2)
    for i in range(100):
        cache.split([bytes([i]) * LARGE])
    assert len(cache._tasks) == 2
