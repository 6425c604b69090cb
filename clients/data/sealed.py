"""A lock on held-out examples: while it is closed, no app can look at them.

A search for better options that could see the examples which judge its result would judge itself.
So `umbel tune` takes its validation half first, and closes the lock for as long as it searches.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from umbel.core.errors import ConfigError

_closed: list[str] = []
"""Who closed it, innermost last; of this process, whichever thread asks."""


@contextmanager
def sealed(why: str) -> Iterator[None]:
    """Refuse held-out examples to everybody while the block runs.

    Args:
        why: who asks for that, for the sentence.
    """
    _closed.append(why)
    try:
        yield
    finally:
        _closed.remove(why)


def check_open() -> None:
    """Raises:
    ConfigError: the held-out examples are locked.
    """
    if _closed:
        raise ConfigError(
            f"the held-out examples are locked while {_closed[-1]}, so that they can judge its "
            "result; use a node's own examples, or Federation(test=...)"
        )
