"""A seed for every message to a virtual node."""

from collections.abc import Mapping
from typing import Any

from umbel.core import streams
from umbel.core.flower import Envelope


class MessageSeeds:
    """Seeds of messages, from the run's, the node and which of its messages it is.

    Which thread of an app pushed first, and how many workers there are, makes no difference. A
    run that goes on counts anew in every round, so it needs to know nothing of earlier ones.

    Args:
        run_config: the run's options, whose `seed` all others are derived from.
    """

    def __init__(self, run_config: Mapping[str, Any]) -> None:
        seed = run_config.get("seed", 0)
        self._seed = seed if isinstance(seed, int) else 0
        self._asked: dict[tuple[int, str], tuple[int, int]] = {}

    def of(self, envelope: Envelope) -> int:
        """The seed of the next message."""
        about = (envelope.node_id, envelope.message_type)
        last, count = self._asked.get(about, (0, 0))
        group = envelope.group_id
        if group.isdecimal() and int(group) > last:
            last, count = int(group), 0
        self._asked[about] = last, count + 1
        return streams.derived_seed(self._seed, *about, last, count)
