"""Seeded work of a trainer that leaves no trace: see `umbel.core.streams`.

Inside `seeded` the process's random generators start from a given seed, so that the same job
gives the same bits in any process and after any other work.
"""

from contextlib import AbstractContextManager

import torch

from umbel.core import streams

_CPU = torch.device("cpu")


def seeded(seed: int, device: torch.device | None = None) -> AbstractContextManager[None]:
    """Seed every global generator; on the way out, nobody sees what was drawn.

    Args:
        seed: any integer; its low 63 bits are used.
        device: whose generator is seeded beside the CPU's.
    """
    return streams.seeded(seed, _CPU if device is None else device)
