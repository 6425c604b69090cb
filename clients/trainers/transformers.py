"""A trainer for models of Hugging Face, whole or by adapters.

    def net():
        from transformers import AutoModelForSequenceClassification
        return AutoModelForSequenceClassification.from_pretrained("a-folder", num_labels=2)

    trainer = TransformersTrainer(net)
    trainer = TransformersTrainer(net, lora={"r": 8, "target_modules": ["query"]}, base="3f5a...")

The loss is the model's own, of whatever task: the labels go into the model, as its `Trainer` does.
Steps, seeds, local objectives and devices are those of `TorchTrainer`, which trains it. With LoRA
(Hu et al. 2021) the base is frozen: it never travels, and only adapters (and a classifier's head)
are trained, sent, clipped, noised and summed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from umbel.clients.frameworks.adapters import Build
from umbel.clients.frameworks.labelled import LabelledRows, scores
from umbel.clients.pytorch.loop import MakeOptimizer
from umbel.clients.pytorch.settings import TorchSettings, choose_device
from umbel.clients.pytorch.trainer import TorchTrainer
from umbel.clients.settings import options_of, settings_of
from umbel.clients.trainers.base import Evaluated, Job, Options, Trained, Weights
from umbel.core.errors import ConfigError
from umbel.strategies.objective import CORRECTION


@dataclass(frozen=True)
class TransformersTrainer(TorchSettings):
    """Trains a `transformers.PreTrainedModel`. The inherited fields are option defaults.

    Examples are a `datasets.Dataset` or rows that are dicts, with the model's arguments as
    columns (`input_ids`, `attention_mask`, `labels`, ...), or arrays: token ids (n, length) and
    labels. A label of -100 does not count. Rows of a causal language model need no labels: they
    are the tokens.

    Attributes:
        model: a function that makes the model; with an argument, it is given the run's options.
        lora: arguments of `peft.LoraConfig`: only adapters are trained. None trains everything.
        base: digest of the frozen base (`base_digest`), which every process compares with what it
            has; needed with `lora`.
        optimizer: a function of parameters and learning rate; SGD where it is left out.
        metrics: a function of the model's output and the labels that returns means over a batch.
            Left out: accuracy where labels are classes or tokens.
        target: the column of the labels; `labels` or `label` where it is left out.
        OPTIONS: every option that this trainer understands, with its default.
    """

    model: Callable[..., Any]
    lora: Mapping[str, Any] | None = None
    base: str = ""
    optimizer: MakeOptimizer | None = None
    metrics: Callable[[Any, Any], Mapping[str, Any]] | None = None
    target: str = ""
    USE: ClassVar[str] = "model(input_ids=x).logits"
    honours: ClassVar[frozenset[str]] = frozenset({CORRECTION})
    OPTIONS: dict[str, bool | int | float | str] = field(init=False, repr=False, compare=False)
    torch: TorchTrainer = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.model, nn.Module) or not callable(self.model):
            raise ConfigError(
                f"TransformersTrainer was given a {type(self.model).__name__}; give it a function "
                "that makes the model: TransformersTrainer(lambda: ...)"
            )
        if self.base and self.lora is None:
            raise ConfigError(
                f"base is {self.base!r}, but nothing is frozen; give lora, or leave base out"
            )
        settings = settings_of(self, TorchSettings)
        trainer = TorchTrainer(
            Build(self.model, self.lora, self.base),
            loss=_own_loss,
            optimizer=self.optimizer,
            metrics=self.metrics or scores,
            **{f: getattr(settings, f) for f in TorchSettings.__dataclass_fields__},
        )
        object.__setattr__(self, "OPTIONS", options_of(self, TorchSettings))
        object.__setattr__(self, "torch", trainer)

    def check_options(self, options: Options) -> None:
        """Raises ConfigError where a setting cannot be used."""
        self.torch.check_options(options)
        self.torch.group_size(options)

    def initial(self, options: Options, seed: int) -> Weights:
        """The first model: what is trained from `seed`, and the frozen base as every node has it.

        Weights that the function loads are loaded, whatever the seed.
        """
        return self.torch.initial(options, seed)

    def ready(self, weights: Weights, options: Options) -> nn.Module:
        """A model of its own with these weights, in eval mode on the CPU."""
        return self.torch.ready(weights, options)

    def statistics(self, options: Options) -> tuple[str, ...]:
        """The buffers that training gathers from examples."""
        return self.torch.statistics(options)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        """Train on a node's examples; `weights` is not mutated.

        Raises:
            ConfigError: the options, the examples or the weights do not fit the model.
            RunError: training diverged.
        """
        return self.torch.train(weights, self._rows(examples, job.options), job)

    def evaluate(self, weights: Weights, examples: Any, options: Options) -> Evaluated:
        """The model's loss, and metrics; `weights` is not mutated.

        The perplexity of a language model is the exponential of its loss.
        """
        return self.torch.evaluate(weights, self._rows(examples, options), options)

    def _rows(self, examples: Any, options: Options) -> LabelledRows:
        device = choose_device(self.torch.settings(options).device)
        module = self.torch.bench.piece(options, device).module
        return LabelledRows.of(examples, module, self.target)


def _own_loss(output: Any, labels: Any) -> torch.Tensor:  # noqa: ARG001
    """The loss that the model gave with its output."""
    loss: torch.Tensor = output.loss
    return loss
