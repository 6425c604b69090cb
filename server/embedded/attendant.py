"""A thread that works for messages that were pushed, so that nobody has to wait for them."""

import math
import threading
from collections.abc import Callable, Collection


class Attendant:
    """Works while messages that were pushed have no reply yet.

    It begins with the first such message. Without workers the nodes run in it, beside the server
    app.

    Args:
        news: the engine's condition, whose lock guards this too.
        is_open: whether a message has no reply yet.
        work: takes part in the engine's work until something has happened or the time is over.
    """

    def __init__(
        self,
        news: threading.Condition,
        is_open: Callable[[str], bool],
        work: Callable[[Collection[str], float], None],
    ) -> None:
        self._news, self._is_open, self._work = news, is_open, work
        self._waiting: set[str] = set()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._fault: BaseException | None = None

    def take(self, message_ids: set[str]) -> None:
        """See to these messages."""
        with self._news:
            self._waiting |= set(filter(self._is_open, message_ids))
            if self._thread is None and self._waiting:
                self._thread = threading.Thread(target=self._attend, daemon=True)
                self._thread.start()
            self._news.notify_all()

    def let_go(self, message_id: str) -> None:
        """This message needs nobody any longer."""
        self._waiting.discard(message_id)

    def look(self) -> None:
        """Raise what went wrong meanwhile, in the thread of the app."""
        if self._fault is not None and threading.current_thread() is not self._thread:
            fault, self._fault = self._fault, None
            raise fault

    def close(self, wake: Callable[[], None], *, join: bool) -> None:
        """End.

        Args:
            wake: ends the wait for the pool.
            join: wait for the thread; not where a node may run in it, which cannot be stopped.
        """
        with self._news:
            self._closed = True
            self._waiting.clear()
            self._news.notify_all()
        if self._thread is None:
            return
        wake()
        if join:
            self._thread.join()

    def _attend(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
            try:
                self._work((), math.inf)
            except BaseException as fault:
                with self._news:
                    self._fault = fault
                    self._waiting.clear()
                    self._news.notify_all()
