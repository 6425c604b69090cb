"""A node's data between messages: one call, one split, within a bound of memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict

from umbel.clients.data.examples import Examples, Node, Split
from umbel.clients.holding import LEAST_KEPT, Holder, bytes_of
from umbel.core.errors import ConfigError


def node(partition: int) -> Node:
    return Node(partition, 10, {})


def ask(holder: Holder, at: int, state: RecordDict | None = None) -> Split:
    return holder.split(at, node(at), {}, lambda: 7 + at, RecordDict() if state is None else state)


class Data:
    """Splits a node's examples by whichever generator it is given."""

    def __init__(self, generator: Any) -> None:
        self.calls, self.generator = 0, generator

    def __call__(self, node: Node, options: Any) -> Split:  # noqa: ARG002
        self.calls += 1
        x = np.arange(1000.0)[:, None] + 1000 * node.partition
        order = self.generator().permutation(1000)
        whole = Examples(x, np.zeros(1000))
        return Split(whole.take(order[:800]), whole.take(order[800:]))


def test_data_are_asked_for_once() -> None:
    data = Data(np.random.default_rng)
    holder, states = Holder(data), [RecordDict() for _ in range(10)]
    for _ in range(4):
        for at in range(10):
            split = ask(holder, at, states[at])
            assert not set(split.train.x[:, 0]) & set(split.test.x[:, 0])
    assert data.calls == 10


def test_a_split_by_the_global_generator_is_the_same_in_every_process() -> None:
    """Two holders are two processes; what they drew before makes no difference."""
    holders = [Holder(Data(lambda: np.random)) for _ in range(2)]
    np.random.random(3)
    one, other = (ask(holder, 3) for holder in holders)
    assert np.array_equal(one.test.x, other.test.x)
    assert not np.array_equal(one.test.x - 3000, ask(holders[0], 4).test.x - 4000)


def test_a_split_that_changed_between_processes_is_not_trained_on() -> None:
    state = RecordDict()
    ask(Holder(Data(np.random.default_rng)), 3, state)
    with pytest.raises(ConfigError, match=r"gave node 3 another split than before.*seed the split"):
        ask(Holder(Data(np.random.default_rng)), 3, state)
    fixed = RecordDict()
    for _ in range(2):
        ask(Holder(Data(lambda: np.random.default_rng(5))), 3, fixed)


TENSORS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "sparse": lambda x: x.to_sparse(),
    "sparse by rows": lambda x: x.to_sparse_csr(),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "complex": lambda x: torch.complex(x, x).conj(),
    "with gradients": lambda x: x.requires_grad_(),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_of_every_kind_are_kept_and_told_apart(kind: str) -> None:
    def data(_: Node, options: Any) -> Split:
        x = TENSORS[kind](torch.arange(40.0).reshape(10, 4) + options["more"])
        y = torch.zeros(10, dtype=torch.int64)
        return Split(Examples(x, y), Examples(x, y))

    holder, state = Holder(data, most_bytes=0), RecordDict()

    def asked(more: float, key: str) -> Split:
        return holder.split(key, Node(1, 2, {}), {"more": more}, lambda: 0, state)

    first = asked(0.0, "a")
    assert 0 < bytes_of(first.train) < 2000
    assert asked(0.0, "b") is not first, "called again, with the same examples"
    with pytest.raises(ConfigError, match="another split than before"):
        asked(1.0, "c")


def test_no_more_is_kept_than_there_is_room_for() -> None:
    data = Data(lambda: np.random.default_rng(5))
    size = bytes_of(ask(Holder(data), 0).train) + bytes_of(ask(Holder(data), 0).test)
    assert size == 16_000
    data.calls = 0
    holder = Holder(data, most_bytes=6 * size)
    for _ in range(2):
        for at in range(8):
            ask(holder, at)
    assert data.calls == 16  # the least recently asked went first
    small = Holder(data, most_bytes=1)
    data.calls = 0
    for _ in range(2):
        for at in range(LEAST_KEPT):
            ask(small, at)
    assert data.calls == LEAST_KEPT
