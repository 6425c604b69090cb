"""server_fn with a strategy of flwr.server."""

from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def mean(rows):
    total = sum(count for count, _ in rows)
    return {"distance": sum(count * said["distance"] for count, said in rows) / total}


def server_fn(context):
    strategy = FedAvg(evaluate_metrics_aggregation_fn=mean)
    config = ServerConfig(num_rounds=int(context.run_config["num-server-rounds"]))
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
