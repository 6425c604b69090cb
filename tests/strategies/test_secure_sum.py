"""SecureSum in a federation: the same model as a plain sum, on the engine that everybody starts."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from umbel.clients.data.examples import Node
from umbel.clients.trainers.function import FunctionTrainer
from umbel.core.errors import StackError
from umbel.federation import Federation
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.rounds import Rounds
from umbel.server.training_spec import Outcome
from umbel.strategies.collect import PlainSum
from umbel.strategies.private.clip import Clip
from umbel.strategies.secure.identity import check_fresh, keep_session, spend, take_session
from umbel.strategies.secure.node import EXTERNAL_SESSION, SPENT
from umbel.strategies.secure.policy import RefusalError
from umbel.strategies.secure.quantize import Quantize
from umbel.strategies.secure.rotate import Rotate
from umbel.strategies.secure.secure_sum import SecureSum, modulus_bits, to_words
from umbel.strategies.secure.wire import SECURE
from umbel.strategies.stack import Stack
from umbel.strategies.transform import Facts

SIZE = 50


def train(arrays: dict[str, Any], examples: Any, job: Any) -> Any:
    """Every node moves the model by its own vector, the same on every engine."""
    if examples < 0:
        raise RuntimeError("this node's disk is on fire")
    noise = np.random.default_rng([int(examples), job.round]).normal(0, 0.1, SIZE)
    return {"slope": arrays["slope"] + noise}, int(examples), {"loss": 4.25}


def initial(options: Any) -> dict[str, Any]:  # noqa: ARG001
    return {"slope": np.zeros(SIZE, "f4")}


TRAINER = FunctionTrainer(initial, train)


class Wire(EmbeddedGrid):
    """The embedded engine, with a wire to listen to."""

    def __init__(self, app: ClientApp, nodes: int) -> None:
        super().__init__(app, nodes, run_config={"seed": 0})
        self.sent: list[Message] = []
        self.heard: list[Message] = []

    def stream(self, messages: Any, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        self.sent += messages
        for reply in super().stream(messages, timeout):
            self.heard.append(reply)
            yield reply


def federate(
    folder: Path, stack: Stack, nodes: int = 6, rounds: int = 3, broken: tuple[int, ...] = ()
) -> tuple[Outcome, Wire, list[Mapping[str, Any]]]:
    def data(node: Node, options: Any) -> int:  # noqa: ARG001
        return -1 if node.partition in broken else node.partition + 1

    federation = Federation(TRAINER, data, stack=stack)
    grid = Wire(federation.client_app(), nodes)
    options = federation.complete({"rounds": rounds, "client-eval-every": -1})
    job = federation.job(options)
    out = folder / f"run-{stack.collect.name}-{len(stack.layers)}"
    run = RunDirectory.create(None, "test", {"options": options}, out=out)
    outcome = Rounds(job, grid, grid.roster(), run, SilentProgress()).fit()
    return outcome, grid, list(run.rounds())


def layers(*more: Any) -> tuple[Any, ...]:
    return (Clip(1.0), *more, Quantize(levels=1 << 10))


@pytest.mark.parametrize("nodes", [3, 6, 11])
def test_the_model_is_that_of_a_plain_sum_bit_for_bit(tmp_path: Path, nodes: int) -> None:
    secure, grid, lines = federate(tmp_path, Stack(layers(), SecureSum()), nodes)
    plain, _, _ = federate(tmp_path, Stack(layers(), PlainSum(weighting="equal")), nodes)
    assert torch.equal(secure.parameters["slope"], plain.parameters["slope"])
    assert float(secure.parameters["slope"].abs().sum()) > 0
    assert len(grid.heard) == nodes * 3 * 5  # three rounds of five trips
    assert all(line["clients"] == nodes for line in lines)


def test_rotation_gives_the_same_model_to_the_grid_s_precision(tmp_path: Path) -> None:
    rotated, _, _ = federate(tmp_path, Stack(layers(Rotate()), SecureSum()))
    plain, _, _ = federate(tmp_path, Stack((), PlainSum(weighting="equal")))
    error = (rotated.parameters["slope"] - plain.parameters["slope"]).abs().max()
    assert float(error) < 3e-3


def test_nothing_but_masked_integers_and_keys_leaves_a_node(tmp_path: Path) -> None:
    """No update, metric or number of examples in any reply, in any of its records (S8)."""
    _, grid, lines = federate(tmp_path, Stack(layers(), SecureSum()), rounds=1)
    for reply in grid.heard:
        assert list(reply.content) == [SECURE]
        record = reply.content.config_records[SECURE]
        assert not {"loss", "num-examples", "values"} & set(record)
        assert not any(isinstance(value, float | list) for value in record.values())
    assert lines[-1]["train"] == {}


def test_what_is_told_to_all_is_one_content_which_engines_encode_once(tmp_path: Path) -> None:
    _, grid, _ = federate(tmp_path, Stack(layers(), SecureSum()), nodes=6, rounds=1)
    contents: dict[str, set[int]] = {}
    for message in grid.sent:
        contents.setdefault(message.metadata.message_type, set()).add(id(message.content))
    # Only the sealed shares differ from node to node.
    assert [len(each) for each in contents.values()] == [1, 1, 6, 1, 1]


def test_a_node_that_fails_in_training_is_out_before_anything_depends_on_it(
    tmp_path: Path,
) -> None:
    _, grid, lines = federate(tmp_path, Stack(layers(), SecureSum()), 6, 1, broken=(2,))
    assert lines[-1]["clients"] == 5
    reason = lines[-1]["failed"][0]["reason"]
    assert re.search(r"AppError: RuntimeError in test_secure_sum.py, line \d+; its text", reason)
    assert "disk is on fire" not in str(lines)
    assert len(grid.heard) == 6 + 5 * 4


def test_a_round_below_the_floor_leaves_the_model_and_the_next_goes_on(tmp_path: Path) -> None:
    stack = Stack(layers(), SecureSum(min_cohort=6))
    with pytest.raises(Exception, match="given up"):
        federate(tmp_path, stack, 6, 5, broken=(1, 4))
    run = RunDirectory.open(tmp_path / "run-secure-sum-2")
    lines = [line for line in run.rounds() if line["round"]]
    assert [line["clients"] for line in lines] == [0, 0]


@pytest.mark.parametrize(
    ("stack", "cure"),
    [
        (Stack((), SecureSum()), "put Clip before it"),
        (Stack((Quantize(),), SecureSum()), "put Clip before it"),
        (Stack((Rotate(),), SecureSum()), "put Clip before it"),
        (Stack(layers(), SecureSum(min_cohort=20)), "lower min-cohort or take more nodes"),
    ],
)
def test_stacks_that_cannot_be_are_refused_before_any_message(
    tmp_path: Path, stack: Stack, cure: str
) -> None:
    with pytest.raises(StackError, match=cure):
        federate(tmp_path, stack, 4)


@pytest.mark.parametrize("value", [{"mode": "none"}, {"min_cohort": 1}])
def test_options_out_of_range(value: dict[str, Any]) -> None:
    with pytest.raises(StackError):
        SecureSum(**value)


def test_the_malicious_mode_needs_six_nodes() -> None:
    facts = Facts(size=4, l2_bound=1.0, grid=0.5, max_replies=5)
    with pytest.raises(StackError, match="mode=semi-honest"):
        SecureSum(mode="malicious").check(facts)


def test_the_modulus_has_room_for_every_sum_within_the_bound() -> None:
    """S12: Flower warns of an overflow and goes on."""
    facts = Facts(size=1000, l2_bound=1.0, grid=2.0**-12)
    for count in (1, 2, 10, 1000):
        bits = modulus_bits(facts, count)
        assert count * 2**12 < 2 ** (bits - 1) <= 2 * (count * 2**12 + 1)
    with pytest.raises(StackError, match="fewer levels"):
        modulus_bits(facts.replace(grid=2.0**-70), 10)


def test_an_update_off_the_grid_or_too_large_is_refused_by_its_own_node() -> None:
    assert to_words(torch.tensor([-0.5, 1.0]), 0.5, 8).tolist() == [255, 2]
    for bad in ([0.3], [float("nan")], [float("inf")], [64.0]):
        with pytest.raises(ValueError):
            to_words(torch.tensor(bad), 0.5, 8)


def test_a_server_that_asks_for_the_update_in_the_clear_gets_none(tmp_path: Path) -> None:
    """The node's stack says secure; a request without terms is refused, not obeyed."""
    _, grid, _ = federate(tmp_path, Stack(layers(), SecureSum()), rounds=1)
    request = grid.sent[0]
    content = RecordDict({k: v for k, v in request.content.items() if k != SECURE})
    plain = Message(content, request.metadata.dst_node_id, "train", group_id="9")
    reply = next(iter(grid.stream([plain])))
    assert list(reply.content) == [SECURE]
    assert "without a secure sum" in str(reply.content.config_records[SECURE]["refused"])


