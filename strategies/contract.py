"""The contract of a run: what a node acts on besides the message of the round, as one digest.

    protocol   the version of the secure sum and of this digest
    app        the app's files, where the engine has them
    options    every option, completed with the app's defaults: names, types, values
    layers     the stack that these options built: each layer, in order, with its settings
    layout     names, shapes and types of the model's parameters and buffers

A node computes it from what it received and holds. With the hashes of the model, of every value of
the message, and with run, round, cohort and modulus it is in the terms of a secure sum
(`umbel.privacy.masking.session.Terms`), whose hash every node signs: nodes that would act on
different things do not sum. A run's population is one of its options.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from umbel.privacy.masking import keys
from umbel.strategies.stack import Stack

PROTOCOL = 2
"""Version of the secure sum: 1 had no contract."""

PARTS = ("protocol", "app", "options", "layers", "layout")
"""What a contract is about, in the order of its bytes."""

_PART = keys.DIGEST_BYTES
UNKNOWN = bytes(_PART)
"""In the place of the app, where an engine has no files of it."""


@dataclass(frozen=True)
class Contract:
    """One digest a part, each of 32 bytes.

    Raises:
        ValueError: a part has another length.
    """

    protocol: bytes
    app: bytes
    options: bytes
    layers: bytes
    layout: bytes

    def __post_init__(self) -> None:
        if any(len(getattr(self, part)) != _PART for part in PARTS):
            raise ValueError("a contract has parts of 32 bytes")

    @classmethod
    def of(
        cls,
        options: Mapping[str, Any],
        stack: Stack,
        parameters: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        app: str = "",
    ) -> "Contract":
        """The contract of a run.

        Args:
            options: complete ones.
            stack: as the options build it, before a budget has decided its noise.
            parameters: of the first model; buffers likewise. Their values do not matter.
            app: SHA-256 of the app's files in hex; empty where the engine has none.
        """
        return cls(
            protocol=keys.digest("protocol", PROTOCOL),
            app=bytes.fromhex(app) if app else UNKNOWN,
            options=settings_digest("options", options),
            layers=keys.digest("layers", *map(described, (*stack.layers, stack.collect))),
            layout=keys.digest("layout", *_layout(parameters), "buffers", *_layout(buffers)),
        )

    @cached_property
    def blob(self) -> bytes:
        """The parts one after the other, 160 bytes."""
        return b"".join(getattr(self, part) for part in PARTS)

    @staticmethod
    def read(blob: bytes) -> "Contract":
        """The contract of these bytes.

        Raises:
            ValueError: there are more or fewer.
        """
        if len(blob) != _PART * len(PARTS):
            raise ValueError(f"a contract has {_PART * len(PARTS)} bytes, not {len(blob)}")
        return Contract(*(blob[at : at + _PART] for at in range(0, len(blob), _PART)))

    def differs(self, other: "Contract") -> list[str]:
        """The parts in which two contracts differ; an app that one side does not know is none."""
        found = [part for part in PARTS if getattr(self, part) != getattr(other, part)]
        if "app" in found and UNKNOWN in (self.app, other.app):
            found.remove("app")
        return found


def settings_digest(purpose: str, settings: Mapping[str, Any]) -> bytes:
    """SHA-256 of named values, with their types and in the order of their names."""
    parts: list[bytes | str | int] = []
    for name, value in sorted(settings.items()):
        parts += [name, type(value).__name__]
        parts.append(value if isinstance(value, bytes | str | int) else repr(value))
    return keys.digest(purpose, *parts)


@runtime_checkable
class Named(Protocol):
    """A layer or a collect, as every one of them is called."""

    @property
    def name(self) -> str:
        """The name."""
        ...


def described(layer: object) -> str:
    """A layer or a collect as a text that is the same in every process.

    Its class and its settings; what is no plain value is told by its type alone, because a
    function's or an object's `repr` differs from process to process.
    """
    kind = type(layer)
    held = {f.name: getattr(layer, f.name) for f in fields(layer)} if is_dataclass(layer) else {}
    settings = ", ".join(f"{name}={_plain(value)}" for name, value in sorted(held.items()))
    name = layer.name if isinstance(layer, Named) else ""
    return f"{kind.__module__}.{kind.__qualname__}({settings}) as {name}"


def _plain(value: object) -> str:
    if value is None or isinstance(value, bool | int | str | bytes):
        return repr(value)
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value.hex()
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain, value))}]"
    if isinstance(value, Mapping):
        pairs = sorted((str(name), _plain(item)) for name, item in value.items())
        return f"{{{', '.join(f'{name}: {item}' for name, item in pairs)}}}"
    return type(value).__qualname__


def _layout(tree: Mapping[str, Tensor]) -> list[str]:
    return [f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tree.items()]
