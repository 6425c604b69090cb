"""Runs a `ClientApp` for virtual nodes, in this process or in a worker."""

import contextlib
import functools
import io
import pickle
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any, Protocol, runtime_checkable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from threadpoolctl import ThreadpoolController

from umbel.core import streams
from umbel.core.errors import described
from umbel.core.flower import RAISED, Envelope
from umbel.server.embedded.packing import unpack


@dataclass(frozen=True)
class Task:
    """One message to one virtual node.

    Attributes:
        envelope: the message without its content.
        content: of the message, packed once for all nodes that get the same; on its way to a
            worker process, the number by which that knows it.
        state: the node's pickled state; None where it has none.
        seed: of the random generators that the app draws from while it answers. It depends on the
            run, the node and its message alone, so any process draws the same numbers for it.
    """

    envelope: Envelope
    content: Any
    state: bytes | None
    seed: int = 0


@dataclass(frozen=True)
class Done:
    """What came of a task.

    Attributes:
        reply: the node's message, or an error in its place.
        state: the node's pickled state; None where it has none.
        failure: the traceback of an exception in the app, for the log.
    """

    reply: Message
    state: bytes | None
    failure: str = ""


@runtime_checkable
class TrainsMany(Protocol):
    """An app that can answer several training messages as one computation."""

    def train_many(
        self, messages: Sequence[Message], contexts: Sequence[Context]
    ) -> list[Message] | None:
        """The replies, in order; None where it would not."""


@dataclass(frozen=True)
class Executor:
    """A client app and what every virtual node of a run shares.

    Attributes:
        app: the app; if it has `train_many`, groups of training messages go through that.
        run_config: the run's options.
        nodes: how many virtual nodes there are.
        threads: of a node's tensor operations; fixed, so that results do not depend on where a
            node runs.
    """

    app: ClientApp
    run_config: Mapping[str, Any]
    nodes: int
    threads: int = 1

    def run(self, tasks: Sequence[Task]) -> list[Done]:
        """Run tasks in order; exceptions of the app become error replies."""
        return self.together(tasks) or self.one_by_one(tasks)

    def one_by_one(self, tasks: Sequence[Task]) -> list[Done]:
        """Run tasks in order, each by itself."""
        with self._threads():
            return [self._one(task) for task in tasks]

    def together(self, tasks: Sequence[Task]) -> list[Done] | None:
        """Run tasks as one; None where the app cannot, or rather would not, do that."""
        app = self.app
        if len(tasks) < 2 or not isinstance(app, TrainsMany):  # the second asks 50 µs
            return None
        with self._threads():
            contexts = [self._context(task) for task in tasks]
            streams.seed_all(tasks[0].seed)
            try:
                replies = app.train_many([self._message(task) for task in tasks], contexts)
            except (Exception, SystemExit):
                return None  # one bad node must not fail its group: each will stand alone
            if replies is None:
                return None
            return [
                Done(reply, self._saved(context, task))
                for reply, context, task in zip(replies, contexts, tasks, strict=True)
            ]

    def _one(self, task: Task) -> Done:
        context = self._context(task)
        streams.seed_all(task.seed)
        try:
            reply = self.app(self._message(task), context)
            if not isinstance(reply, Message):
                raise TypeError(f"the app returned a {type(reply).__name__} in place of a Message")
        except (Exception, SystemExit) as error:  # an app that calls exit() ends no other node
            failure = "".join(traceback.format_exception(error))[:LONGEST_TRACEBACK]
            return Done(task.envelope.error(RAISED, described(error)), task.state, failure)
        return Done(reply, self._saved(context, task))

    def _message(self, task: Task) -> Message:
        return task.envelope.message(unpack(task.content))

    def _context(self, task: Task) -> Context:
        node_id = task.envelope.node_id
        return Context(
            run_id=task.envelope.run_id,
            node_id=node_id,
            node_config={"partition-id": node_id - FIRST_NODE, "num-partitions": self.nodes},
            state=RecordDict() if task.state is None else pickle.loads(task.state),
            run_config=dict(self.run_config),
        )

    def _saved(self, context: Context, task: Task) -> bytes | None:
        if not context.state and task.state is None:
            return None
        return pickle.dumps(context.state, protocol=5)

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        """One number of threads wherever a node runs: results must not depend on where.

        In a worker it is so already, and nothing is set.
        """
        torch = sys.modules.get("torch")
        before = [(library, library.get_num_threads()) for library in self._libraries]
        changed = [(library, count) for library, count in before if count != self.threads]
        for library, _ in changed:
            library.set_num_threads(self.threads)
        operations = self.threads if torch is None else torch.get_num_threads()
        if torch is not None and operations != self.threads:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            for library, count in changed:
                library.set_num_threads(count)
            if torch is not None:
                torch.set_num_threads(operations)

    @functools.cached_property
    def _libraries(self) -> list[Any]:
        """BLAS and OpenMP as the app has loaded them; looking for them takes a millisecond."""
        return list(ThreadpoolController().lib_controllers)


LONGEST_TRACEBACK = 20_000
"""Characters of a traceback that the log keeps."""

FIRST_NODE = 1001
"""Id of the virtual node that holds partition 0; below are Flower's reserved ids."""


class _Diverted(io.TextIOBase):
    """Standard output while nodes run: what this thread prints goes elsewhere."""

    def __init__(self, elsewhere: Any, before: Any) -> None:
        self._elsewhere, self._before = elsewhere, before
        self._thread = threading.get_ident()

    def write(self, text: str) -> int:
        written: int = self._here().write(text)
        return written

    def flush(self) -> None:
        self._here().flush()

    def fileno(self) -> int:
        number: int = self._before.fileno()
        return number

    def isatty(self) -> bool:
        return False

    def _here(self) -> Any:
        """The server app may print meanwhile, where nodes run in a thread beside it."""
        return self._elsewhere if threading.get_ident() == self._thread else self._before


def output_to(log: IO[str] | None) -> contextlib.AbstractContextManager[object]:
    """Send what an app prints to the run's log, so that it does not tear the progress bar."""
    if log is None:
        return contextlib.nullcontext()
    return contextlib.redirect_stdout(_Diverted(log, sys.stdout))
