"""Flower's own strategy, then a loop of the app's own with other kinds of messages."""

import json
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


def ask(grid, kind, nodes=None):
    nodes = list(grid.get_node_ids()) if nodes is None else nodes
    content = RecordDict({"config": ConfigRecord({"touched": 0})})
    return [Message(content, node, kind) for node in nodes]


def pulled(grid, ids):
    replies, left = [], set(ids)
    while left:
        new = list(grid.pull_messages(left))
        left -= {reply.metadata.reply_to_message_id for reply in new}
        replies += new
    return replies


@app.main()
def main(grid, context):
    strategy = FedAvg(min_train_nodes=4, min_evaluate_nodes=4, min_available_nodes=4)
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord({"w": Array(np.zeros(4, np.float32))}),
        num_rounds=context.run_config["num-server-rounds"],
    )
    custom = grid.send_and_receive(ask(grid, "train.custom"))
    ids = list(grid.push_messages(ask(grid, "query")))
    queries = pulled(grid, ids)
    failures = list(grid.send_and_receive(ask(grid, "query.fail")))
    again = list(grid.send_and_receive(ask(grid, "query.fail")))
    unknown = list(grid.send_and_receive(ask(grid, "query.unheard_of")))
    said = {
        "w": result.arrays["w"].numpy().tolist(),
        "visits": result.train_metrics_clientapp[2]["visits"],
        "evaluated": sorted(result.evaluate_metrics_clientapp),
        "custom": sorted(dict(m.content["said"])["partition"] for m in custom),
        "mods": sorted(dict(m.content["mods"])["seen"] for m in custom),
        "queries": sorted((dict(m.content["said"]) for m in queries), key=lambda s: s["partition"]),
        "errors": [m.error.reason for m in failures if m.has_error()],
        "errors-again": [m.error.reason for m in again if m.has_error()],
        "unknown": [m.error.reason for m in unknown if m.has_error()],
    }
    if context.run_config["out"]:
        Path(context.run_config["out"]).write_text(json.dumps(said))
