"""Names that both sides of a federation's messages use.

request    record MODEL    PARAMETERS, BUFFERS, PUBLIC + name, MEMBERS
           record CONFIG   round, manifest, learning rate, what the layers publish, QUESTION
reply      record UPDATE   UPDATE, BUFFERS
           record METRICS  what the node measured, EXAMPLES; COUNTED beside it
"""

MODEL = "model"
"""Name of the request's ArrayRecord."""
PARAMETERS = "parameters"
"""In that record: the model's parameters as one flat vector."""
CONFIG = "umbel"
"""Name of the request's ConfigRecord: round, manifest, learning rate, what the layers publish."""

UPDATE = "update"
"""Name of the reply's ArrayRecord, and in it of the flat update."""
BUFFERS = "buffers"
"""In the same record: the node's floating-point buffers as one flat vector, where they travel."""
METRICS = "metrics"
"""Name of the reply's MetricRecord."""
COUNTED = "counted"
"""Beside it, where some metrics are of fewer examples than others: of how many each is."""
EXAMPLES = "num-examples"
"""In the metrics: how many examples the update was made from (Flower's own key)."""

HELLO = "umbel_hello"
"""The query by which a node says which partition it holds."""
STATISTICS = "umbel_statistics"
"""The query for the running statistics that a node keeps."""
ASK = "umbel_ask"
"""The query by which one node is asked for its vector of a private mean."""
QUESTION = "question"
"""In the config: the private mean that is asked; absent in training."""
PUBLIC = "public."
"""Before the names of what private means have released, in the request's model record."""
POOL = "umbel_pool"
"""The query by which a process is asked for the sum of several nodes' updates."""
MEMBERS = "members"
"""In a pool's request: partitions of the nodes that answer, shape (n,), int64."""

NO_REPLY = "no reply in time"
"""Why a node that said nothing is not in the sum."""
