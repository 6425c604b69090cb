"""Grids under apps that keep their own rounds: they write down what they see.

A federation's own loop knows its rounds. Any other Flower app only sends messages, so rounds
are read off them: the number that Flower's strategies put into each message, or else one a
training trip.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

from flwr.app import ConfigRecord, Message, MetricRecord

from umbel.core.contents import records_of
from umbel.core.errors import RunError
from umbel.core.held import bytes_in
from umbel.core.text import plain
from umbel.server.kept_model import KeptModel
from umbel.server.output.rundir import RunDirectory
from umbel.strategies.collect import EXAMPLES, MeanMetrics


class NamesNodes(Protocol):
    """What the notes need of a grid."""

    def name_of(self, node_id: int) -> str:
        """A node's name, for people."""
        ...


class RoundRecorder:
    """Mixed into a grid: keeps a line for each round of whatever app runs on it.

    Attributes:
        on_note: told of a round after each of its trips, with its line so far.
        model: the latest that was seen.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lines: dict[int, dict[str, Any]] = {}
        self._sums: dict[tuple[int, str], MeanMetrics] = {}
        self._watch = threading.Lock()
        self.on_note: Callable[[Mapping[str, Any]], None] = lambda _: None
        self.model = KeptModel()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        messages = list(messages)
        began = time.perf_counter()
        grid: Any = super()
        replies: list[Message] = grid.send_and_receive(messages, timeout=timeout)
        with self._watch:
            number = self._note(messages, replies, time.perf_counter() - began)
            if number is not None:
                self.on_note(self._complete(number))
        return replies

    def finish(self, run: RunDirectory) -> dict[str, Any]:
        """Write the rounds and the model down; what the app's result says of them.

        It may be called when the app was stopped, too: what was seen until then is written.
        """
        metrics: dict[str, float] = {}
        for number in sorted(self._lines):
            line = self._complete(number)
            metrics = line["metrics"] or metrics
            run.append_round(line)
        return {
            "rounds": len(self._lines),
            "metrics": metrics,
            "stopped": "rounds",
            "model": self.model.save(run),
        }

    def check_trained(self) -> None:
        """Refuse to call a run done in which nothing was trained.

        Raises:
            RunError: nodes were asked to train, and not one of them ever did: an app that goes
                on after failures has nothing to show, whatever it says.
        """
        asked = [line for line in self._lines.values() if "train" in line["phases"]]
        failed = [each for line in asked for each in line["failed"]]
        if failed and not any(line["clients"] for line in asked):
            first = plain(f"node {failed[0]['node']}: {failed[0]['reason']}")
            raise RunError(
                f"nothing was trained: all {len(failed)} replies of {len(asked)} rounds are "
                f"errors; the first is of {first}"
            )

    def _complete(self, number: int) -> dict[str, Any]:
        """A round's line, as far as the round is."""
        train, evaluate = (self._sums.get((number, kind)) for kind in ("train", "evaluate"))
        line = self._lines[number]
        return {
            **line,
            "seconds": sum(line["phases"].values()),
            "train": train.result() if train else {},
            "metrics": evaluate.result() if evaluate else {},
        }

    def _note(self, messages: list[Message], replies: list[Message], seconds: float) -> int | None:
        """Take note of a trip; which round it was of."""
        kind = messages[0].metadata.message_type.partition(".")[0] if messages else ""
        if kind not in ("train", "evaluate"):
            return None
        number = self._round_of(messages[0], kind)
        if kind == "evaluate":
            self.model.saw_evaluation(messages[0], number)
        line = self._lines.setdefault(
            number,
            {
                "round": number,
                "phases": {},
                "clients": 0,
                "failed": [],
                "bytes_down": 0,
                "bytes_up": 0,
            },
        )
        line["phases"][kind] = line["phases"].get(kind, 0.0) + seconds
        line["bytes_down"] += sum(bytes_in(message) for message in messages)
        sums = self._sums.setdefault((number, kind), MeanMetrics())
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                line["failed"].append(
                    {"node": cast(NamesNodes, self).name_of(node), "reason": reply.error.reason}
                )
                continue
            line["clients"] += kind == "train"
            line["bytes_up"] += bytes_in(reply)
            values = {
                name: float(value)
                for record in records_of(reply.content, MetricRecord)
                for name, value in record.items()
                if isinstance(value, int | float)
            }
            sums.add(node, values, values.get(EXAMPLES, 1.0) or 1.0)
        return number

    def _round_of(self, message: Message, kind: str) -> int:
        for record in records_of(message.content, ConfigRecord):
            said = record.get("server-round")
            if isinstance(said, int):
                return said
        number = message.metadata.group_id.partition(".")[0]
        if number.isdigit():
            return int(number)
        return len(self._lines) + (kind == "train" or not self._lines)
