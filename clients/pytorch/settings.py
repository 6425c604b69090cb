"""The settings of local training with PyTorch; each is also an option of the run."""

from dataclasses import dataclass

import torch

from umbel.strategies.errors import ConfigError
from umbel.strategies.options import choose, dashed

PRECISIONS = ("auto", "float32", "bf16", "fp16")
BATCHED = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class TorchSettings:
    """How a node trains. Option names are the same in kebab-case.

    Attributes:
        learning_rate: of the local optimiser; a round's own rate (`Job.learning_rate`) wins.
        batch_size: examples a step; 0 is all of them.
        local_epochs: passes over the node's examples.
        local_steps: steps of the optimiser; above 0 it takes the place of `local_epochs`.
        momentum: of SGD.
        weight_decay: of SGD.
        proximal_mu: FedProx: mu/2 times the squared distance to the model that was sent is
            added to the loss (Li et al. 2020, https://arxiv.org/abs/1812.06127, eq. 2).
        clip_gradient: largest l2 norm of a step's gradient; 0 is no limit.
        accumulate: a batch is worked through in this many parts, to save memory.
        precision: "float32", "bf16" or "fp16" (mixed, on CUDA only); "auto" is bf16 on CUDA
            devices that have it and float32 elsewhere.
        device: "auto" (CUDA, else MPS, else CPU) or a name that torch knows.
        gpus: how many of its node's GPUs a job uses together; 0 is all of them.
        local_processes: how many processes a job uses together on the CPU, for models whose
            step is worth splitting.
        batched: whether many nodes' models are trained as one computation: "auto" where it
            is faster, "on" wherever it is possible, "off".
    """

    learning_rate: float = 0.05
    batch_size: int = 32
    local_epochs: int = 1
    local_steps: int = 0
    momentum: float = 0.0
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    clip_gradient: float = 0.0
    accumulate: int = 1
    precision: str = "auto"
    device: str = "auto"
    gpus: int = 1
    local_processes: int = 1
    batched: str = "auto"

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

    def validate(self) -> None:
        """Raises:
        ConfigError: a value is out of its range.
        """
        for name in ("batch_size", "local_steps", "local_epochs", "gpus"):
            _at_least(0, name, getattr(self, name))
        for name in ("learning_rate", "momentum", "weight_decay", "proximal_mu", "clip_gradient"):
            _at_least(0, name, getattr(self, name))
        for name in ("accumulate", "local_processes"):
            _at_least(1, name, getattr(self, name))
        if self.local_epochs == 0 and self.local_steps == 0:
            raise ConfigError("local-epochs and local-steps are both 0; set one of them above 0")
        choose("precision", self.precision, PRECISIONS)
        choose("batched", self.batched, BATCHED)


def _at_least(least: float, field: str, value: float) -> None:
    if not least <= value < float("inf"):
        raise ConfigError(f"{dashed(field)} is {value}; it must be at least {least}")


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
