"""A fitted scikit-learn estimator as a PyTorch module that computes the same.

Linear models and multi-layer perceptrons are a chain of matrices, and the scalers before them are
one multiplication: so no converter is needed, and the module is tried against the estimator.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import is_classifier
from sklearn.pipeline import Pipeline
from torch import Tensor, nn

from umbel.clients.trainers.exported import Exported, Output
from umbel.core.errors import ConfigError

Array = np.ndarray[Any, Any]

_ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "logistic": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}
CLOSE = 1e-4
"""How far module and estimator may be apart, relative to the largest output: float32."""


class _Affine(nn.Module):
    """x * factor + shift, feature by feature."""

    factor: Tensor
    shift: Tensor

    def __init__(self, factor: Array, shift: Array) -> None:
        super().__init__()
        self.register_buffer("factor", _real(factor))
        self.register_buffer("shift", _real(shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor + self.shift


class _TwoClasses(nn.Module):
    """The one logit of two classes as both."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(x), x], 1)


class _Shares(nn.Module):
    """One sigmoid a class, scaled to the sum 1: one classifier for each class against the rest."""

    def forward(self, x: Tensor) -> Tensor:
        each = torch.sigmoid(x)
        return each / each.sum(1, keepdim=True)


def module_of(model: Any, features: int) -> Exported:
    """The module of an estimator, or of a pipeline of scalers with one at its end.

    Args:
        model: fitted.
        features: how many numbers an input has.

    Raises:
        ConfigError: a step or an estimator that is no chain of matrices.
    """
    parts: list[nn.Module] = [nn.Flatten()]
    estimator = model
    if isinstance(model, Pipeline):
        parts += [_scaler(step) for _, step in model.steps[:-1]]
        estimator = model.steps[-1][1]
    chain, output = _chain(estimator)
    made = Exported(nn.Sequential(*parts, *chain).eval(), output)
    _check(made, model, estimator, features)
    return made


def _scaler(step: Any) -> nn.Module:
    if step in ("passthrough", None):
        return nn.Identity()
    if hasattr(step, "data_min_"):  # MinMaxScaler
        return _Affine(step.scale_, step.min_)
    if hasattr(step, "scale_"):  # StandardScaler, MaxAbsScaler, RobustScaler
        centres = (getattr(step, name, None) for name in ("mean_", "center_"))
        centre = next((one for one in centres if one is not None), 0.0)
        scale = np.ones(step.n_features_in_) if step.scale_ is None else step.scale_
        return _Affine(1 / scale, -centre / scale)
    raise ConfigError(
        f"the step {type(step).__name__} of the pipeline has no form as a matrix, so the model "
        "cannot be exported as a graph; use StandardScaler, MinMaxScaler, MaxAbsScaler or "
        "RobustScaler, or --to safetensors"
    )


def _chain(estimator: Any) -> tuple[list[nn.Module], Output]:
    if hasattr(estimator, "coefs_"):
        layers: list[nn.Module] = []
        last = len(estimator.coefs_) - 1
        for place, (weight, bias) in enumerate(
            zip(estimator.coefs_, estimator.intercepts_, strict=True)
        ):
            layers.append(_linear(weight.T, bias))
            if place < last:
                layers.append(_ACTIVATIONS[estimator.activation]())
        kind = estimator.out_activation_
        if kind == "identity":
            return layers, "number"
        return (layers, "logits") if kind == "softmax" else ([*layers, _TwoClasses()], "logits")
    if not hasattr(estimator, "coef_"):
        raise ConfigError(
            f"{type(estimator).__name__} has no coefficients, so no graph can be made of it; "
            "export it with --to safetensors"
        )
    coefficients = np.atleast_2d(estimator.coef_)
    line = _linear(coefficients, np.atleast_1d(estimator.intercept_))
    if not is_classifier(estimator):
        return [line], "number"
    pair: list[nn.Module] = [_TwoClasses()] if len(coefficients) == 1 else []
    if not hasattr(estimator, "predict_proba"):
        return [line, *pair], "scores"
    one_each = len(coefficients) > 1 and not _multinomial(estimator)
    return ([line, _Shares()], "probabilities") if one_each else ([line, *pair], "logits")


def _multinomial(estimator: Any) -> bool:
    """Whether many classes share one softmax, or each has a sigmoid of its own."""
    return getattr(estimator, "solver", "") not in ("", "liblinear")


def _linear(weight: Array, bias: Array) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        made.weight.copy_(_real(weight))
        made.bias.copy_(_real(np.broadcast_to(bias, weight.shape[:1])))
    return made


def _real(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, np.float32))


def _check(made: Exported, model: Any, estimator: Any, features: int) -> None:
    """Try the module against the estimator, which may transform its outputs (an exponential)."""
    x = np.random.default_rng(0).normal(size=(16, features)).astype(np.float32)
    with torch.no_grad():
        found = made.module(torch.from_numpy(x))
    if made.output in ("logits", "probabilities"):
        shares = found.softmax(1) if made.output == "logits" else found
        wanted = model.predict_proba(x)
        same = np.allclose(shares.numpy(), wanted, atol=CLOSE)
    elif made.output == "scores":
        same = bool((estimator.classes_[found.argmax(1).numpy()] == model.predict(x)).all())
    else:
        wanted = np.asarray(model.predict(x)).reshape(found.shape)
        same = np.allclose(found.numpy(), wanted, rtol=CLOSE, atol=CLOSE * np.abs(wanted).max())
    if not same:
        raise ConfigError(
            f"{type(estimator).__name__} does more with its coefficients than multiply and add, "
            "so no graph can be made of it; export it with --to safetensors"
        )
