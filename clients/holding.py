"""A node's examples between messages: asked for once, kept while there is room.

A `data` function that splits without a fixed seed would hand out another split at every call, so
that what a node tested on in one round is trained on in the next. Therefore it is called

    once a node and process, while the splits together fit into `MOST_BYTES`,
    with NumPy's, Python's and PyTorch's global generators seeded for the node,

and where it is called again nevertheless (no room, another process) and its test examples are
others than before, the node says so and does not train.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict
from torch import Tensor

from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.seeding import seeded
from umbel.clients.trainers.base import Options
from umbel.core.contents import find_record
from umbel.core.errors import ConfigError

MOST_BYTES = 1 << 29
"""Examples that a process keeps."""
LEAST_KEPT = 4
"""Nodes whose examples are kept however large they are."""
SEEN = "umbel.data"
"""The node's own record of which examples it had."""
LOOKED_AT = 16
"""Rows of an array that its digest is of."""


@runtime_checkable
class SaysFixed(Protocol):
    """A `data` function that says whether a node's examples can change during a run."""

    FIXED: bool
    """They cannot: the same options give the same examples, whoever asks and when."""


def is_fixed(data: object) -> bool:
    """Whether a node's examples stay as they are, by what their function says of itself."""
    return isinstance(data, SaysFixed) and data.FIXED


class Holder:
    """Calls a `data` function and keeps what it gave.

    Args:
        data: a node and the run's options to its examples; one with a true attribute `FIXED`
            gives the same at every call.
        most_bytes: how much is kept.
    """

    def __init__(self, data: Callable[[Node, Options], Any], most_bytes: int = MOST_BYTES) -> None:
        self.data, self.most_bytes = data, most_bytes
        self._kept: OrderedDict[Hashable, tuple[Split, int]] = OrderedDict()
        self._bytes = 0

    def split(
        self,
        key: Hashable,
        node: Node,
        options: Options,
        seed: Callable[[], int],
        state: RecordDict,
    ) -> Split:
        """The node's examples.

        Args:
            key: tells nodes and options apart.
            node: who asks.
            options: of the run, complete.
            seed: gives that of the node, the same in every process and at every call.
            state: the node's own records, which go with it from process to process.

        Raises:
            ConfigError: the node's test examples are others than they were.
        """
        kept = self._kept.get(key)
        if kept is not None:
            self._kept.move_to_end(key)
            return kept[0]
        with seeded(seed()):
            found = self.data(node, options)
        split = found if isinstance(found, Split) else Split(found)
        if split.test is not None and not is_fixed(self.data):
            _compare(split, node, state)
        self._keep(key, split)
        return split

    def _keep(self, key: Hashable, split: Split) -> None:
        size = bytes_of(split.train) + bytes_of(split.test)
        self._kept[key] = split, size
        self._bytes += size
        while self._bytes > self.most_bytes and len(self._kept) > LEAST_KEPT:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_bytes": 0}


def _compare(split: Split, node: Node, state: RecordDict) -> None:
    digest = hashlib.sha256(digest_of(split.train) + digest_of(split.test)).hexdigest()[:16]
    before = find_record(state, SEEN, ConfigRecord)
    if before is None:
        state[SEEN] = ConfigRecord({"digest": digest})
    elif before["digest"] != digest:
        raise ConfigError(
            f"the function `data` gave node {node.partition} another split than before, so that "
            "test examples would be trained on; seed the split, as in "
            "np.random.default_rng(node.partition)"
        )


def digest_of(examples: Any) -> bytes:
    """What examples are: their number and kind, and some of their rows."""
    total = hashlib.sha256(str(len(examples) if hasattr(examples, "__len__") else "").encode())
    for array in _arrays(examples):
        total.update(f"{tuple(array.shape)} {array.dtype}".encode())
        rows = np.unique(np.linspace(0, max(0, len(array) - 1), LOOKED_AT, dtype=np.int64))
        for row in rows if len(array) else ():
            value = array[int(row)]
            if isinstance(value, Tensor):  # some of its types NumPy does not have
                value = value.detach().cpu().to_dense().resolve_conj().reshape(-1)
                value = value.view(torch.uint8).numpy()
            total.update(np.ascontiguousarray(value).tobytes())
    return total.digest()


def bytes_of(examples: Any) -> int:
    """Memory that examples take; what is mapped from a file takes none of its own."""
    return sum(map(_size, _arrays(examples)))


def _size(array: Any) -> int:
    if isinstance(array, np.memmap):
        return 0
    if isinstance(array, Tensor) and array.layout is not torch.strided:
        return array._nnz() * (array.element_size() + 8 * array.dim())  # values, and where each is
    return int(array.nbytes)


def _arrays(examples: Any) -> list[Any]:
    """The arrays and tensors that examples are made of, as far as they can be seen."""
    if isinstance(examples, tuple | list):
        parts = list(examples[:64])
    elif isinstance(examples, Examples):
        parts = [examples.x, examples.y]
    elif isinstance(examples, Mapping):
        parts = list(examples.values())
    else:
        parts = list(getattr(examples, "tensors", ()))
    return [part for part in parts if isinstance(part, Tensor | np.ndarray) and part.ndim]
