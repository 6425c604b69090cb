"""Connections that have not yet proved who they are: bounded in number, by address, and in time.

A TCP connection costs its maker nothing and the coordinator a descriptor, of which a process
has so many; where strangers hold them all, the ledger cannot be opened and the run ends. gRPC
admits connections up to a number (`most_connections`), which leaves descriptors for everything
else; those among them that have not made a call within `HANDSHAKE_S`, or are more than
`most_strangers`, are shut from here, the oldest of the most crowded address first, so that nodes,
whose handshake takes milliseconds, find a place. Nodes that all come at once, after the coordinator
was started again, are strangers too until their handshakes are done: hence the room for many.

gRPC does not say which connections it has accepted; the process's own table of descriptors
does. A connection is shut by a copy of its descriptor, so gRPC, which owns it, sees an ordinary
end and closes it.
"""

import contextlib
import logging
import os
import resource
import socket
import stat
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from umbel.core.errors import ConfigError

log = logging.getLogger("umbel.link")

HANDSHAKE_S = 20.0
"""Seconds until a connection must have passed TLS and made a call."""
STRANGERS = 1024
"""Connections without a call that are left alone at once, where there are files for so many."""
RESERVE = 256
"""Descriptors for everything but connections: databases, files, threads' wake-ups."""
WANTED = 65_536
"""Descriptors that a coordinator asks for."""
_TABLE = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
_SAY_EVERY_S = 60.0


def raise_file_limit() -> int:
    """Raise this process's soft limit of open files as far as it may; the limit now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(hard, WANTED)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return WANTED if soft == resource.RLIM_INFINITY else soft


def most_connections() -> int:
    """How many connections fit below the limit of open files."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft == resource.RLIM_INFINITY:
        soft = WANTED
    return int(max(soft // 2, soft - RESERVE))


def most_strangers() -> int:
    """How many connections may be without a call: a quarter of the room, if that is fewer."""
    return min(STRANGERS, most_connections() // 4)


def check_room_for(nodes: int) -> None:
    """Raise ConfigError unless so many nodes can be connected at once."""
    most = most_connections()
    if nodes > most:
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise ConfigError(
            f"{nodes:,} nodes cannot be connected at once: this process may open {soft:,} files, "
            f"which is enough for {most:,} connections; raise the limit (ulimit -n "
            f"{nodes + 2 * RESERVE}, or LimitNOFILE={nodes + 2 * RESERVE} in the systemd unit)"
        )


@dataclass
class _Guest:
    """A connection at the door."""

    peer: tuple[str, int]
    since: float
    known: bool = False


@dataclass
class Doorkeeper:
    """Watches the connections of one listening port.

    Attributes:
        strangers: how many connections without a call are left alone.
        refused: how many were shut.
    """

    strangers: int = field(default_factory=most_strangers)
    refused: int = 0
    _guests: dict[int, _Guest] = field(default_factory=dict)
    _known: set[tuple[str, int]] = field(default_factory=set)
    _others: set[int] = field(default_factory=set)
    _said: float = -_SAY_EVERY_S

    def known(self, peer: str) -> None:
        """A call was made on the connection from `peer`, in gRPC's form (`ipv4:192.0.2.1:5`)."""
        host, _, port = peer.partition(":")[2].rpartition(":")
        host = host.replace("%5B", "").replace("%5D", "").strip("[]")
        if port.isdigit():
            self._known.add((_plain_host(host), int(port)))

    def look(self, port: int, now: float | None = None) -> None:
        """Shut connections to `port` that stay without a call for too long, or are too many."""
        now = time.monotonic() if now is None else now
        descriptors = self._take_stock(port, now)
        self._known &= {guest.peer for guest in self._guests.values()}
        waiting = {inode: guest for inode, guest in self._guests.items() if not guest.known}
        late = [i for i, guest in waiting.items() if now - guest.since > HANDSHAKE_S]
        for inode in [*late, *self._too_many(waiting, set(late))]:
            if _shut(descriptors[inode], self._guests[inode].peer):
                self.refused += 1
        if len(waiting) > self.strangers and now - self._said > _SAY_EVERY_S:
            self._said = now
            crowd = Counter(guest.peer[0] for guest in waiting.values()).most_common(1)[0]
            log.warning(
                "%d connections have not said who they are, %d of them from %s; all but %d are "
                "closed",
                len(waiting),
                crowd[1],
                crowd[0],
                self.strangers,
            )

    def _take_stock(self, port: int, now: float) -> dict[int, int]:
        """Bring the list of guests up to date; their descriptors by inode."""
        descriptors: dict[int, int] = {}
        others: set[int] = set()
        for entry in _TABLE.iterdir():
            with contextlib.suppress(OSError, ValueError):
                descriptor = int(entry.name)
                found = os.fstat(descriptor)
                if not stat.S_ISSOCK(found.st_mode):
                    continue
                inode = found.st_ino
                if inode in self._others:
                    others.add(inode)
                    continue
                if inode not in self._guests:
                    peer = _peer_of(descriptor, port)
                    if peer is None:
                        others.add(inode)
                        continue
                    self._guests[inode] = _Guest(peer, now)
                descriptors[inode] = descriptor
        self._others = others
        self._guests = {inode: self._guests[inode] for inode in descriptors}
        for guest in self._guests.values():
            guest.known = guest.known or guest.peer in self._known
        return descriptors

    def _too_many(self, waiting: dict[int, _Guest], gone: set[int]) -> list[int]:
        """The oldest of the most crowded addresses, until few enough are left."""
        left = [(guest.since, inode) for inode, guest in waiting.items() if inode not in gone]
        excess = len(left) - self.strangers
        if excess <= 0:
            return []
        crowds = Counter(waiting[inode].peer[0] for _, inode in left)
        share = self.strangers // len(crowds)  # below this, an address is no crowd
        left.sort()
        shut: list[int] = []
        for _, inode in left:
            host = waiting[inode].peer[0]
            if crowds[host] > share and len(shut) < excess:
                crowds[host] -= 1
                shut.append(inode)
        return shut


def _peer_of(descriptor: int, port: int) -> tuple[str, int] | None:
    """Whose connection to `port` this is; None for any other socket, the listening one too."""
    with socket.socket(fileno=descriptor) as found:
        try:
            if found.family not in (socket.AF_INET, socket.AF_INET6):
                return None
            if found.getsockname()[1] != port:
                return None
            host, theirs = found.getpeername()[:2]
        finally:
            found.detach()  # it is gRPC's
    return _plain_host(host), theirs


def _plain_host(host: str) -> str:
    """Without a scope, and IPv4 as it is written where it comes in by an IPv6 socket."""
    host = host.partition("%")[0]
    return host.removeprefix("::ffff:") if "." in host else host


def _shut(descriptor: int, peer: tuple[str, int]) -> bool:
    """Shut a connection, if it still is the one of `peer`."""
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as copy:
        host, theirs = copy.getpeername()[:2]
        if (_plain_host(host), theirs) == peer:
            copy.shutdown(socket.SHUT_RDWR)
            return True
    return False


__all__ = ["Doorkeeper", "check_room_for", "most_connections", "raise_file_limit"]
