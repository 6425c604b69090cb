"""Names that both sides of a federation's messages use, and which buffers travel."""

from umbel.strategies.records import Tree

MODEL = "model"
"""Name of the request's ArrayRecord."""
PARAMETERS = "parameters"
"""In that record: the model's parameters as one flat vector."""
CONFIG = "umbel"
"""Name of the request's ConfigRecord: round, manifest, learning rate, what the layers publish."""
HELLO = "umbel_hello"
"""The query by which a node says which partition it holds."""


def averaged_buffers(buffers: Tree, policy: str) -> Tree:
    """The buffers that travel: with `mean`, those of floating point; with `local`, none.

    Integer buffers (counters) have no mean and always stay where they are.
    """
    if policy != "mean":
        return {}
    return {name: tensor for name, tensor in buffers.items() if tensor.is_floating_point()}


def local_buffers(buffers: Tree, policy: str) -> Tree:
    """The buffers that stay on the node."""
    travelling = averaged_buffers(buffers, policy)
    return {name: tensor for name, tensor in buffers.items() if name not in travelling}
