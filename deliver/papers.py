"""README.md and MODEL_CARD.md of a delivered model."""

from collections.abc import Mapping, Sequence
from typing import Any

from umbel.clients.data.inputs import Inputs
from umbel.deliver.parcel import Step
from umbel.deliver.signature import Signature
from umbel.server.private.model_card import stated

_LOADING: Mapping[str, str] = {
    "onnx": """import onnxruntime
session = onnxruntime.InferenceSession("{file}")
outputs = session.run(None, {{"x": x}})[0]""",
    "torch-export": """import torch
model = torch.export.load("{file}").module()
outputs = model(torch.from_numpy(x))""",
    "safetensors": """from safetensors.numpy import load_file
tensors = load_file("{file}")
print({{name: value.shape for name, value in tensors.items()}})""",
    "keras": """import keras
model = keras.saving.load_model("{file}")
outputs = model.predict(x)""",
}


def readme(
    signature: Signature | None, form: str, file: str, difference: float | None, checked: str
) -> str:
    """The text of README.md.

    Args:
        signature: of the model; None where only its tensors are delivered.
        form: the format.
        file: the model's.
        difference: the largest from the original's outputs.
        checked: on what that was measured.
    """
    name = signature.name if signature is not None else "the model"
    parts = [f"# {name}, as {form}", f"```python\n{_LOADING[form].format(file=file)}\n```"]
    if signature is not None:
        parts += [
            _input_text(signature.inputs),
            _output_text(signature),
            "Or without a line of code, from photographs, tables or other files:\n\n"
            "```\numbel predict . INPUT\numbel predict . --listen 127.0.0.1:8000\n```",
        ]
    if difference is not None:
        parts.append(f"Largest difference from the trained model: {difference:.2g}, {checked}.")
    parts.append(
        "`MODEL_CARD.md` says what the model is for. `umbel verify .` checks every file, and "
        "computes the privacy claims again."
    )
    return "\n\n".join(parts) + "\n"


def _input_text(inputs: Inputs) -> str:
    shape = " x ".join(map(str, ("n", *inputs.shape)))
    return (
        f"`x` is an array of {inputs.model_dtype}, {shape}. `preprocessing` in `signature.json` "
        f"says how it is made ({inputs.KIND}); in Python: "
        "`umbel.deliver.signature.Signature.read(FOLDER).inputs.ready(...)`."
    )


_OUTPUTS: Mapping[str, str] = {
    "logits": "one number a class; the softmax of them is the shares",
    "logit": "one number; its sigmoid is the share of class 1",
    "probabilities": "the share of each class",
    "scores": "one number a class; the largest is the class",
    "number": "the value",
    "raw": "what the app's own loss takes",
}


def _output_text(signature: Signature) -> str:
    text = f"The output is {_OUTPUTS[signature.output]}."
    if signature.labels:
        text += f" Classes: {', '.join(signature.labels)}."
    return text


def card(
    original: str | None,
    config: Mapping[str, Any],
    steps: Sequence[Step],
    metrics: Mapping[str, float],
    claims: str,
) -> str:
    """The text of MODEL_CARD.md: the run's own card where it has one, and what came after.

    Args:
        original: the certified card.
        config: of the run.
        steps: that led from the run's model to this file.
        metrics: of this file.
        claims: one sentence on what holds of the run's promise.
    """
    text = original if original is not None else _plain_card(config)
    listed = "\n".join(f"- {step.said()}" for step in steps)
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items()))
    parts = [text.rstrip(), "## This file", listed, claims]
    if rows:
        parts.append(
            f"Measured on the coordinator's held-out examples:\n\n| metric | value |\n"
            f"|---|---|\n{rows}"
        )
    return "\n\n".join(parts) + "\n"


def _plain_card(config: Mapping[str, Any]) -> str:
    told = stated(config)
    return "\n\n".join(
        [
            f"# Model card: {config.get('app', 'a federation')}",
            "Trained by federated learning in Umbel, without a promise of privacy.",
            "## Intended use",
            told["intended-use"],
            f"Not intended for: {told['not-intended-use']}.",
            "## Data and their origin",
            f"What: {told['data']}. Origin: {told['origin']}.",
            "## Limits",
            told["limits"],
            "## Contact and licence",
            f"Contact: {told['contact']}. Licence: {told['licence']}.",
        ]
    )
