"""A node's own records between messages (`Context.state`), on disk, and able to go back.

A coordinator that was killed repeats the rounds after its last checkpoint. A node that kept
records of them (what it left out of its last update, running statistics) would then start from
the future; so what was there before each of the last steps is kept, and a step that is asked
for again begins from where it began the first time.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from flwr.app import RecordDict

from umbel.transport.codec import CodecError, decode, encode

_STEPS = 24
_LARGEST_HISTORY = 256 << 20
"""Bytes of earlier states that are kept, beyond the last one."""


class Memory:
    """The states of one node; one file, replaced whole.

    Args:
        folder: of the node's state; only the latest run is remembered.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._run_id: int | None = None
        self._steps: list[str] = []
        self._before: dict[str, bytes] = {}
        self._now = b""

    @contextlib.contextmanager
    def step(self, run_id: int, message_id: str) -> Iterator[RecordDict]:
        """The state for an instruction; kept as it is when the block ends without exception."""
        self._open(run_id)
        again = message_id in self._before
        if again:
            self._go_back(message_id)
        before = self._now
        state = decode(before) if before else RecordDict()
        yield state
        after = b"".join(encode(state)) if state else b""
        self._steps.append(message_id)
        self._before[message_id] = before
        self._now = after
        self._forget()
        if after != before or (again and after):
            self._save()  # a step that leaves all as it was needs no file: to repeat it is the same

    def _go_back(self, message_id: str) -> None:
        at = self._steps.index(message_id)
        self._now = self._before[message_id]
        for later in self._steps[at:]:
            del self._before[later]
        del self._steps[at:]

    def _forget(self) -> None:
        while len(self._steps) > _STEPS or (len(self._steps) > 1 and self._history_is_too_large()):
            del self._before[self._steps.pop(0)]

    def _history_is_too_large(self) -> bool:
        if len(self._steps) * max(map(len, self._before.values())) <= _LARGEST_HISTORY:
            return False
        different = {id(each): len(each) for each in self._before.values()}
        return sum(different.values()) > _LARGEST_HISTORY

    def _open(self, run_id: int) -> None:
        if run_id == self._run_id:
            return
        self._run_id, self._steps, self._before, self._now = run_id, [], {}, b""
        with contextlib.suppress(OSError, ValueError, KeyError, CodecError):
            data = self._file.read_bytes()
            size = int.from_bytes(data[:8], "little")
            index = json.loads(data[8 : 8 + size])
            if index["run_id"] != run_id:
                return
            at, states = 8 + size, []
            for length in index["lengths"]:
                states.append(data[at : at + length])
                at += length
            if at != len(data):
                return
            decode(states[-1]) if states[-1] else None
            self._steps, self._now = index["steps"], states[-1]
            self._before = dict(zip(self._steps, states, strict=False))

    def _save(self) -> None:
        states = [*(self._before[step] for step in self._steps), self._now]
        index = {"run_id": self._run_id, "steps": self._steps, "lengths": [*map(len, states)]}
        text = json.dumps(index).encode()
        part = self._file.with_suffix(f".{os.getpid()}")
        self._folder.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for state in states:
                file.write(state)
        part.replace(self._file)

    @property
    def _file(self) -> Path:
        return self._folder / "memory.bin"
