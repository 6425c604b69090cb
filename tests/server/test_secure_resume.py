"""A coordinator that is killed in a secure sum goes on, though nodes give a round only once."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message
from flwr.clientapp import ClientApp

from tests.clients.liar import federation
from umbel.server import checkpoint
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.rundir import RunDirectory
from umbel.server.rounds import Rounds
from umbel.strategies.secure.wire import query_of

OPTIONS = {"secure": True, "rounds": 5, "secure-norm": 1.0, "client-eval-every": -1}
NODES = 4


class Killed(BaseException):
    """As a kill, nothing catches it."""


class Elsewhere(EmbeddedGrid):
    """Nodes that are processes of their own: what they keep does not go back with a checkpoint."""

    def __init__(self, app: ClientApp, options: Any) -> None:
        super().__init__(app, NODES, run_config=options)
        self.states = None  # type: ignore[assignment]
        self.die_before, self.rounds = ("", 0), dict[int, int]()

    def stream(self, messages: Any, timeout: float | None = None) -> Iterator[Message]:
        messages = list(messages)
        kind, number = (
            messages[0].metadata.message_type,
            int(str(messages[0].metadata.group_id).partition(".")[0]),
        )
        if (kind, number) == self.die_before:
            raise Killed
        for reply in super().stream(messages, timeout):
            if kind == query_of("mask"):
                given = self.rounds.get(number, 0)
                self.rounds[number] = given + ("vector" in reply.content["umbel.secure"])
            yield reply


class Said(SilentProgress):
    """Remembers what a person is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("stage", ["train", "share", "agree", "unmask"])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_killed_coordinator_goes_on_after_the_round_it_was_in(
    tmp_path: Path, stage: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("umbel.server.observers.checkpoints.EVERY_S", 0.0)
    app = federation()
    options = app.complete(OPTIONS)
    grid = Elsewhere(app.client_app(), options)
    run = RunDirectory.create(None, "test", {"options": options}, out=tmp_path / "run")

    def rounds(said: Said) -> Rounds:
        return Rounds(app.job(options, NODES), grid, grid.roster(), run, said)

    grid.die_before = ("train" if stage == "train" else query_of(stage), number)
    with pytest.raises(Killed):
        rounds(Said()).fit()
    grid.die_before = ("", 0)
    said = Said()
    outcome = rounds(said).fit()
    assert outcome.rounds == 5
    assert f"round {number} was under way when the coordinator stopped" in "".join(said.notes)
    lines = [line for line in run.rounds() if line["round"]]
    assert [line["round"] for line in lines] == [n for n in range(1, 6) if n != number]
    assert all(line["clients"] == NODES and not line["failed"] for line in lines)
    assert all(given == NODES for given in grid.rounds.values())  # nobody gave a round twice
    assert float(outcome.parameters["w"].abs().sum()) > 0


def test_virtual_nodes_go_back_with_the_checkpoint_and_repeat_the_round(tmp_path: Path) -> None:
    app = federation()
    options = app.complete(OPTIONS)

    def fit(out: str, die_at: int = 0) -> Any:
        run = RunDirectory.create(None, "test", {}, out=tmp_path / out)
        for die in (die_at, 0) if die_at else (0,):
            grid = EmbeddedGrid(app.client_app(), NODES, run_config=options)
            left = [die]

            def stream(
                messages: Any, timeout: Any = None, grid: Any = grid, left: Any = left
            ) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise Killed
                return EmbeddedGrid.stream(grid, messages, timeout)

            grid.stream = stream  # type: ignore[method-assign]
            try:
                return Rounds(
                    app.job(options, NODES), grid, grid.roster(), run, SilentProgress()
                ).fit()
            except Killed:
                continue
        raise AssertionError("it was killed twice")

    whole, killed = fit("whole"), fit("killed", die_at=14)
    assert (whole.parameters["w"] == killed.parameters["w"]).all()


def test_a_begun_round_survives(tmp_path: Path) -> None:
    assert checkpoint.begun(tmp_path) == 0
    checkpoint.begin(tmp_path, 7)
    checkpoint.begin(tmp_path, 8)
    assert checkpoint.begun(tmp_path) == 8
    (tmp_path / "begun").write_text("eight")
    with pytest.raises(Exception, match="is damaged"):
        checkpoint.begun(tmp_path)
