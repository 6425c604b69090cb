"""Asynchronous rounds: the slow are not waited for, the stale count for less, none counts twice."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from umbel import Examples, Federation, FunctionTrainer
from umbel.core.errors import ConfigError, RunError
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.embedded.mailbox import EmbeddedMailbox
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.rounds import Rounds
from umbel.server.training_spec import Outcome

NODES = 8


def initial(options: Any) -> dict[str, Any]:
    del options
    return {"w": np.zeros(3)}


def ones(weights: Any, examples: Any, job: Any) -> Any:
    """Each node adds one to the coordinate of its class, whatever the model is."""
    del job
    step = np.eye(3)[int(examples.y[0])]
    if examples.y[0] == 2:
        raise ValueError("this node cannot train")
    return {"w": weights["w"] + step}, 1, {}


def data(node: Any, options: Any) -> Examples:
    del options
    return Examples(np.zeros((1, 1)), np.array([node.partition % 2]))


def failing(node: Any, options: Any) -> Examples:
    del options
    return Examples(np.zeros((1, 1)), np.array([2 if node.partition == 3 else 0]))


class Slow(EmbeddedGrid):
    """A grid on which replies wait: the first node answers only when four others have."""

    def open(self, timeout: float | None = None) -> EmbeddedMailbox:
        box = super().open(timeout)
        return _Slow(self._push, self._runner, 0, timeout) if timeout is None else box


class _Slow(EmbeddedMailbox):
    def __iter__(self) -> Iterator[Message]:
        held = None
        passed = 0
        for reply in super().__iter__():
            if held is None and reply.metadata.src_node_id == 1001 and passed < 100:
                held, passed = reply, 0
                continue
            passed += 1
            yield reply
            if held is not None and passed >= 4:
                yield held
                held, passed = None, 100
        if held is not None:
            yield held


Fit = Callable[..., tuple[Outcome, list[Any]]]


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    def run(
        federation: Federation | None = None,
        *,
        kind: type[EmbeddedGrid] = EmbeddedGrid,
        **asked: Any,
    ) -> tuple[Outcome, list[Any]]:
        federation = federation or Federation(FunctionTrainer(initial, ones), data)
        given = {"mode": "async", "federated-every": -1, **asked}
        options = federation.complete({k.replace("_", "-"): v for k, v in given.items()})
        directory = RunDirectory.create(
            None, "t", {}, out=tmp_path / str(len(list(tmp_path.iterdir())))
        )
        with kind(federation.client_app(), NODES, run_config=options) as grid:
            job = federation.job(options, NODES)
            rounds = Rounds(job, grid, grid.roster(), directory, SilentProgress())
            return rounds.fit(), directory.rounds()

    return run


def test_a_round_is_a_buffer_and_its_mean(fit: Fit) -> None:
    """Without staleness, three rounds of the mean of four unit steps each move the model by 3."""
    outcome, lines = fit(rounds=3, async_buffer=4, async_staleness=0.0)
    assert [line["clients"] for line in lines if line["round"]] == [4, 4, 4]
    assert float(outcome.parameters["w"].sum()) == pytest.approx(3.0)


def test_a_stale_update_counts_for_less(fit: Fit) -> None:
    """Whoever was at work when the first round ended is one behind in the second."""
    outcome, lines = fit(rounds=2, async_buffer=4, async_concurrency=6, async_staleness=1.0)
    staleness = [line["train"]["staleness"] for line in lines if line["round"]]
    assert staleness == [0.0, 1.0]
    assert float(outcome.parameters["w"].sum()) == pytest.approx(1 + 0.5)


def test_the_slow_are_not_waited_for(fit: Fit) -> None:
    _, lines = fit(kind=Slow, rounds=3, async_buffer=2, async_concurrency=3)
    assert max(line["train"].get("staleness", 0) for line in lines if line["round"]) > 0


def test_too_far_behind_is_not_used(fit: Fit) -> None:
    _, lines = fit(kind=Slow, rounds=4, async_buffer=1, async_concurrency=4, async_limit=1)
    failed = [each for line in lines if line["round"] for each in line["failed"]]
    assert any("rounds behind; async-limit is 1" in each["reason"] for each in failed)


def test_a_buffer_of_one_mixes_each_update_in(fit: Fit) -> None:
    """FedAsync: x <- x + alpha (x_node - x)."""
    outcome, _ = fit(rounds=5, async_buffer=1, async_concurrency=1, server_learning_rate=0.5)
    assert float(outcome.parameters["w"].sum()) == pytest.approx(2.5)


def test_a_node_that_fails_is_named_and_replaced(fit: Fit) -> None:
    federation = Federation(FunctionTrainer(initial, ones), failing)
    _, lines = fit(federation, rounds=4, async_buffer=3, async_concurrency=3)
    done = [line for line in lines if line["round"]]
    assert [line["clients"] for line in done] == [3, 3, 3, 3]
    assert {each["node"] for line in done for each in line["failed"]} == {"3"}


def test_when_all_fail_the_run_ends(fit: Fit) -> None:
    def nobody(node: Any, options: Any) -> Examples:
        del node, options
        return Examples(np.zeros((1, 1)), np.array([2]))

    with pytest.raises(RunError, match=r"0 of \d needed replies"):
        fit(Federation(FunctionTrainer(initial, ones), nobody), rounds=4, async_buffer=3)


def test_the_same_run_twice_in_one_process_is_the_same(fit: Fit) -> None:
    first, _ = fit(rounds=4, async_buffer=3)
    again, _ = fit(rounds=4, async_buffer=3)
    assert (first.parameters["w"] == again.parameters["w"]).all()


def test_a_killed_run_goes_on_and_counts_nothing_twice(tmp_path: Path) -> None:
    """Killed with a half-full buffer: those replies are forgotten, and asked for again."""
    federation = Federation(FunctionTrainer(initial, ones), data)
    given = {"mode": "async", "rounds": 4, "async-buffer": 4, "federated-every": -1}
    options = federation.complete({**given, "async-staleness": 0.0})
    directory = RunDirectory.create(None, "t", {}, out=tmp_path / "run")

    class Killed(BaseException):
        pass

    class Dying(SilentProgress):
        def __init__(self, at: int) -> None:
            self.left = at

        def message_done(self, done: int, total: int) -> None:
            del done, total
            self.left -= 1
            if self.left == 0:
                raise Killed

    def rounds(grid: EmbeddedGrid, at: int) -> Rounds:
        made = Rounds(federation.job(options, NODES), grid, grid.roster(), directory, Dying(at))
        made.parts.checkpoints._took = 0.0
        return made

    with (
        EmbeddedGrid(federation.client_app(), NODES, run_config=options) as grid,
        pytest.raises(Killed),
    ):
        rounds(grid, 10).fit()  # two rounds and half of the third
    with EmbeddedGrid(federation.client_app(), NODES, run_config=options) as grid:
        outcome = rounds(grid, 10**9).fit()
    lines = [line for line in directory.rounds() if line["round"]]
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    assert [line["clients"] for line in lines] == [4, 4, 4, 4]
    assert float(outcome.parameters["w"].sum()) == pytest.approx(4.0)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"epsilon": 8.0}, "mode=async takes replies from whoever is quick"),
        ({"secure": True}, "mode=async cannot sum in secret"),
        ({"cohort": "fixed", "cohort-size": 3}, "cohort is 'fixed', but mode=async has no cohorts"),
        ({"min-replies": 5, "async-buffer": 4}, "min-replies is 5"),
        ({"mode": "sync", "async-buffer": 4}, "async-buffer is 4, but the rounds of mode=sync"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_message(asked: Any, said: str) -> None:
    federation = Federation(FunctionTrainer(initial, ones), data)
    with pytest.raises(ConfigError, match=said):
        federation.check_options(federation.complete({"mode": "async", **asked}))
