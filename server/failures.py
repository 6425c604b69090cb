"""Nodes that failed: once each in the run's lines, once for each reason to a person."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from umbel.server.output.progress import Progress
from umbel.strategies.aggregator import Judged, Limited, Rejected

REASONS_TOLD = 5
"""Different reasons that a person is told during a run; the run's log has all of them."""


@dataclass
class Failures:
    """What the nodes of a run failed of.

    Attributes:
        names: of nodes, by id.
        progress: where a person watches.
    """

    names: dict[int, str]
    progress: Progress
    _told: set[str] = field(default_factory=set)
    _limited: set[int] = field(default_factory=set)

    def of(self, rejected: Sequence[Rejected]) -> list[dict[str, str]]:
        """Each node once, with the first of its reasons."""
        reasons: dict[str, str] = {}
        for item in rejected:
            reasons.setdefault(self.names.get(item.node_id, str(item.node_id)), item.reason)
        return [{"node": node, "reason": reason} for node, reason in reasons.items()]

    def first(self, rejected: Sequence[Rejected]) -> str:
        """`; node 3 said: ...`, or nothing; a person has then been told."""
        if not rejected:
            return ""
        failure = self.of(rejected)[0]
        self._told.add(failure["reason"])
        return f"; node {failure['node']} said: {failure['reason']}"

    def tell(self, number: int, failed: Sequence[Mapping[str, str]]) -> None:
        """Say why nodes of round `number` failed, where that was not said before."""
        for failure in failed:
            node, reason = failure["node"], failure["reason"]
            if reason not in self._told and len(self._told) < REASONS_TOLD:
                self._told.add(reason)
                self.progress.note(f"round {number}: node {node} failed: {reason}")

    def judged(self, judged: Sequence[Judged]) -> dict[str, list[dict[str, Any]]]:
        """Nodes whose updates the rule has weighed down or left out, for the run's line."""
        rows = [
            {
                "node": self.names.get(one.node_id, str(one.node_id)),
                "influence": one.influence,
                "rule": one.why,
            }
            for one in judged
        ]
        return {"judged": rows} if rows else {}

    def limited(self, number: int, limited: Sequence[Limited]) -> dict[str, list[dict[str, Any]]]:
        """Nodes that count for less than they said, for the run's line; nothing where none does.

        A person is told of each node once, and of `REASONS_TOLD` at most.
        """
        rows = []
        for one in limited:
            name = self.names.get(one.node_id, str(one.node_id))
            rows.append({"node": name, "said": one.said, "counted": one.counted})
            if one.node_id not in self._limited and len(self._limited) < REASONS_TOLD:
                self._limited.add(one.node_id)
                self.progress.note(
                    f"round {number}: node {name} says that it has {one.said:,.0f} examples and "
                    f"counts for {one.counted:,.0f}: {one.why}"
                )
        return {"limited": rows} if rows else {}
