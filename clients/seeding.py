"""Seeded work that leaves no trace: the process's random generators are put back afterwards.

Models, dropout, augmentations and users' own functions draw from the global generators of
PyTorch, NumPy and Python. Inside `seeded` these start from a given seed, so that the same job
gives the same bits in any process and after any other work.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed every global generator, and restore them on the way out.

    Args:
        seed: any integer; its low 63 bits are used.
        device: whose generator is seeded beside the CPU's.
    """
    seed &= (1 << 63) - 1
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    accelerator = _accelerator_state(device)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # manual_seed walks the stack and every device
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[_index(device)].manual_seed(seed)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if accelerator is not None and device is not None:
            _restore_accelerator(device, accelerator)


def _accelerator_state(device: torch.device | None) -> torch.Tensor | None:
    if device is None or device.type == "cpu":
        return None
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return None


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _restore_accelerator(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.mps.set_rng_state(state)
