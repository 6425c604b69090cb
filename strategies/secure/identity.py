"""Who a node is to the others, where its session lives, and whom it has met.

An identity file (PEM: certificate, key, the authority's certificate, as the link keeps it) makes
the node sign with its enrolled key and check everybody's certificate. A node process of the link
also takes the session over (see EXTERNAL_SESSION): it is in memory only, never on disk, gone with
the process, and out of reach of a server that asks for an earlier step again. Elsewhere (virtual
nodes, Flower's SuperNodes) the node makes a key on first use and keeps it, like the session, in
Flower's `Context.state`; identities of others are pinned on first use.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.app import ConfigRecord, Context

from umbel.core.contents import find_record
from umbel.core.errors import ConfigError
from umbel.privacy.masking import keys
from umbel.strategies.policy.reading import policy_of
from umbel.strategies.secure.message import Plain, blob, number
from umbel.strategies.secure.node import EXTERNAL_SESSION, IDENTITY, SPENT
from umbel.strategies.secure.policy import Policy, RefusalError
from umbel.strategies.secure.protocol import Party
from umbel.strategies.secure.wire import plain_of

_KEPT = "umbel.secure"
"""The node's own record of its key and of the identities that it has met."""
_SESSION = "umbel.secure.session"
_PIN = 8 + 16  # a node's id, and half of the SHA-256 of its identity
TICKETS = 64
"""So many sessions a replay is recognised against."""


def load_party(context: Context) -> Party:
    """The node of a context.

    Raises:
        ConfigError: its policy or identity file cannot be used.
    """
    if context.node_config.get(IDENTITY):
        return enrolled(context.node_id, context.node_config)
    pinned = _kept(context).get("pins", b"")
    pins = {}
    if isinstance(pinned, bytes):
        for at in range(0, len(pinned), _PIN):
            pins[int.from_bytes(pinned[at : at + 8])] = pinned[at + 8 : at + _PIN]
    own = keys.signing_key(_own_key(context))
    return Party(context.node_id, own, b"", _policy(context.node_config, b""), pins)


def enrolled(node: int, config: Mapping[str, Any]) -> Party:
    """The node whose configuration names an identity file.

    Raises:
        ConfigError: its policy or identity file cannot be used.
    """
    file = str(config[IDENTITY])
    key, certificate, authority = _identity(file, _stamps(file))
    return Party(node, key, certificate, _policy(config, authority))


def enrolled_key(file: str) -> keys.SigningKey:
    """The key of an identity file.

    Raises:
        ConfigError: it cannot be used.
    """
    return _identity(file, _stamps(file))[0]


def ticket_of(context: Context) -> bytes | None:
    """The ticket of the session that is kept for the node's next message."""
    found = plain_of(context.state, _SESSION).get("ticket")
    return found if isinstance(found, bytes) else None


def remember(me: Party, context: Context) -> None:
    """Keep the identities that the node has met."""
    pins = b"".join(node.to_bytes(8) + print_ for node, print_ in sorted(me.pins.items()))
    context.state[_KEPT] = ConfigRecord({**_kept(context), "pins": pins})


_PRIVATE = re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.+?-----END [A-Z ]+-----", re.DOTALL)


def check_fresh(run: int, round_: int, ticket: bytes, context: Context) -> None:
    """Before a session begins: its round is none of which this node has given a masked update.

    A server that repeats a round, with and without one node, would have that node's update as the
    difference of two sums. Where a node process takes sessions over, it decides once more, on what
    it keeps on disk.

    Args:
        run: of the session; round_ likewise.
        ticket: of the session, which is remembered; empty before it is known.
        context: of the node.

    Raises:
        RefusalError: the round is spent, or the very same session was begun before.
    """
    taken = find_record(context.state, SPENT, ConfigRecord)
    if taken is not None:
        refuse_spent(run, round_, number(dict(taken), "round"))  # type: ignore[arg-type]
    if EXTERNAL_SESSION in context.state:
        return
    kept = _kept(context)
    refuse_spent(run, round_, _spent(kept).get(run, 0))
    if not ticket:  # not yet known: the node has not looked at the model
        return
    seen = kept.get("tickets", b"")
    seen = seen if isinstance(seen, bytes) else b""
    if any(seen[at : at + 32] == ticket for at in range(0, len(seen), 32)):
        raise RefusalError("replay", "this node has been part of this session before")
    context.state[_KEPT] = ConfigRecord({**kept, "tickets": (seen + ticket)[-32 * TICKETS :]})


