"""Frames: chunks come back as they were cut, whatever the pace, and hostile bytes do no harm."""

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.transport.frames import (
    LARGEST_CHUNK,
    SMALLEST_CHUNK,
    Assembly,
    FrameError,
    Pace,
    Pieces,
    begin,
    check_size,
    cut,
    from_wire,
    to_wire,
)
from umbel.transport.link_pb2 import Begin, Frame, Hello


@settings(deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=8), st.integers(1, 400))
def test_a_content_is_the_same_after_cutting_and_assembling(parts: list[bytes], size: int) -> None:
    whole = b"".join(parts)
    assembly = Assembly(len(whole))
    wires = [to_wire(pieces) for pieces in cut(parts, Pace(chunk=size))]
    complete = [
        assembly.add(view) for view in map(from_wire, wires) if isinstance(view, memoryview)
    ]
    assert b"".join(assembly.parts) == whole
    assert complete == [False] * (len(complete) - 1) + [True] * bool(complete)
    assert all(len(view) == size for view in assembly.parts[:-1])


@given(st.binary(max_size=400))
def test_a_chunk_by_hand_is_what_protobuf_writes(data: bytes) -> None:
    by_hand = to_wire(Pieces([memoryview(data)]))
    assert by_hand == Frame(chunk=data).SerializeToString()
    got = from_wire(by_hand)
    assert isinstance(got, memoryview) and bytes(got) == data


@settings(max_examples=500)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_frame_or_a_frame_error(data: bytes) -> None:
    for form in (data, b"\x0a" + data):
        with contextlib.suppress(FrameError):
            from_wire(form)


def test_frames_come_back() -> None:
    frame = Frame(hello=Hello(protocol=1, version="1.0", held=["a", "b"]))
    assert from_wire(to_wire(frame)) == frame


def test_more_than_announced_is_refused() -> None:
    assembly = Assembly(3)
    with pytest.raises(FrameError, match="announced with 3 bytes"):
        assembly.add(memoryview(b"1234"))
    with pytest.raises(FrameError):
        Assembly(3).add(memoryview(b""))  # an endless row of empty chunks would be free of charge
    with pytest.raises(FrameError, match="4611686018427387904"):
        check_size(1 << 62, 1000)


def test_small_contents_travel_inside() -> None:
    small = begin(Frame(begin=Begin(id="x")), [b"ab", b"c"])
    assert (small.begin.size, small.begin.inline) == (3, b"abc")
    large = begin(Frame(begin=Begin(id="x")), [bytes(100_000)])
    assert (large.begin.size, large.begin.inline) == (100_000, b"")


def test_chunks_grow_on_a_fast_line_and_shrink_on_a_slow_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [0.0]
    monkeypatch.setattr("umbel.transport.frames.monotonic", lambda: clock[0])
    pace = Pace()
    for _ in range(9):
        pace.begin()
        pace.end()
    assert pace.chunk == LARGEST_CHUNK
    for _ in range(9):
        pace.begin()
        clock[0] += 10
        pace.end()
    assert pace.chunk == SMALLEST_CHUNK
