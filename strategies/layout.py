"""Which buffers travel beside updates."""

from umbel.core.names import CONFIG as CONFIG
from umbel.core.names import HELLO as HELLO
from umbel.core.names import MODEL as MODEL
from umbel.core.names import PARAMETERS as PARAMETERS
from umbel.core.names import STATISTICS as STATISTICS
from umbel.core.records import Tree
from umbel.strategies.exchange import Seals
from umbel.strategies.stack import Stack


def averaged_buffers(buffers: Tree, policy: str) -> Tree:
    """The buffers that travel: with `mean`, those of real and complex numbers; else none.

    Integer buffers (counters) have no mean and always stay where they are.
    """
    if policy != "mean":
        return {}
    return {
        n: value
        for n, value in buffers.items()
        if value.dtype.is_floating_point or value.is_complex()
    }


def local_buffers(buffers: Tree, policy: str) -> Tree:
    """The buffers that stay on the node."""
    synced_buffers = averaged_buffers(buffers, policy)
    return {name: tensor for name, tensor in buffers.items() if name not in synced_buffers}


def shows_statistics(stack: Stack, policy: str) -> bool:
    """Whether nodes show their running statistics to the server, for the model it delivers.

    They do with `local`, where the server sees their updates as well: never beside a privacy
    claim, nor where updates are sealed.
    """
    return policy == "local" and not stack.private and not isinstance(stack.collect, Seals)
