"""The hub by itself: what is said to a node, and when."""

import asyncio
import queue
from typing import Any

from umbel.server.link.enrolment import EnrolledNode
from umbel.server.link.hub import Hub, Instruction, Reply, Session
from umbel.transport.link_pb2 import Begin, Frame, Hello

NODE = EnrolledNode(7, "n1", created=0.0, revoked=None, enrolled=True, expires=None)


def instruction(message_id: str) -> Instruction:
    inbox: queue.SimpleQueue[Reply] = queue.SimpleQueue()
    return Instruction(message_id, 7, Begin(id=message_id), [], None, inbox)


def said(session: Session) -> list[str]:
    """What has been put into the line to the node since the last look."""
    words = []
    while not session.outgoing.empty():
        item = session.outgoing.get_nowait()
        done = isinstance(item, Frame)
        words.append(f"done {item.done.id}" if done else f"begin {item.message_id}")
    return words


def test_the_next_instruction_says_that_a_reply_has_arrived_and_a_tick_does_otherwise() -> None:
    async def talk() -> list[Any]:
        hub = Hub()
        hub.loop = asyncio.get_running_loop()
        session = Session(NODE, Hello())
        hub.join(session)
        heard = []
        for message_id in ("a", "b"):
            asked = instruction(message_id)
            hub.submit([asked])
            await asyncio.sleep(0)
            heard.append(said(session))
            hub.answered(session, asked, Reply(asked))
        heard.append(said(session))
        for _ in range(2):
            hub.tick(None)
            heard.append(said(session))
        return heard

    assert asyncio.run(talk()) == [["begin a"], ["begin b"], [], ["done b"], []]
