"""An instruction on its way through a node: arriving, at work, answered."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from umbel.clients.process.app_process import Answer
from umbel.transport.frames import FrameError
from umbel.transport.link_pb2 import Begin


@dataclass
class Task:
    """An instruction and what came of it.

    Attributes:
        begin: its head.
        due: when the app is stopped, on the monotonic clock; None is never.
        file: which shared file its content lies in, if it is large.
        answer: None while the app is at work.
        wanted: somebody waits for the answer.
        began: when it came, on the monotonic clock.
    """

    begin: Begin
    due: float | None
    file: int = 0
    answer: Answer | None = None
    wanted: bool = True
    began: float = field(default_factory=time.monotonic)


@dataclass
class Receiving:
    """An instruction whose content is on its way into the shared file."""

    begin: Begin
    file: int
    files: Sequence[int]
    at: int = 0

    def add(self, chunk: memoryview) -> bool:
        """Write a chunk; whether the content is complete."""
        if self.at + len(chunk) > self.begin.size:
            raise FrameError("the coordinator sent more than it announced")
        while chunk:
            written = os.pwrite(self.files[self.file], chunk, self.at)
            self.at, chunk = self.at + written, chunk[written:]
        return self.at == self.begin.size


def key(begin: Begin) -> tuple[str, int]:
    """What makes two instructions the same: redelivery must not train twice."""
    return begin.id, begin.digest
