# ruff: noqa: ARG001
"""Nodes that die, hang, leave and return nonsense when they are told to."""

import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
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


@app.query("draw")
def draw(message, context):
    """One number from each global generator; then one node spoils them for whoever comes next."""
    drawn = [np.random.rand(), random.random(), float(torch.rand(1)), np.random.randn()]
    if context.node_config["partition-id"] == 0:
        np.random.seed(0)
        random.seed(0)
        torch.manual_seed(0)
    said = MetricRecord({"drawn": drawn})
    return Message(RecordDict({"said": said}), reply_to=message)


@app.query("wait")
def wait(message, context):
    """Leaves a mark; partition 3 then waits until a file is there."""
    place = Path(message.content["orders"]["place"])
    partition = context.node_config["partition-id"]
    (place / f"began-{partition}").touch()
    if partition == 3:
        while not (place / "go").exists():
            time.sleep(0.01)
    return Message(RecordDict(), reply_to=message)


@app.query("pool")
def pool(message, context):
    """Squares, in processes that are forked from this one and ended by it."""
    with multiprocessing.get_context("fork").Pool(2) as processes:
        said = ConfigRecord({"squares": processes.map(square, [1, 2, 3])})
    return Message(RecordDict({"said": said}), reply_to=message)


def square(number):
    return number * number


@server.main()
def ask_for_pools(grid, context):
    for _ in range(3):
        messages = [Message(RecordDict(), node, "query.pool") for node in grid.get_node_ids()]
        for reply in grid.send_and_receive(messages):
            print(list(reply.content["said"]["squares"]), flush=True)
