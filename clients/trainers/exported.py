"""What a trainer hands to whoever writes its model into a file of another format.

Every trainer whose model is a function of one tensor gives it as a PyTorch module, scikit-learn's
among them: one way then leads to ONNX and `torch.export`, and one check holds for all.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor, nn

from umbel.clients.trainers.base import Options, Weights
from umbel.core.errors import ConfigError

Output = Literal["logits", "logit", "probabilities", "scores", "number", "raw"]
"""What a model's outputs are: of classes before the softmax, of one class before the sigmoid,
shares of classes, numbers whose largest is the class, a value, or what the app alone knows."""


@dataclass(frozen=True)
class Exported:
    """A trained model as a module.

    Attributes:
        module: in eval mode, on the CPU, in float32; takes one tensor whose first axis is the
            example, and gives one.
        output: what that is.
    """

    module: nn.Module
    output: Output


@runtime_checkable
class ExportableTrainer(Protocol):
    """A trainer whose model is a function of one tensor."""

    def exported(self, weights: Weights, options: Options) -> Exported:
        """The model with these weights.

        Raises:
            ConfigError: this one cannot be written as such a function.
        """
        ...


def exported_by(trainer: Any, weights: Weights, options: Options) -> Exported:
    """A trainer's model as a module.

    Raises:
        ConfigError: the trainer has none.
    """
    if not isinstance(trainer, ExportableTrainer):
        raise ConfigError(
            f"{type(trainer).__name__} gives no module that a graph could be made of; export its "
            "model with --to safetensors (one of Keras with --to keras), or give the trainer a "
            "method `exported`"
        )
    return trainer.exported(weights, options)


class TakenOutput(nn.Module):
    """A module and what is taken of its outputs, where it returns more than a tensor."""

    def __init__(self, module: nn.Module, take: Any) -> None:
        super().__init__()
        self.module = module
        self.take = take

    def forward(self, x: Tensor) -> Tensor:
        taken: Tensor = self.take(self.module(x))
        return taken
