"""How glibc's allocator is told to keep a process small that many threads pass buffers through.

gRPC receives in threads of its own and frees in others. With the default of eight arenas a core,
every thread's arena keeps the largest amount that it ever held; with one, a coordinator of
models of 40 MB needs two models less, at the same speed.
"""

import contextlib
import ctypes
import functools

_M_ARENA_MAX = -8


@functools.cache
def share_one_arena() -> bool:
    """Let all threads allocate from one arena; whether this C library could be told."""
    with contextlib.suppress(OSError, AttributeError):
        return bool(ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1))
    return False
