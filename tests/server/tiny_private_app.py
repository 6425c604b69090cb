"""An app small enough for tests: every node asks for the same step, some nodes misbehave.

Which nodes do what is an option, `bad`, such as "3:nan 4:huge".
"""

from pathlib import Path

TASK = '''
import torch
from umbel.clients.trainers.base import Evaluated, Trained, Weights
from umbel.federation import Federation

SIZE = 64

class Step:
    """Each node moves every parameter by its own fixed amount; the loss is the distance to 1."""

    OPTIONS = {"learning-rate": 0.1}

    def initial(self, options, seed):
        return Weights({"w": torch.zeros(SIZE)}, {"count": torch.zeros(1, dtype=torch.int64)})

    def train(self, weights, examples, job):
        after = {"w": weights.parameters["w"] + float(examples[0])}
        count = {"count": weights.buffers["count"] + 1}
        return Trained(Weights(after, count), len(examples), {"loss": 0.5})

    def evaluate(self, weights, examples, options):
        w = weights.parameters["w"]
        return Evaluated(1, {"loss": float((w - 1).square().mean()), "mean": float(w.mean())})

def data(node, options):
    return [float(options["step"])]

federation = Federation(
    name="tiny",
    trainer=Step(),
    data=data,
    test=lambda options: [0.0],
    options={"step": 0.01, "bad": "", "rounds": 3},
)
'''

CLIENT = """
import os, signal
import numpy as np
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict, Message
from flwr.clientapp import ClientApp
from task import federation
from umbel.core.records import from_array, to_array

honest = federation.client_app()
app = ClientApp()

def tampered(kind, reply, message):
    record = reply.content.array_records["update"]
    update = from_array(record["update"]).clone()
    if kind == "nan": update[0] = float("nan")
    if kind == "inf": update[0] = float("inf")
    if kind == "huge": update = torch.full_like(update, 1e30)
    if kind == "long": update = update * 100
    if kind == "off-grid": update = update + 1e-9
    if kind == "integers": update = update.to(torch.int64)
    if kind == "double": update = update.to(torch.float64)
    if kind == "short": update = update[:-1]
    if kind == "zero": update = torch.zeros_like(update)
    arrays = {"update": to_array(update)}
    if kind == "missing": arrays = {"other": to_array(update)}
    if kind == "extra": arrays["extra"] = to_array(torch.full((64,), 1e30))
    metrics = MetricRecord({"num-examples": 1_000_000, "loss": 123.0})
    content = RecordDict({"update": ArrayRecord(arrays), "metrics": metrics})
    return Message(content, reply_to=message)

@app.train()
def train(message, context):
    reply = honest(message, context)
    partition = str(context.node_config["partition-id"])
    kinds = dict(item.split(":") for item in str(context.run_config["bad"]).split())
    kind = kinds.get(partition)
    if kind == "raise": raise RuntimeError("this node broke")
    if kind == "kill": os.kill(os.getpid(), signal.SIGKILL)
    return reply if kind is None else tampered(kind, reply, message)

@app.evaluate()
def evaluate(message, context):
    return honest(message, context)
"""

PYPROJECT = """
[project]
name = "tiny"
version = "1.0.0"

[tool.flwr.app]
publisher = "umbel"

[tool.flwr.app.components]
serverapp = "server_app:app"
clientapp = "client_app:app"

[tool.flwr.app.config]
seed = 0

[tool.umbel]
nodes = 20
"""


def write_app(folder: Path) -> Path:
    """Make the app in `folder`."""
    folder.mkdir(parents=True)
    (folder / "task.py").write_text(TASK)
    (folder / "client_app.py").write_text(CLIENT)
    (folder / "server_app.py").write_text(
        "from task import federation\n\napp = federation.server_app()\n"
    )
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder
