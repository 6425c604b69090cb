"""The global random generators of Python, NumPy and PyTorch: seeded, kept, and put back.

Models, dropout, augmentations and users' own functions draw from these generators, whoever else
does so in the same process. Work that shall give the same numbers anywhere is done between
`seed_all` and the `restore` of what was there before.

An engine whose processes run one node's message after the other seeds the generators for each
(`derived_seed`): forked processes begin with equal generators, and would otherwise draw the same
numbers for different nodes.
"""

import contextlib
import ctypes
import functools
import hashlib
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

_KEY_BYTES = 624 * 4
_STATE_BYTES = _KEY_BYTES + 4  # the words of the Mersenne Twister, and the position in them


def derived_seed(*parts: object) -> int:
    """A seed of 63 bits that depends on all parts, and is unlike that of any other parts."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_all(seed: int, device: Any = None) -> None:
    """Seed every generator that is there.

    Args:
        seed: not negative, below 2^63.
        device: a `torch.device` whose generator is seeded beside the CPU's; all that work if None.
    """
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch = sys.modules.get("torch")
    if torch is None:
        return
    torch.default_generator.manual_seed(seed)  # manual_seed walks the stack and every device
    if device is None:
        if torch.cuda.is_initialized() or torch.version.cuda or torch.version.hip:
            torch.cuda.manual_seed_all(seed)
        return
    if device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


class Generators:
    """The states of all generators at one moment.

    Args:
        device: a `torch.device` whose generator is kept beside the CPU's; all that work if None.
    """

    def __init__(self, device: Any = None) -> None:
        self._python = random.getstate()
        self._numpy = _numpy.kept()
        self._device = device
        self._torch = self._others = None
        torch = sys.modules.get("torch")
        if torch is not None:
            self._torch = torch.default_generator.get_state()
            self._others = _accelerators(torch, device)

    def restore(self) -> None:
        """Put the generators back to that moment."""
        random.setstate(self._python)
        _numpy.restore(self._numpy)
        torch = sys.modules.get("torch")
        if torch is None or self._torch is None:
            return
        torch.default_generator.set_state(self._torch)
        if self._others is None:
            return
        if self._device is None:
            torch.cuda.set_rng_state_all(self._others)
        elif self._device.type == "cuda":
            torch.cuda.set_rng_state(self._others, self._device)
        else:
            torch.mps.set_rng_state(self._others)


def _accelerators(torch: Any, device: Any) -> Any:
    if device is None:
        return torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == "mps" else None


def _index(device: Any) -> int:
    import torch

    return torch.cuda.current_device() if device.index is None else int(device.index)


class _NumpyState:
    """NumPy's global generator, kept and put back in microseconds.

    `numpy.random.get_state` and `set_state` take 160 µs together, because they go through the
    624 words one by one. NumPy tells the address of these words, so they are copied as a block.
    What the block does not hold is the second of a pair of normal numbers, made and not yet
    asked for. Whether there is one shows when a normal number is drawn: the block stays as it is
    if there was. Then, or if the block is not as expected, NumPy's own functions are used.
    """

    def __init__(self) -> None:
        self._last: tuple[bytes, Any] = (b"", None)

    def forget(self) -> None:
        """Look closely the next time."""
        self._last = (b"", None)

    def kept(self) -> tuple[bytes, Any]:
        """The state: as a block, or, where that is not all of it, empty and as NumPy says it."""
        block = self._read() if self._understood else b""
        if not block:
            return b"", np.random.get_state(legacy=False)
        if block == self._last[0]:
            return self._last  # nothing was drawn since it was put back
        second = np.random.standard_normal()
        if self._read() != block:  # there was none; what was drawn for it is put back
            self._put(block)
            return block, None
        whole: Any = np.random.get_state(legacy=False)
        whole.update(has_gauss=1, gauss=second)
        np.random.set_state(whole)
        return b"", whole

    def restore(self, state: tuple[bytes, Any]) -> None:
        """Put back what `kept` gave."""
        block, whole = state
        if not block:
            np.random.set_state(whole)
        elif not self._put(block):  # another kind of generator was set meanwhile
            words = np.frombuffer(block, np.uint32)
            key, pos = words[:-1].copy(), int(words[-1])
            np.random.set_state(("MT19937", key, pos))  # type: ignore[arg-type]  # the pair may be left out
        self._last = state

    def _put(self, block: bytes) -> bool:
        """Make the block the whole state; whether that can be done."""
        address = self._address()
        if address:
            np.random.seed(0)  # forgets the second of a pair
            ctypes.memmove(address, block, _STATE_BYTES)
        return bool(address)

    @functools.cached_property
    def _understood(self) -> bool:
        """Whether the block is what NumPy says of the state."""
        whole: Any = np.random.get_state(legacy=False)
        key, pos = whole["state"].get("key"), int(whole["state"].get("pos", -1))
        if key is None or pos < 0:
            return False
        words = key.astype(np.uint32).tobytes() + pos.to_bytes(4, sys.byteorder)
        return bool(self._read() == words)

    def _address(self) -> int:
        # Somebody may have set another kind of generator.
        generator = np.random.get_bit_generator()  # type: ignore[attr-defined]  # NumPy leaves it out of its types
        return int(generator.ctypes.state_address) if type(generator) is np.random.MT19937 else 0

    def _read(self) -> bytes:
        address = self._address()
        return ctypes.string_at(address, _STATE_BYTES) if address else b""


_numpy = _NumpyState()


class _Expendable(threading.local):
    """Whether somebody has taken care of the generators already, for what this thread does."""

    now = False


_expendable = _Expendable()


@contextlib.contextmanager
def expendable() -> Iterator[None]:
    """Within, whoever seeds need not put the generators back as they were: that is seen to."""
    before, _expendable.now = _expendable.now, True
    try:
        yield
    finally:
        _expendable.now = before


def look_closely() -> None:
    """Foreign code ran: whether NumPy's generator holds a half-used pair is to be asked anew."""
    _numpy.forget()


@contextlib.contextmanager
def seeded(seed: int, device: Any = None) -> Iterator[None]:
    """Seed the generators, and leave no trace of what was drawn on the way out.

    Args:
        seed: any integer; its low 63 bits are used.
        device: as for `seed_all`.
    """
    seed &= (1 << 63) - 1
    if _expendable.now:
        seed_all(seed, device)
        try:
            yield
        finally:
            seed_all(derived_seed(seed, "after"), device)
        return
    kept = Generators(device)
    seed_all(seed, device)
    try:
        yield
    finally:
        kept.restore()


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Put all generators back on the way out; within, they are expendable."""
    if _expendable.now:
        yield
        return
    before = Generators()
    try:
        with expendable():
            yield
    finally:
        before.restore()
