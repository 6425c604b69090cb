"""Models of Hugging Face as a node builds them: the base, its digest, and adapters on it."""

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from umbel.clients.frameworks.extras import installed
from umbel.clients.pytorch.module import BUILD_SEED, takes_options
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Options
from umbel.core.errors import ConfigError

WHO = "TransformersTrainer"
EXTRA = "transformers"

TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
"""What PEFT calls the task of a model whose class ends so; it then trains a classifier's head."""


@dataclass(frozen=True)
class Build:
    """Makes a node's module: the base, or a frozen base with adapters. Called with the options.

    Attributes:
        model: a function that makes a `transformers.PreTrainedModel`.
        lora: arguments of `peft.LoraConfig`; None trains the whole model.
        base: digest that the frozen base must have.
    """

    model: Callable[..., Any]
    lora: Mapping[str, Any] | None = None
    base: str = ""
    takes: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "takes", takes_options(self.model))

    def __call__(self, options: Options) -> nn.Module:
        """Raises:
        ConfigError: a package is missing, the base differs, or adapters do not fit it.
        """
        installed("transformers", EXTRA, WHO)
        if self.lora is None:
            return self._base(options)
        peft = installed("peft", EXTRA, "LoRA")
        with seeded(BUILD_SEED):  # frozen: the same on every node; adapters follow the seed
            base = self._base(options)
        self._check(base)
        task = next((t for end, t in TASKS.items() if type(base).__name__.endswith(end)), None)
        try:
            config = peft.LoraConfig(**{"task_type": task, **self.lora})
            with warnings.catch_warnings():  # of names that peft and transformers do not share yet
                warnings.simplefilter("ignore", FutureWarning)
                adapted: nn.Module = peft.get_peft_model(base, config)
        except (TypeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the adapters lora={dict(self.lora)} do not match the base "
                f"{type(base).__name__} ({error}); name layers that it has, as "
                "lora={'r': 8, 'target_modules': [...]}"
            ) from error
        return adapted

    def _base(self, options: Options) -> nn.Module:
        made = self.model(options) if self.takes else self.model()
        if not isinstance(made, nn.Module) or not hasattr(made, "config"):
            raise ConfigError(
                f"the model is a {type(made).__name__}; give {WHO} a function that returns a "
                "model of transformers, such as AutoModelForCausalLM.from_config(...)"
            )
        if "labels" not in inspect.signature(made.forward).parameters:
            raise ConfigError(
                f"{type(made).__name__} has no loss (no argument `labels`); take a model for a "
                "task, such as AutoModelForSequenceClassification"
            )
        return made

    def _check(self, base: nn.Module) -> None:
        found = base_digest(base)
        if not self.base:
            raise ConfigError(
                f"adapters need the digest of the frozen base that they are for; here it is "
                f"{found}: give base={found!r} if this is the base that you mean"
            )
        if found != self.base:
            raise ConfigError(
                f"the frozen base of this process has the digest {found}, and the app names "
                f"{self.base}; load the same weights here, or name these in the app"
            )


def base_digest(module: nn.Module) -> str:
    """SHA-256 of a module's whole state: names, types, shapes and values; in hex.

    Made under the fixed seed of frozen values, where layers are new and random.
    """
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        told = f"{name} {value.dtype} {tuple(value.shape)}\n"
        digest.update(told.encode())
        digest.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def inner(module: nn.Module) -> Any:
    """The model of transformers, out of its adapters."""
    held: Any = module
    return held.get_base_model() if hasattr(held, "peft_config") else held
