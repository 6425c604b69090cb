"""The folder in which a model leaves: its file, what it takes, its card, and where it comes from.

    FOLDER/
        model.onnx         or model.pt2, model.safetensors, ...
        signature.json     inputs, preprocessing, outputs, labels
        README.md          how to load it in three lines
        MODEL_CARD.md      the run's card, and what was done to the model since
        delivery.json      the run, the app, every step since, SHA-256 of all files; signed by the
                           coordinator of the run where this machine is that
        claims/            certificate.json, MODEL_CARD.md and model.safetensors as certified

`claims/` holds what is public of a certified run: not its ledger, which names nodes.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError
from umbel.core.files import sha256

FILE = "delivery.json"
CLAIMS = "claims"
FORMAT = 1

STEPS: Mapping[str, str] = {
    "export": "written in another format; no data were used",
    "quantize-dynamic": "weights rounded to 8 bits; no data were used",
    "quantize-static": "weights and activations rounded to 8 bits, with scales from examples",
    "prune": "the smallest weights set to zero; no data were used",
    "prune-units": "the weakest units removed; no data were used",
    "low-rank": "matrices replaced by products of two smaller ones; no data were used",
    "fine-tune": "trained further with its zeros kept",
    "distil": "a smaller model, trained to give what this one gives",
}
"""What can be done to a model after its run."""


@dataclass(frozen=True)
class Step:
    """Something that was done to a model after its run.

    Attributes:
        what: a key of `STEPS`.
        data: what it saw: "none", "held-out" (the coordinator's own examples), "public" (a file of
            the operator's), "synthetic" or "federated" (the nodes' own examples).
        details: numbers and names, for the card.
    """

    what: str
    data: str = "none"
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def private(self) -> bool:
        """Whether it saw the nodes' data again, so that it is charged and no post-processing."""
        return self.data == "federated"

    def to_json(self) -> dict[str, Any]:
        """As it stands in `delivery.json`."""
        return {"what": self.what, "data": self.data, **dict(self.details)}

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> "Step":
        """What `to_json` gave."""
        rest = {name: v for name, v in value.items() if name not in ("what", "data")}
        return cls(str(value["what"]), str(value["data"]), rest)

    def said(self) -> str:
        """One line for a card."""
        numbers = ", ".join(f"{name} {value}" for name, value in self.details.items())
        line = f"{self.what}: {STEPS[self.what]}"
        if self.data != "none":
            line += f"; examples: {self.data}"
        return f"{line} ({numbers})" if numbers else line


def fresh_folder(path: Path, *, replace: bool = False) -> Path:
    """A new folder; one that an earlier delivery made may be replaced.

    Raises:
        ConfigError: it holds something else, or cannot be made.
    """
    try:
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path} is a file; name a folder with --out")
        if path.is_dir() and any(path.iterdir()):
            if not (replace or (path / FILE).is_file()):
                raise ConfigError(
                    f"{path} holds other files; name a new or an empty folder with --out"
                )
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}); name another folder with --out"
        ) from error
    return path


def is_parcel(path: Path) -> bool:
    """Whether a folder is one that was delivered."""
    return (path / FILE).is_file()


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder but `delivery.json` and hidden ones, by relative path."""
    return {
        str(file.relative_to(folder)): sha256(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != FILE and not file.name.startswith(".")
    }


def read_parcel(folder: Path) -> dict[str, Any]:
    """`delivery.json` of a folder.

    Raises:
        ConfigError: there is none, or it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(
            f"{folder} is no delivered model (no {FILE} in it); make one with: umbel export RUN"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        steps = [Step.of(step) for step in found["steps"]]
        if found["format"] != FORMAT or not isinstance(found["files"], dict):
            raise ValueError("of another version")
        if unknown := [step.what for step in steps if step.what not in STEPS]:
            raise ValueError(f"unknown step {unknown[0]!r}")
        str(found["file"]), str(found["form"]), str(found["run"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error!r}); make the folder again with: umbel export RUN"
        ) from error
    return dict(found)


def steps_of(delivery: Mapping[str, Any]) -> list[Step]:
    """The steps that a delivery lists."""
    return [Step.of(step) for step in delivery["steps"]]


def described(
    *,
    name: str,
    form: str,
    file: str,
    steps: Sequence[Step],
    config: Mapping[str, Any],
    run: Path,
    model: str,
    metrics: Mapping[str, float],
    difference: float | None,
) -> dict[str, Any]:
    """What `delivery.json` says, before its files are counted and it is signed.

    Args:
        name: of the model.
        form: such as "onnx".
        file: the model's.
        steps: that led to it, in order.
        config: of the run.
        run: its directory.
        model: SHA-256 of the run's `model.safetensors`.
        metrics: of this file on the held-out examples.
        difference: the largest between its outputs and the original's; None where not measured.
    """
    return {
        "format": FORMAT,
        "name": name,
        "form": form,
        "file": file,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": run.name,
        "app": config.get("app"),
        "app_digest": config.get("app_hash"),
        "model": model,
        "steps": [step.to_json() for step in steps],
        "metrics": dict(metrics),
        "difference": difference,
    }