def test_a_session_that_is_offered_again_once_its_round_is_over_is_refused(tmp_path: Path) -> None:
    _, grid, _ = federate(tmp_path, Stack(layers(), SecureSum()), rounds=1)
    first = grid.sent[0]
    again = Message(first.content, first.metadata.dst_node_id, "train", group_id="9")
    reply = next(iter(grid.stream([again])))
    assert str(reply.content.config_records[SECURE]["refused"]).startswith("round")


def test_a_session_goes_where_its_node_keeps_sessions_and_leaves_nothing_else() -> None:
    """What a round leaves in a node's records would be written to its disk."""
    state = RecordDict({EXTERNAL_SESSION: ConfigRecord()})
    context = Context(run_id=1, node_id=1, node_config={}, state=state, run_config={})
    ticket = bytes(32)
    check_fresh(1, 1, ticket, context)
    keep_session({"ticket": ticket}, context)
    assert dict(state[EXTERNAL_SESSION]) == {"ticket": ticket}
    assert take_session(context) == {}
    del state[EXTERNAL_SESSION]
    assert not state
    # Without such a place the node keeps both itself.
    check_fresh(1, 1, ticket, context)
    with pytest.raises(RefusalError, match="replay"):
        check_fresh(1, 1, ticket, context)
    keep_session({"ticket": ticket}, context)
    assert take_session(context) == {"ticket": ticket}
    assert take_session(context) == {}


