"""What a run's model started from: written down when a run begins, and each time it goes on.

`config.json` has a list `provenance`, one object a start: the round after which it began, and the
SHA-256 of the model as it was then. The first is the model that the app began with; each later one
is what a checkpoint held. A certificate repeats the list, so a model cannot be passed off as having
been trained from another one.
"""

import hashlib
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from umbel.core.records import Manifest
from umbel.server import checkpoint
from umbel.server.output.rundir import RunDirectory
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.layout import averaged_buffers


def model_digest(parameters: Tensor, buffers: Tensor) -> str:
    """SHA-256 of a model as flat vectors of shape (size,), in the order of its manifest."""
    total = hashlib.sha256()
    for vector in (parameters, buffers):
        array = vector.detach().cpu().contiguous()
        total.update(f"{array.dtype} {array.numel()}\n".encode())
        total.update(array.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def record_start(run: RunDirectory, job: TrainingSpec) -> Mapping[str, Any]:
    """Write down what this start of a run begins from, and return it: `round`, `model`, `time`."""
    position = checkpoint.load(run.checkpoint_path)
    if position is not None:
        number, digest = position.round, model_digest(position.parameters, position.buffers)
    else:
        averaged = averaged_buffers(job.buffers, job.options.buffers)
        synced_buffers = Manifest.of(averaged)
        buffers = (
            synced_buffers.flatten(averaged) if synced_buffers.size else checkpoint.no_buffers()
        )
        flat = Manifest.of(job.parameters).flatten(job.parameters)
        number, digest = 0, model_digest(flat, buffers)
    time = datetime.now(UTC).isoformat(timespec="seconds")
    start = {"round": number, "model": digest, "time": time}
    config = run.config()
    run.write_config({**config, "provenance": [*config.get("provenance", []), start]})
    return start
