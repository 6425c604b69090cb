"""Random bits for privacy: AES-256 in counter mode, keyed by the operating system.

Noise and sampling that an accountant relies on must not come from a generator that anyone can
seed or replay. A stream takes 256 bits from the operating system and expands them with AES; a
process that was forked notices and takes a new key, so two processes never share a stream.
"""

import hashlib
import os
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

_BLOCK = 1 << 16  # bytes of zeros that are encrypted at a time


class Entropy:
    """A stream of random bits.

    Args:
        insecure_seed: for tests only: the stream is then the same every time, and whatever is
            protected by it is not private.

    Attributes:
        secure: the stream is keyed by the operating system.
    """

    def __init__(self, insecure_seed: int | None = None) -> None:
        self.secure = insecure_seed is None
        self._seed = insecure_seed
        self._zeros = bytes(_BLOCK)
        self._rekey()

    def _rekey(self) -> None:
        self._owner = os.getpid()
        if self._seed is None:
            key = os.urandom(32)
        else:
            key = hashlib.sha256(f"umbel insecure seed {self._seed}".encode()).digest()
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def fill(self, words: np.ndarray[Any, Any]) -> None:
        """Overwrite a contiguous array of unsigned integers with random bits."""
        if self.secure and os.getpid() != self._owner:
            self._rekey()  # a forked child must not repeat its parent's noise
        target = memoryview(words.data).cast("B")
        for start in range(0, len(target), _BLOCK):
            piece = target[start : start + _BLOCK]
            self._stream.update_into(memoryview(self._zeros)[: len(piece)], piece)

    def words32(self, size: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
        """Random 32-bit words, shape (size,)."""
        words = np.empty(size, dtype=np.uint32)
        self.fill(words)
        return words

    def words64(self, size: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """Random 64-bit words, shape (size,)."""
        words = np.empty(size, dtype=np.uint64)
        self.fill(words)
        return words