def refuse_spent(run: int, round_: int, spent: int) -> None:
    """Raises RefusalError where a round does not come after the last one that was given."""
    if round_ <= spent:
        raise RefusalError(
            "round",
            f"this node has given its masked update of round {spent} of run {run:x}, and rounds "
            f"only go up; the server asks for round {round_}",
        )


def spend(memory: Plain, context: Context) -> None:
    """Before a masked update leaves: its round is spent."""
    kept = _kept(context)
    spent = _spent(kept) | {number(memory, "run"): number(memory, "round")}
    flat = b"".join(run.to_bytes(8) + round_.to_bytes(8) for run, round_ in spent.items())
    context.state[_KEPT] = ConfigRecord({**kept, "spent": flat})


def _spent(kept: Plain) -> dict[int, int]:
    """The last round that was given, by run."""
    flat = kept.get("spent", b"")
    flat = flat if isinstance(flat, bytes) else b""
    return {
        int.from_bytes(flat[at : at + 8]): int.from_bytes(flat[at + 8 : at + 16])
        for at in range(0, len(flat), 16)
    }


def take_session(context: Context) -> Plain:
    """The node's session; it is not kept any longer."""
    session = plain_of(context.state, _SESSION)
    context.state.pop(_SESSION, None)
    return session


def keep_session(memory: Plain, context: Context) -> None:
    """Keep the session until the node's next message, or hand it over."""
    if memory:
        place = EXTERNAL_SESSION if EXTERNAL_SESSION in context.state else _SESSION
        context.state[place] = ConfigRecord({**memory})


def _kept(context: Context) -> Plain:
    record = find_record(context.state, _KEPT, ConfigRecord)
    return {} if record is None else {k: v for k, v in record.items() if isinstance(v, bytes)}


def _own_key(context: Context) -> bytes:
    kept = _kept(context)
    if "key" not in kept:
        kept["key"] = keys.new_signing_key()
        context.state[_KEPT] = ConfigRecord({**kept})
    return blob(kept, "key", 32)


def _policy(config: Mapping[str, Any], authority: bytes) -> Policy:
    """The node's limits on sums; `authority` where its policy names none."""
    policy = policy_of(config).sums
    return policy if policy.authority or not authority else replace(policy, authority=authority)


def _stamps(paths: str) -> tuple[int, ...]:
    try:
        return tuple(os.stat(each).st_mtime_ns for each in paths.split(os.pathsep))  # noqa: PTH116
    except OSError as error:
        raise ConfigError(f"the identity file {paths} cannot be used: {error}") from error


@lru_cache(maxsize=16)
def _identity(path: str, stamps: tuple[int, ...]) -> tuple[keys.SigningKey, bytes, bytes]:  # noqa: ARG001
    """Key, certificate and authority of an identity file; read anew once a key is renewed."""
    try:
        pem = b"\n".join(Path(each).read_bytes() for each in path.split(os.pathsep))
        certificates = x509.load_pem_x509_certificates(pem)
        found = _PRIVATE.search(pem)
        key = serialization.load_pem_private_key(found.group() if found else b"", None)
    except (OSError, ValueError) as error:
        raise ConfigError(f"the identity file {path} cannot be used: {error}") from error
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise ConfigError(f"the key in {path} must be P-256 or Ed25519, so that it can sign")
    der = [one.public_bytes(serialization.Encoding.DER) for one in certificates]
    return key, der[0], der[-1] if len(der) > 1 else b""
