# ruff: noqa: ARG001
"""Nodes that die, hang, leave and return nonsense when they are told to."""

import os
import signal
import sys
import threading

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
app = ClientApp()


@app.train()
def train(message, context):
    partition = context.node_config["partition-id"]
    orders = message.content["orders"]
    visits = context.state.metric_records.setdefault("visits", MetricRecord({"n": 0}))
    visits["n"] += 1
    if partition in orders.get("die", []):
        os.kill(os.getpid(), signal.SIGKILL)
    if partition in orders.get("hang", []):
        threading.Event().wait()
    if partition in orders.get("leave", []):
        sys.exit("enough")
    if partition in orders.get("nonsense", []):
        return 42
    if partition in orders.get("nothing", []):
        return None
    said = ConfigRecord({"pid": os.getpid(), "partition": partition, "visits": visits["n"]})
    big = Array(np.full(orders.get("size", 1), partition, np.float32))
    return Message(RecordDict({"said": said, "big": ArrayRecord({"a": big})}), reply_to=message)


@app.query("blas")
def blas(message, context):
    """A product whose last bits depend on the number of threads that it is split over."""
    values = np.random.default_rng(5).normal(size=(2, 900, 900))
    said = ConfigRecord({"bits": (values[0] @ values[1]).tobytes()})
    return Message(RecordDict({"said": said}), reply_to=message)