def test_a_round_is_given_once_and_rounds_only_go_up() -> None:
    """Two sums of one round, with and without a node, differ by exactly its update."""
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    check_fresh(1, 5, b"a" * 32, context)
    check_fresh(1, 5, b"b" * 32, context)  # of the first nothing left the node
    spend({"run": 1, "round": 5}, context)
    for round_ in (5, 4, 1):
        with pytest.raises(RefusalError, match="given its masked update of round 5"):
            check_fresh(1, round_, b"c" * 32, context)
    check_fresh(1, 6, b"c" * 32, context)
    check_fresh(2, 1, b"d" * 32, context)
    # What a node process keeps on its disk counts too, whatever the app remembers.
    state = RecordDict({EXTERNAL_SESSION: ConfigRecord(), SPENT: ConfigRecord({"round": 7})})
    fresh = Context(run_id=1, node_id=1, node_config={}, state=state, run_config={})
    with pytest.raises(RefusalError, match="of round 7"):
        check_fresh(1, 7, b"e" * 32, fresh)
    check_fresh(1, 8, b"e" * 32, fresh)


def test_another_model_or_setting_changes_the_session(tmp_path: Path) -> None:
    """The node hashes what it received, not what it is told that it received."""
    _, grid, _ = federate(tmp_path, Stack(layers(), SecureSum()), rounds=1)
    first = grid.sent[0].content
    new = {"nonce": b"0123456789abcdef", "round": 2}
    offer = ConfigRecord({**first.config_records[SECURE], **new})
    tickets = set()
    for record in ("same", "model", "setting"):
        arrays = first.array_records["model"]
        config = ConfigRecord({**first.config_records["umbel"], "round": 2})
        if record == "model":
            arrays = ArrayRecord(
                {name: Array(array.numpy() + 1e-6) for name, array in arrays.items()}
            )
        if record == "setting":
            config["clip.norm"] = 1.0000001
        content = RecordDict({"model": arrays, "umbel": config, SECURE: offer})
        message = Message(content, grid.sent[0].metadata.dst_node_id, "train", group_id=record)
        reply = next(iter(grid.stream([message])))
        tickets.add(reply.content.config_records[SECURE]["ticket"])
    assert len(tickets) == 3


@pytest.mark.parametrize("nodes", [102, pytest.param(1000, marks=pytest.mark.slow)])
def test_more_nodes_than_a_complete_graph_is_for_on_the_embedded_engine(
    tmp_path: Path, nodes: int
) -> None:
    outcome, _, lines = federate(tmp_path, Stack(layers(), SecureSum()), nodes, rounds=1)
    assert lines[-1]["clients"] == nodes
    assert lines[-1]["secure"]["neighbours"] < nodes - 1
    plain, _, _ = federate(tmp_path, Stack(layers(), PlainSum(weighting="equal")), nodes, rounds=1)
    assert torch.equal(outcome.parameters["slope"], plain.parameters["slope"])
