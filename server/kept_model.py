"""The model of an app that keeps its own rounds, as far as Umbel gets to see it.

Such an app has no place where an engine could ask for its model. Two things are there to be seen
without a change to it: what `Strategy.start` returns, and the arrays that are sent to the nodes
for evaluation, which are those of the round that has just been aggregated.
"""

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Result, Strategy

from umbel.core.contents import records_of
from umbel.server.output.rundir import RunDirectory

BY_STRATEGY = "what the strategy returned"

NO_MODEL = (
    "no model was saved: this app keeps its own rounds, none of its strategies returned arrays, "
    "and none were sent to nodes for evaluation; save them in the ServerApp"
)


class KeptModel:
    """The latest arrays that were seen, and where."""

    def __init__(self) -> None:
        self._arrays: Mapping[str, Any] = {}
        self._source = ""
        self._results: list[Result] = []

    def saw_evaluation(self, message: Message, number: int) -> None:
        """Nodes are asked to judge a model; one that a strategy returned is the later one."""
        records = [each for each in records_of(message.content, ArrayRecord) if each]
        if len(records) == 1:  # of several, nobody knows which is the model
            self._arrays, self._source = records[0], f"what was evaluated in round {number}"

    def saw_result(self, result: Result) -> None:
        """A strategy has come to its end."""
        self._results.append(result)  # a strategy's own `start` may have more to put into it

    def _latest(self) -> tuple[Mapping[str, Any], str]:
        for result in reversed(self._results):
            if result.arrays:
                return result.arrays, BY_STRATEGY
        return self._arrays, self._source

    def save(self, run: RunDirectory) -> str:
        """Write the model, if there is one; the sentence that says what became of it."""
        tensors, left = {}, []
        arrays, source = self._latest()
        for name, array in arrays.items():
            try:
                values = array.numpy()
            except (TypeError, ValueError):  # not one of NumPy's own
                left.append(name)
                continue
            if values.dtype.kind in "biuf" and values.dtype.itemsize <= 8:
                tensors[name] = np.ascontiguousarray(values)
            else:
                left.append(name)
        if not tensors:
            return NO_MODEL
        path = run.write_model(tensors, {"source": source})
        without = f", without {', '.join(sorted(left))}, which are no plain numbers" if left else ""
        return f"model: {path} ({source}{without})"


@contextmanager
def watching_strategies(kept: KeptModel) -> Iterator[None]:
    """Look at what the strategies of Flower that an app starts meanwhile return."""
    original = Strategy.start

    @functools.wraps(original)
    def start(self: Strategy, *args: Any, **more: Any) -> Result:
        result = original(self, *args, **more)
        kept.saw_result(result)
        return result

    Strategy.start = start  # type: ignore[method-assign]  # Flower has no hook for it
    try:
        yield
    finally:
        Strategy.start = original  # type: ignore[method-assign]  # Flower has no hook for it
