"""The settings of local training with PyTorch; each is also an option of the run."""

from dataclasses import dataclass

import torch

from umbel.core.errors import ConfigError
from umbel.core.limits import at_least, check_limits, one_of, option

PRECISIONS = ("auto", "float32", "bf16", "fp16")
BATCHED = ("auto", "on", "off")


@dataclass(frozen=True, kw_only=True)
class TorchSettings:
    """How a node trains. Option names are the same in kebab-case.

    Attributes:
        learning_rate: learning rate of the local optimiser; a round's own rate
            (`Job.learning_rate`) wins.
        batch_size: examples a step; 0 is all of them.
        local_epochs: passes over the node's examples.
        local_steps: steps of the optimiser; above 0 it takes the place of `local_epochs`.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        proximal_mu: strength of FedProx: mu/2 times the squared distance to the model that was sent
            is added to the loss (Li et al. 2020, https://arxiv.org/abs/1812.06127, eq. 2).
        clip_gradient: largest l2 norm of a step's gradient; 0 is no limit.
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

    learning_rate: float = option(0.05, at_least(0))
    batch_size: int = option(32, at_least(0))
    local_epochs: int = option(1, at_least(0))
    local_steps: int = option(0, at_least(0))
    momentum: float = option(0.0, at_least(0))
    weight_decay: float = option(0.0, at_least(0))
    proximal_mu: float = option(0.0, at_least(0))
    clip_gradient: float = option(0.0, at_least(0))
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

    def validate(self) -> None:
        """Raises:
        ConfigError: a value is out of its range.
        """
        check_limits(self)
        if self.local_epochs == 0 and self.local_steps == 0:
            raise ConfigError("local-epochs and local-steps are both 0; set one of them above 0")


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
