"""The nodes: train, train.custom, evaluate, query, two mods, and state that lasts."""

import os

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from task import data, step


def outer(message, context, call_next):
    """Counts the node's messages in its state, and marks the reply."""
    seen = context.state.config_records.setdefault("mod", ConfigRecord({"seen": 0}))
    seen["seen"] += 1
    reply = call_next(message, context)
    if reply.has_content():
        reply.content["mods"] = ConfigRecord({"order": "outer", "seen": seen["seen"]})
    return reply


def inner(message, context, call_next):
    """Changes what the function below gets; no other node may see it."""
    for record in message.content.config_records.values():
        record["touched"] = record.get("touched", 0) + 1
    context.run_config["touched"] = context.run_config.get("touched", 0) + 1
    return call_next(message, context)


app = ClientApp(mods=[outer, inner])


def partition(context):
    assert context.node_config["num-partitions"] == 4
    return int(context.node_config["partition-id"])


@app.train()
def train(message, context):
    touched = [record["touched"] for record in message.content.config_records.values()]
    assert all(count == 1 for count in touched), f"another node touched this config: {touched}"
    assert context.run_config["touched"] == 1
    w = message.content["arrays"]["w"].numpy()
    x, y = data(partition(context))
    visits = context.state.metric_records.setdefault("visits", MetricRecord({"train": 0}))
    visits["train"] += 1
    after = step(w, x, y, context.run_config["learning-rate"])
    message.content["arrays"]["w"] = Array(w * 0 - 1e6)
    content = RecordDict(
        {
            "arrays": ArrayRecord({"w": Array(after)}),
            "metrics": MetricRecord({"num-examples": len(y), "visits": visits["train"]}),
        }
    )
    return Message(content, reply_to=message)


@app.train("custom")
def custom(message, context):
    said = ConfigRecord({"action": "custom", "partition": partition(context)})
    return Message(RecordDict({"said": said}), reply_to=message)


@app.evaluate()
def evaluate(message, context):
    x, y = data(partition(context))
    loss = float(np_square(x @ message.content["arrays"]["w"].numpy() - y))
    metrics = MetricRecord({"num-examples": len(y), "loss": loss})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def np_square(error):
    return (error**2).mean()


@app.query()
def query(message, context):
    print("a node says something")
    visits = context.state.metric_records["visits"]["train"]
    said = ConfigRecord({"pid": os.getpid(), "visits": visits, "partition": partition(context)})
    return Message(RecordDict({"said": said}), reply_to=message)


@app.query("fail")
def fail(message, context):
    if partition(context) == 2:
        context.state["lost"] = ConfigRecord({"lost": True})
        raise LookupError("the shelf is empty")
    assert "lost" not in context.state
    return Message(RecordDict(), reply_to=message)
