"""One connection of a node: a reader and a writer, until either ends.

What a peer sends is checked against what was asked of it: a large reply comes when it was
granted and not before, of the size that was offered; a chunk belongs to a content that was
announced; everything else ends the connection with a sentence.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from umbel.core.text import plain
from umbel.server.link.hub import Hub, Instruction, Reply, Session, frames_of
from umbel.transport.frames import OFFERED_ABOVE, Assembly, FrameError, check_size, cut
from umbel.transport.link_pb2 import Beat, Begin, Done, Frame

log = logging.getLogger("umbel.link")
_LONGEST_QUEUE = 1000


@dataclass
class Arriving:
    """A reply whose chunks are coming."""

    begin: Begin
    instruction: Instruction | None
    assembly: Assembly


@dataclass(frozen=True)
class Connection:
    """Moves frames between a session and a gRPC stream.

    Attributes:
        hub: where replies go.
        session: of the node.
        context: gRPC's.
        largest: bytes of the largest reply that is taken.
    """

    hub: Hub
    session: Session
    context: Any
    largest: int

    async def run(self) -> tuple[str, str]:
        """Until the connection is over; the status and the sentence that it ends with."""
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        try:
            watched: list[asyncio.Future[Any]] = [*tasks, self.session.ended]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            return self._why(tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _write(self) -> None:
        while True:
            item = await self.session.outgoing.get()
            if isinstance(item, Frame):
                await self._put(item)
            else:
                await self._instruct(item)
            del item  # until there is more to say, a model that has been sent must not take room

    async def _instruct(self, instruction: Instruction) -> None:
        await self._put(frames_of(instruction))
        self.hub.traffic.bytes_down += instruction.begin.size
        if instruction.begin.inline:
            return
        for chunk in cut(instruction.parts, self.session.pace):
            self.session.pace.begin()
            await self._put(chunk)
            self.session.pace.end()

    async def _put(self, frame: Any) -> None:
        self.session.sending_since = time.monotonic()
        await self.context.write(frame)
        self.session.sending_since = None

    async def _read(self) -> None:
        arriving: Arriving | None = None
        frame: Frame | memoryview | None = None
        while True:
            del frame  # while a node trains, the last chunk of its last reply must not take room
            frame = await next_frame(self.context)
            self.session.heard = time.monotonic()
            if isinstance(frame, memoryview):
                if arriving is None:
                    raise FrameError("a chunk came that belongs to nothing")
                if self._take(arriving, frame):
                    self._complete(arriving)
                    arriving = None
                continue
            if self.session.outgoing.qsize() > _LONGEST_QUEUE:
                raise FrameError("too many frames came that were not asked for")
            kind = frame.WhichOneof("kind")
            if arriving is not None and kind != "beat":
                raise FrameError(f"a {kind} came in the middle of a content")
            if kind == "beat":
                self._beat(frame.beat)
            elif kind == "offer":
                self._offer(frame.offer.id, frame.offer.size)
            elif kind == "begin":
                arriving = self._begin(frame.begin)
            else:
                raise FrameError(f"a node does not send a frame of kind {kind}")

    def _beat(self, beat: Beat) -> None:
        self.session.phase = plain(beat.phase, 40)
        self.hub.beat(self.session, beat.id, beat.received, working=beat.working)
        self.session.send(Frame(beat=Beat()))

    def _take(self, arriving: Arriving, chunk: memoryview) -> bool:
        """A chunk of a reply; whether the reply is complete."""
        self.hub.traffic.bytes_up += len(chunk)
        instruction = arriving.instruction
        if instruction is None or instruction.over:
            arriving.assembly.forget()
        complete = arriving.assembly.add(chunk)
        self.session.last_chunk = self.session.heard
        if instruction is not None:
            instruction.advance.arrived(arriving.assembly.received, self.session.heard)
        return complete

    def _offer(self, message_id: str, size: int) -> None:
        check_size(size, self.largest)
        instruction = self.hub.wanted(self.session, message_id)
        if instruction is None:
            self.session.send(Frame(done=Done(id=message_id)))
        elif self.session.granted is instruction:
            raise FrameError("a reply was offered again while it was waited for")
        else:
            self.hub.offer(self.session, instruction, size)

    def _begin(self, begin: Begin) -> Arriving | None:
        check_size(begin.size, self.largest)
        instruction = self.hub.wanted(self.session, begin.id)
        granted = self.session.granted is not None and self.session.granted is instruction
        if begin.size > OFFERED_ABOVE and instruction is not None and not granted:
            raise FrameError(f"a reply of {begin.size} bytes came without being asked for")
        if granted and instruction is not None and begin.size > instruction.room:
            raise FrameError("a reply is larger than it was offered")
        arriving = Arriving(begin, instruction, Assembly(begin.size, keep=instruction is not None))
        if begin.failed or len(begin.inline) == begin.size:
            arriving.assembly.parts.append(memoryview(begin.inline))
            self.hub.traffic.bytes_up += begin.size
            self._complete(arriving)
            return None
        if begin.inline:
            raise FrameError("the content inside of a begin is not what was announced")
        return arriving

    def _complete(self, arriving: Arriving) -> None:
        instruction, begin = arriving.instruction, arriving.begin
        # Asked again: while it was arriving, the wait for it may have ended.
        if instruction is None or self.hub.wanted(self.session, begin.id) is not instruction:
            self.session.granted = None
            self.session.send(Frame(done=Done(id=begin.id)))
            return
        error = (begin.error_code, plain(begin.error_reason)) if begin.failed else None
        parts: list[memoryview] = [] if begin.failed else arriving.assembly.parts
        self.hub.answered(self.session, instruction, Reply(instruction, parts, error))

    def _why(self, tasks: Sequence["asyncio.Task[None]"]) -> tuple[str, str]:
        """The status and the sentence that a connection ends with."""
        if self.session.ended.done():
            return self.session.ended.result()
        for task in tasks:
            problem = task.exception() if task.done() and not task.cancelled() else None
            if isinstance(problem, FrameError):
                log.warning("node %s: %s; it is cut off", self.session.node.name, problem)
                return "INVALID_ARGUMENT", str(problem)
            if problem is not None and not isinstance(
                problem, EOFError | grpc.RpcError | asyncio.CancelledError | grpc.aio.UsageError
            ):
                log.error("node %s: unexpected", self.session.node.name, exc_info=problem)
                return "INTERNAL", "the coordinator had a fault; its log says more"
        return "ABORTED", "the connection is over"


async def next_frame(context: Any) -> Any:
    """The next frame; EOFError when the peer has hung up."""
    frame = await context.read()
    if frame is grpc.aio.EOF:
        raise EOFError
    return frame
