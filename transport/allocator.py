"""How glibc's allocator is told to keep a process small that many threads pass buffers through.

gRPC receives in threads of its own and frees in others. With the default of eight arenas a core,
every thread's arena keeps the largest amount that it ever held; with one, a coordinator of
models of 40 MB needs two models less, at the same speed. And what is freed in the middle of an
arena does not go back to the system, so chunks of the largest size are mapped each on its own:
left to itself, glibc stops doing that once the first of them was freed.
"""

import contextlib
import ctypes
import functools

_M_ARENA_MAX, _M_MMAP_THRESHOLD = -8, -3
_MAPPED = 2 << 20
"""Bytes from which on memory is mapped on its own."""
LARGE = 4 << 20
"""Bytes of a content after which it is worth while to give memory back."""


@functools.cache
def share_one_arena() -> bool:
    """Let all threads allocate from one arena; whether this C library could be told."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, _MAPPED)
        return bool(library.mallopt(_M_ARENA_MAX, 1))
    return False


def give_back() -> None:
    """Give what lies free between used memory back to the system; milliseconds.

    After large contents have passed, that is a model or two: gRPC's buffers are small, many, and
    freed in another order than they were made.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
