"""What nodes have signed of their own budgets, kept beside the run.

    statements.jsonl   one line a node and unit, the latest: who sent it, the statement as the node
                       wrote it, its signature and key; `null` where a node replied without any

The coordinator cannot write these for nodes that have keys: it only keeps them, sets them beside
its own ledger, and puts what they come to into the certificate.
"""

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message

from umbel.core.errors import CheckError
from umbel.server.output.rundir import RunDirectory
from umbel.server.output.strict import loads_strictly
from umbel.strategies.statement import Signed, StatementError, read, verify

STATEMENTS = "statements.jsonl"
_WEAKEST = ("add-or-remove-one", "zero-out-one", "replace-one")


class Statements:
    """The latest statement of each node of a run.

    Args:
        run: where they are kept; those of an earlier start are there already.
        names: of the nodes, by their ids.
    """

    def __init__(self, run: RunDirectory, names: Mapping[int, str]) -> None:
        self._run, self._names = run, names
        self._lines: dict[tuple[str, str], dict[str, Any]] = {}
        self._silent: set[str] = set()
        self._changed = False
        for line in kept(run):
            if line["statement"] is None:
                self._silent.add(line["node"])
            else:
                unit = signed_of(line).statement().unit
                self._lines[line["node"], unit] = line

    def hear(self, reply: Message) -> None:
        """Keep what a reply says of its node's budget. What is no statement counts as none."""
        if reply.has_error():
            return
        node = self._names.get(reply.metadata.src_node_id, str(reply.metadata.src_node_id))
        try:
            found = read(reply.content)
        except StatementError:
            found = []
        if not found:
            self._silent.add(node)
        for signed in found:
            if signed.is_signed and not verify(signed):
                self._silent.add(node)
                continue
            self._lines[node, signed.statement().unit] = line_of(node, signed)
            self._changed = True

    def write(self) -> None:
        """Put what has changed on disk; nothing where no node has ever made a statement."""
        if not self._changed:
            return
        stated = {node for node, _ in self._lines}
        silent = [{"node": node, "statement": None} for node in sorted(self._silent - stated)]
        lines = [self._lines[key] for key in sorted(self._lines)]
        self._run.write_lines(STATEMENTS, [*lines, *silent])
        self._changed = False

    @property
    def about_records(self) -> bool:
        """Whether a node has stated what its records have spent."""
        return any(unit == "record" for _, unit in self._lines)


def line_of(node: str, signed: Signed) -> dict[str, Any]:
    """A line of the file."""
    return {
        "node": node,
        "statement": signed.body.decode(),
        "signature": base64.b64encode(signed.signature).decode(),
        "key": base64.b64encode(signed.key).decode(),
    }


def signed_of(line: Mapping[str, Any]) -> Signed:
    """The statement of a line.

    Raises:
        CheckError: it is none.
    """
    try:
        signature, key = (
            base64.b64decode(line[name], validate=True) for name in ("signature", "key")
        )
        return Signed(str(line["statement"]).encode(), signature, key)
    except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise CheckError(f"{STATEMENTS} holds a line that is no statement ({error})") from error


def kept(run: RunDirectory) -> list[dict[str, Any]]:
    """The lines of a run's file; empty where it has none.

    Raises:
        CheckError: a line is no JSON object with a node and a statement.
    """
    path = run.path / STATEMENTS
    if not path.is_file():
        return []
    found = []
    try:
        for text in path.read_text(encoding="utf-8").splitlines():
            line = loads_strictly(text)
            if not isinstance(line, dict) or not isinstance(line.get("node"), str):
                raise ValueError("a line without a node")
            line.setdefault("statement", None)
            found.append(line)
    except (OSError, ValueError) as error:
        raise CheckError(f"{path} cannot be read ({error})") from error
    return found


def summary_of(run: RunDirectory) -> dict[str, Any]:
    """What the statements of a run come to, for its certificate.

    Returns:
        `nodes`, one row a statement; `without`, the nodes that replied and made none (none about
        records, where others made such); and of the statements about records the largest
        `epsilon` (infinite where a node made none), the largest `delta` (None without any) and
        the weakest `relation`.

    Raises:
        CheckError: the file is damaged.
    """
    lines = kept(run)
    try:
        rows = [row_of(line) for line in lines if line["statement"] is not None]
    except StatementError as error:
        raise CheckError(f"{STATEMENTS}: {error}") from error
    records = [row for row in rows if row["unit"] == "record"]
    protected = {row["node"] for row in records or rows}
    without = sorted({line["node"] for line in lines} - protected)
    return {
        "nodes": rows,
        "without": without,
        "epsilon": math.inf if without else _largest(row["epsilon"] for row in records),
        "delta": max((row["delta"] for row in records), default=None),
        "relation": max(
            (row["relation"] for row in records), key=_WEAKEST.index, default=_WEAKEST[0]
        ),
    }


def row_of(line: Mapping[str, Any]) -> dict[str, Any]:
    """One node's statement as a certificate lists it.

    Raises:
        StatementError: it is none.
        CheckError: the line is damaged.
    """
    signed = signed_of(line)
    said = signed.statement()
    return {
        "node": line["node"],
        "unit": said.unit,
        "mechanism": said.mechanism,
        "epsilon": math.inf if said.epsilon is None else said.epsilon,
        "run_epsilon": math.inf if said.run_epsilon is None else said.run_epsilon,
        "delta": said.delta,
        "relation": said.relation,
        "noise_multiplier": said.noise_multiplier,
        "sampling_rate": said.sampling_rate,
        "steps": said.steps,
        "norm": said.norm,
        "participations": said.participations,
        "round": said.round,
        "signed": signed.is_signed,
        "key": line["key"],
        "sha256": signed.digest,
    }


def _largest(values: Iterable[float]) -> float:
    return max(values, default=math.inf)
