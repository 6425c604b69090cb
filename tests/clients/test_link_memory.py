"""A node's memory: kept on disk, and able to go back to where a step began."""

import tempfile
from pathlib import Path

import pytest
from flwr.app import MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel.clients.process.memory import Memory


def count(memory: Memory, step: str, run: int = 1) -> int:
    """One step of an app that counts its steps."""
    with memory.step(run, step) as state:
        seen = int(state["n"]["n"]) + 1 if "n" in state else 1
        state["n"] = MetricRecord({"n": seen})
    return seen


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_repeated_steps_see_what_they_saw_the_first_time(data: st.DataObject) -> None:
    """A coordinator that repeats rounds, and nodes that are restarted, change no step's result."""
    with tempfile.TemporaryDirectory() as folder:
        memory, at = Memory(Path(folder)), 0
        for _ in range(data.draw(st.integers(1, 12))):
            at = max(0, at - data.draw(st.integers(0, min(at, 5))))  # back to a checkpoint
            if data.draw(st.booleans()):
                memory = Memory(Path(folder))  # the node's process was killed
            at += 1
            assert count(memory, f"1/{at}/train") == at


def test_a_step_that_fails_leaves_no_trace(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    count(memory, "a")
    with pytest.raises(ZeroDivisionError), memory.step(1, "b") as state:
        state["n"] = MetricRecord({"n": 99})
        raise ZeroDivisionError
    assert count(memory, "b") == 2


def test_runs_do_not_see_each_other(tmp_path: Path) -> None:
    memory = Memory(tmp_path)
    assert [count(memory, "a", run) for run in (1, 1, 2)] == [1, 1, 1]


def test_an_app_without_state_writes_nothing(tmp_path: Path) -> None:
    with Memory(tmp_path).step(1, "a") as state:
        assert state == RecordDict()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"\xff" * 50, b"\x05\0\0\0\0\0\0\0{}"])
def test_a_damaged_memory_is_an_empty_one(tmp_path: Path, damage: bytes) -> None:
    count(Memory(tmp_path), "a")
    (tmp_path / "memory.bin").write_bytes(damage)
    assert count(Memory(tmp_path), "b") == 1
