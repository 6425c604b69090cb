"""A node's part in a secure sum after its first message, answered beside the connection.

    app -> connection   behind its reply to the request to train: the session that it has begun
    connection          answers share, mask, agree and unmask; the app is not woken for them;
                        writes down that the round is spent before the masked update leaves

So an app that crashes or hangs cannot lose or repeat a session whose update it has given, a
server that asks for an earlier step again finds nothing, and a trip does not wait until a second
process has its memory in the processor's caches again.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from umbel.clients.ledger.database import settle
from umbel.clients.ledger.names import LEDGER, STATE
from umbel.clients.process.spent import SpentRounds
from umbel.core.errors import RunError
from umbel.privacy.masking import keys
from umbel.strategies.secure.identity import TICKETS, enrolled, refuse_spent
from umbel.strategies.secure.message import REFUSED, Plain, blob, number
from umbel.strategies.secure.node import EXTERNAL_SESSION, IDENTITY
from umbel.strategies.secure.policy import RefusalError
from umbel.strategies.secure.protocol import Party, gives, respond
from umbel.strategies.secure.wire import SECURE, stage_of
from umbel.transport.codec import Buffer, decode_values, encode_values

log = logging.getLogger("umbel.node")

_LONG = 1 << 23
"""More integers of masks are made in a thread: the connection has other things to do meanwhile."""


class SecureSessions:
    """Holds one session, in memory only.

    Args:
        node_config: of the node; without an identity in it there are no sessions.
        spent: the rounds that this node has given its masked updates of.
    """

    def __init__(self, node_config: Mapping[str, Any], spent: SpentRounds | None = None) -> None:
        self._config, self._spent = node_config, spent or SpentRounds()
        self._run_id = 0
        self._session: Plain = {}
        self._me: Party | None = None
        self._tickets: deque[bytes] = deque(maxlen=TICKETS)

    @property
    def wanted(self) -> bool:
        """Whether the app is to hand its sessions over."""
        return bool(self._config.get(IDENTITY))

    def spent(self, run_id: int) -> int:
        """The last round of a run that this node has given its masked update of."""
        return self._spent.last(run_id)

    def forget(self) -> None:
        """Whatever was left of a session is gone."""
        self._session = {}

    def take_over(self, run_id: int, node_id: int, session: Buffer) -> list[Buffer] | None:
        """Keep a session that the app has begun; its identity stays what it is now.

        Returns:
            None; or, if this node was part of the session before, what it says in place of the
            app's reply.

        Raises:
            ConfigError: the node's policy or identity file cannot be used.
        """
        taken = decode_values(session, EXTERNAL_SESSION)
        ticket = blob(taken, "ticket", keys.DIGEST_BYTES)
        try:
            if number(taken, "run") != run_id:
                raise RefusalError("round", "the session is of another run than the message")
            refuse_spent(run_id, number(taken, "round"), self._spent.last(run_id))
            if ticket in self._tickets:
                raise RefusalError("replay", "this node has been part of this session before")
        except RefusalError as refusal:
            return encode_values(SECURE, {REFUSED: str(refusal)})
        self._tickets.append(ticket)
        self._me = enrolled(node_id, self._config)
        self._run_id, self._session = run_id, taken
        return None

    def stage(self, run_id: int, message_type: str) -> str | None:
        """The stage of the session that is held which an instruction asks for."""
        held = bool(self._session) and run_id == self._run_id
        return stage_of(message_type) if held else None

    async def answer(self, stage: str, content: Buffer) -> list[Buffer]:
        """The node's reply at a stage, while there is a session.

        Raises:
            CodecError: the instruction cannot be read.
        """
        assert self._me is not None
        message = decode_values(content, SECURE)
        session, self._session = self._session, {}
        work = partial(respond, self._me, stage, session, message)
        kept, reply = await asyncio.to_thread(work) if _is_long(stage, session) else work()
        if gives(stage, reply):
            try:
                await asyncio.to_thread(self._charge, session)
                self._spent.spend(self._run_id, number(session, "round"))
            except RunError as problem:
                kept, reply = {}, {REFUSED: f"budget: {problem}"}
            except OSError as problem:
                log.error("no update is sent, for it cannot be written down: %s", problem)
                kept, reply = {}, {REFUSED: "round: the node cannot write down that it is spent"}
        self._session = kept
        return encode_values(SECURE, reply)

    def _charge(self, session: Plain) -> None:
        """The masked vector is about to leave: what it takes is charged to the node's ledger."""
        folder = self._config.get(STATE)
        if folder and (Path(str(folder)) / LEDGER).exists():
            settle(Path(str(folder)), blob(session, "ticket", keys.DIGEST_BYTES))


def _is_long(stage: str, session: Plain) -> bool:
    if stage != "mask" or session.get("stage") != "mask":
        return False
    return number(session, "size") * len(blob(session, "openers")) > _LONG * keys.DIGEST_BYTES
