"""Arrays whose bytes lie where another process has put them, and are read there.

Flower keeps an array's values as `bytes`. Where they come from another process of this machine,
that is a copy of the model into fresh memory for every message, which the kernel hands out page by
page: several times the copy itself. Most apps only ask for `numpy()`, which copies again.
"""

from typing import Any, Protocol

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from umbel.core.contents import records_of
from umbel.core.npy import values_in


class Held(Protocol):
    """Bytes that somebody else keeps."""

    @property
    def view(self) -> memoryview:
        """They, to be read."""

    def __len__(self) -> int: ...


class HeldArray(Array):
    """An `Array` that reads its values where they lie, until somebody asks for its bytes.

    Asked for `data`, it becomes an ordinary `Array` for good, with bytes of its own. So whoever
    looks into it, pickles, compares or stores it finds what Flower promises.

    Attributes:
        held: the bytes.
    """

    held: Held

    def __init__(self, dtype: str, shape: tuple[int, ...], stype: str, held: Held) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype=stype, held=held)

    def __getattr__(self, name: str) -> Any:
        """Called for what is not there: `data`, before anybody has asked for it."""
        if name != "data":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        held = self.__dict__.get("held")
        if held is not None:  # another thread may have been quicker
            self._become_ordinary(bytes(held.view))
        return self.__dict__["data"]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "data":
            self._become_ordinary(value)
        Array.__setattr__(self, name, value)

    def _become_ordinary(self, data: bytes) -> None:
        # Another class would be named in what Flower stores, and be no equal of an ordinary array.
        self.__dict__["data"] = data
        self.__dict__.pop("held", None)
        self.__class__ = Array  # type: ignore[assignment]  # its base, with the same fields

    def numpy(self) -> np.ndarray[Any, Any]:
        """The values as an array of its own: one copy.

        Raises:
            TypeError: they are serialised in another way than NumPy's.
        """
        try:
            return values_in(self.held.view, self.stype).copy()
        except ValueError:  # no plain numbers: structured, or in Fortran's order
            return super().numpy()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Array) and self._ordinary() == (
            other._ordinary() if isinstance(other, HeldArray) else other
        )

    __hash__ = None  # type: ignore[assignment]  # as Flower's own

    def _ordinary(self) -> Array:
        return Array(self.dtype, self.shape, self.stype, bytes(self.held.view))

    def __reduce__(self) -> tuple[Any, ...]:
        return Array, (self.dtype, self.shape, self.stype, bytes(self.held.view))


def array_of(dtype: str, shape: tuple[int, ...], stype: str, data: bytes) -> Array:
    """`Array(dtype, shape, stype, data)`, which does not look at what these are."""
    array = Array.__new__(Array)
    array.__dict__.update(dtype=dtype, shape=shape, stype=stype, data=data)
    return array


def buffer_of(array: Array) -> bytes | memoryview:
    """An array's bytes where they lie; to be read only."""
    return array.held.view if type(array) is HeldArray else array.data


def bytes_in(message: Message) -> int:
    """Bytes of the arrays in a message; names and scalars beside them, and errors, have none."""
    if message.has_error():
        return 0
    arrays = records_of(message.content, ArrayRecord)
    return sum(len(buffer_of(array)) for record in arrays for array in record.values())
