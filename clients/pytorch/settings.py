"""The settings of local training with PyTorch; each is also an option of the run."""

from dataclasses import dataclass

import torch

from umbel.clients.local_settings import LocalSettings
from umbel.core.errors import ConfigError
from umbel.core.limits import at_least, one_of, option

PRECISIONS = ("auto", "float32", "bf16", "fp16")
BATCHED = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class TorchSettings(LocalSettings):
    """How a node trains with PyTorch: `LocalSettings`, and what only PyTorch has.

    Attributes:
        accumulate: in how many parts a batch is worked through, to save memory.
        precision: number format of training: "float32", "bf16" or "fp16" (mixed, on CUDA only);
            "auto" is bf16 on CUDA devices that have it and float32 elsewhere.
        device: where to train: "auto" (CUDA, else MPS, else CPU) or a name that torch knows.
        gpus: how many of its node's GPUs a job uses together; 0 is all of them.
        local_processes: how many processes a job uses together on the CPU, for models whose
            step is worth splitting.
        batched: whether many nodes' models are trained as one computation: "auto" where it
            is faster, "on" wherever it is possible, "off".
    """

    accumulate: int = option(1, at_least(1))
    precision: str = option("auto", one_of(*PRECISIONS))
    device: str = "auto"
    gpus: int = option(1, at_least(0))
    local_processes: int = option(1, at_least(1))
    batched: str = option("auto", one_of(*BATCHED))

    def on_gpus(self) -> bool:
        """Whether a job that several processes share runs on GPUs; else it runs on CPUs."""
        return self.gpus != 1 and self.device != "cpu" and torch.cuda.is_available()

    def processes(self) -> int:
        """How many processes of this node share a job: one for each GPU, or as many as asked.

        Raises:
            ConfigError: more GPUs are asked for than the node has.
        """
        found = torch.cuda.device_count()
        if self.gpus > max(found, 1) and self.device != "cpu":
            raise ConfigError(f"gpus is {self.gpus}, but this node has {found}; use gpus=0 (all)")
        return (self.gpus or found) if self.on_gpus() else self.local_processes


def choose_device(name: str) -> torch.device:
    """The device that a setting names.

    Raises:
        ConfigError: torch does not know the name, or this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; choose auto, cpu, mps, cuda or cuda:0") from None
    missing = (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()) or (
        device.type == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise ConfigError(f"device is {name!r}, which this machine does not have; use device=auto")
    return device


def mixed_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The lower type of mixed precision, or None for full precision."""
    if device.type != "cuda" or precision == "float32":
        return None
    if precision == "fp16":
        return torch.float16
    if precision == "bf16":
        return torch.bfloat16
    major, _ = torch.cuda.get_device_capability(device)
    return torch.bfloat16 if major >= 8 else None
