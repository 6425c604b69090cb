"""Plain messages of a secure sum: flat, typed on arrival, and signed in one way only."""

from collections.abc import Mapping
from hashlib import sha256

from umbel.privacy.masking import keys
from umbel.strategies.secure.policy import RefusalError

Value = int | str | bytes
Plain = dict[str, Value]
"""A message, or what a node keeps between two of them."""

REFUSED = "refused"
"""The only key of a node's reply that will not go on: the reason."""

_LARGE = 1024


def blob(message: Mapping[str, Value], name: str, length: int | None = None) -> bytes:
    """A field of bytes, of the given length if there is one; RefusalError says what is wrong."""
    value = message.get(name)
    if not isinstance(value, bytes) or (length is not None and len(value) != length):
        raise RefusalError("message", f"{name!r} is missing or has the wrong length")
    return value


def number(message: Mapping[str, Value], name: str) -> int:
    """A whole number; RefusalError says that there is none."""
    value = message.get(name)
    if not isinstance(value, int):
        raise RefusalError("message", f"{name!r} is missing")
    return value


def text(message: Mapping[str, Value], name: str) -> str:
    """A string; RefusalError says that there is none."""
    value = message.get(name)
    if not isinstance(value, str):
        raise RefusalError("message", f"{name!r} is missing")
    return value


def signable(stage: str, sid: bytes, node: int, content: Mapping[str, Value]) -> bytes:
    """What a node signs of a message: stage, session, itself and every field by its name."""
    fields: list[Value] = []
    for name, value in sorted(content.items()):
        # Long fields are hashed once, not copied into the transcript first.
        if isinstance(value, bytes) and len(value) > _LARGE:
            value = sha256(value).digest()
        fields += [name, value]
    return keys.transcript(f"message {stage}", sid, node, *fields)
