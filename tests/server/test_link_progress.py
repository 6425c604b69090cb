"""Progress, not presence: nodes that are there and get nowhere, and replies that take all room."""

import asyncio
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict

from tests.server.conftest import eventually
from umbel.server.link import hub as hub_module
from umbel.server.link.advance import Advance
from umbel.server.link.enrolment import EnrolledNode
from umbel.server.link.hub import Hub, Instruction, Reply, Session
from umbel.server.link.room import GRANT_S, MARGIN, largest_reply
from umbel.transport.link_pb2 import Beat, Begin, Frame, Hello, Offer

CONTENT = RecordDict({"a": ArrayRecord({"x": Array(np.arange(10, dtype=np.float32))})})


class Hall:
    """A hub without a network: its nodes are sessions, its clock is the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.now = 1000.0
        for module in (hub_module.time, time):
            monkeypatch.setattr(module, "monotonic", lambda: self.now)
        self.hub = Hub(**options)
        self.inbox: queue.SimpleQueue[Reply] = queue.SimpleQueue()

    def session(self, number: int, *held: str) -> Session:
        node = EnrolledNode(number, f"n{number}", 0.0, revoked=None, enrolled=True, expires=None)
        session = Session(node, Hello(held=held))
        self.hub.join(session)
        return session

    def ask(self, number: int, message_id: str, size: int = 10**6, largest: int = 0) -> Instruction:
        begin = Begin(id=message_id, size=size, largest=largest, message_type="train")
        asked = Instruction(message_id, number, begin, [], None, self.inbox)
        self.hub._submit([asked])
        return asked

    def wait(self, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
        for _ in range(int(seconds)):
            self.now += 1
            meanwhile()
            self.hub.tick(None)

    def errors(self) -> list[str]:
        found = []
        while not self.inbox.empty():
            error = self.inbox.get().error
            found.append("" if error is None else error[1])
        return found


@pytest.fixture
def hall(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Hall]]:
    """Opens halls, inside of an event loop that never runs."""
    loop = asyncio.new_event_loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    yield lambda **options: Hall(monkeypatch, **options)
    loop.close()


def beat(hall: Hall, session: Session, message_id: str, received: int, *, working: bool) -> Any:
    def say() -> None:
        session.heard = hall.now
        hall.hub.beat(session, message_id, received, working=working)

    return say


def test_a_node_that_only_sends_heartbeats_is_passed_over_after_lost_after(hall: Any) -> None:
    room = hall(lost_after=20.0)
    session = room.session(1)
    room.ask(1, "a")
    room.wait(20, beat(room, session, "", 0, working=False))
    assert room.errors() == []
    room.wait(2, beat(room, session, "", 0, working=False))
    [error] = room.errors()
    assert "node n1 got nowhere with its instruction for 20 s" in error and "sent once" in error
    assert not session.ended.done() and [line.node.name for line in room.hub.members()] == ["n1"]
    room.ask(1, "b")  # the next round waits for it less
    room.wait(17, beat(room, session, "", 0, working=False))
    assert len(room.errors()) == 1


def test_a_node_that_receives_slowly_and_trains_for_long_is_waited_for(hall: Any) -> None:
    room = hall(lost_after=20.0)
    session = room.session(1)
    asked = room.ask(1, "a")
    for received in range(0, 10**6, 10**5):
        room.wait(15, beat(room, session, "a", received, working=False))
    room.wait(3600, beat(room, session, "a", 10**6, working=True))
    assert room.errors() == []
    room.hub.offer(session, asked, 10**6)
    room.hub.answered(session, asked, Reply(asked))
    assert room.errors() == [""]


def test_a_path_that_swallows_large_packets_does_not_restart_the_clock(hall: Any) -> None:
    """The node comes back every 11 s, and is each time sent what never arrives."""
    room = hall(lost_after=120.0)
    room.session(1)
    asked = room.ask(1, "a")
    said = []
    for _ in range(12):
        room.wait(11)
        line = room.hub.lines[1]
        said.append(hub_module.unanswered(line, []))
        if asked.over:
            break
        room.hub.leave(line.session)
        room.session(1)
    [error] = room.errors()
    assert "got nowhere" in error and "0 of 1,000,000 bytes" in error
    assert said[:2] == ["", ""] and "to node n1 is not answered: it was sent 3 times" in said[2]
    assert 120 < room.now - 1000 < 135


def test_a_node_whose_process_dies_each_time_is_given_up(hall: Any) -> None:
    room = hall(lost_after=30.0)
    room.session(1)
    room.ask(1, "a")
    for _ in range(12):
        session = room.hub.lines[1].session
        room.wait(5, beat(room, session, "a", 10**6, working=True))
        room.hub.leave(session)
        room.session(1)
    [error] = room.errors()
    assert "the node has it" in error
    assert room.now - 1000 < 3 * 5 + 30 + 20


def test_a_silent_node_is_lost_after_lost_after_and_not_later(hall: Any) -> None:
    room = hall(lost_after=20.0)
    assert room.hub.beat_s == 5.0
    session = room.session(1)
    room.wait(20)
    assert not session.ended.done()
    room.wait(1)
    assert session.ended.done()
    room.hub.leave(session)
    room.wait(1)
    assert room.hub.members() == [] and room.now - 1000 <= 22


def test_two_that_hold_the_room_do_not_keep_three_from_being_heard(hall: Any) -> None:
    room = hall(lost_after=3600.0, room=10**6)
    sessions = [room.session(number) for number in range(5)]
    asked = [room.ask(number, f"m{number}") for number in range(5)]
    for session, instruction in zip(sessions, asked, strict=True):
        room.hub.offer(session, instruction, 500_000)
    answered: list[int] = []

    def honest() -> None:
        for number, session in enumerate(sessions):
            session.heard = room.now
            if number < 2 and session.ended.done():  # the liars come back and offer again
                room.hub.leave(session)
                sessions[number] = room.session(number, f"m{number}")
                room.hub.offer(sessions[number], asked[number], 500_000)
            if number >= 2 and session.granted is asked[number] and number not in answered:
                answered.append(number)
                room.hub.answered(session, asked[number], Reply(asked[number]))
                room.hub.room.free(asked[number])

    assert [session.granted is not None for session in sessions] == [True, True, *[False] * 3]
    room.wait(GRANT_S + 2, honest)
    assert answered == [2, 3, 4]
    room.wait(600, honest)
    assert not asked[0].over and not sessions[0].ended.done(), "nobody waits: nobody is hurried"


def test_a_slow_node_is_given_longer_each_time_it_was_cut_off(hall: Any) -> None:
    room = hall(lost_after=3600.0, room=10**6)
    slow, other = room.session(1), room.session(2)
    instruction, second = room.ask(1, "a"), room.ask(2, "b")
    lasted = []

    def trickle() -> None:
        session = room.hub.lines[1].session
        session.heard = session.last_chunk = other.heard = room.now

    for _ in range(3):
        room.hub.offer(slow, instruction, 900_000)
        assert slow.granted is instruction
        room.hub.offer(other, second, 900_000)
        began = room.now
        while not slow.ended.done():
            room.wait(1, trickle)
        lasted.append(room.now - began)
        room.hub.room.free(second)
        other.granted = None
        room.hub.leave(slow)
        slow = room.session(1, "a")
    assert lasted[0] <= 22 and lasted[1] > 3 * lasted[0] and lasted[2] > 3 * lasted[1]


def test_a_reply_may_be_as_large_as_what_was_asked_and_a_margin(lab: Any) -> None:
    liar, good = lab.node("liar"), lab.node("good", instance="2")
    ids = {line.node.name: line.node.node_id for line in lab.hub.members()}
    asked = lab.ask([Message(CONTENT, each, "train", group_id="1") for each in ids.values()])
    begins = {"liar": liar.read().begin, "good": good.read().begin}
    assert begins["liar"].largest == largest_reply(begins["liar"].size) < 2 * MARGIN
    liar.send(Frame(offer=Offer(id=begins["liar"].id, size=(8 << 30) - 1)))
    assert liar.read().done.id == begins["liar"].id
    begin = begins["good"]
    good.send(Frame(begin=Begin(id=begin.id, size=begin.size, inline=begin.inline)))
    replies = {reply.metadata.src_node_id: reply for reply in asked.result()}
    assert "is larger than the" in replies[ids["liar"]].error.reason
    assert "--largest-reply" in replies[ids["liar"]].error.reason
    assert replies[ids["good"]].content == CONTENT


def test_an_offer_while_it_is_granted_ends_the_connection(lab: Any) -> None:
    """Each offer kept room of its own, and none of it was ever given back."""
    node = lab.node("n1")
    [target] = lab.grid.get_node_ids()
    asked = lab.ask([Message(CONTENT, target, "train")])
    begin = node.read().begin
    for _ in range(2):
        node.send(Frame(offer=Offer(id=begin.id, size=10**6)))
    assert node.read().grant.id == begin.id
    assert "offered again" in node.status()[1]
    eventually(lambda: lab.hub.room.used == 0)
    again = lab.peer(lab.identity("n1"))
    again.connect(instance="new")
    begin = again.read().begin
    again.send(Frame(begin=Begin(id=begin.id, size=begin.size, inline=begin.inline)))
    assert asked.result()[0].content == CONTENT


def test_what_peers_say_of_themselves_is_cleaned(lab: Any) -> None:
    from umbel.server.link.service import _node_status

    node = lab.node("n1", version="1\x1b[2J\n2", device="gpu\r\x07\u202e")
    node.send(Frame(beat=Beat(phase="a\nb\x1b]0;x")))
    [line] = lab.hub.members()
    eventually(lambda: line.session.phase != "idle")
    shown = _node_status(line)
    assert all(str(value).isprintable() for value in shown.values()), shown
    assert shown["version"] == "1\\x1b[2J 2" and shown["phase"] == "a b\\x1b]0;x"
    [target] = lab.grid.get_node_ids()
    asked = lab.ask([Message(CONTENT, target, "train")])
    while (frame := node.read()).WhichOneof("kind") != "begin":
        pass
    said = "no\n2026 INFO all is well\x1b[1A" + 10_000 * "x"
    node.send(Frame(begin=Begin(id=frame.begin.id, failed=True, error_code=2, error_reason=said)))
    reason = asked.result()[0].error.reason
    assert reason.isprintable() and len(reason) <= 2000 and "\\x1b[1A" in reason


def test_steps_that_were_made_once_are_none_the_next_time() -> None:
    advance = Advance(since=0.0, sends=1)
    advance.heard(100, working=False, now=1.0)
    advance.heard(100, working=False, now=2.0)
    assert advance.since == 1.0
    advance.arrived(10, 3.0)
    advance.arrived(10, 4.0)
    assert advance.since == 3.0
