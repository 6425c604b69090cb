"""Runs in which nothing travels beside the updates: nodes are not asked, and a person hears why."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from umbel.benchmarks.speed.apps import write_federation
from umbel.running import run
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory
from umbel.transport.link_pb2 import Hello

TASK = """
import numpy as np
from umbel import Federation, FunctionTrainer, Split


def train(arrays, examples, job):
    return {"w": arrays["w"] + 0.1 * examples}, 7, {"loss": 0.25}


def evaluate(arrays, examples):
    return {"loss": 0.5, "accuracy": 0.75}


federation = Federation(
    FunctionTrainer(lambda _: {"w": np.zeros(10, np.float32)}, train, evaluate),
    lambda node, _: Split(node.partition + 1, [1, 2, 3]),
)
"""
PLAIN = {"rounds": 1}
QUIET = {
    "secure": ({"secure": True}, "updates are hidden from the coordinator"),
    "secure and private": (
        {"secure": True, "epsilon": 8.0, "secure-min-cohort": 6},
        "updates are hidden from the coordinator",
    ),
    "local": ({"epsilon": 8.0, "mechanism": "local"}, "updates are hidden from the coordinator"),
    "private": ({"epsilon": 8.0, "sampling": "all"}, "the run is private"),
}


class Said(SilentProgress):
    """Remembers what a person is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def reason_of(why: str) -> str:
    return f"to evaluate the model, because {why}"


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("quiet") / "app", TASK, name="q", config="")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The types of the messages that were sent."""
    kinds: list[str] = []
    real = EmbeddedGrid.stream

    def stream(grid: EmbeddedGrid, messages: Any, timeout: Any = None) -> Iterator[Message]:
        messages = list(messages)
        kinds.extend(message.metadata.message_type for message in messages)
        return real(grid, messages, timeout)

    monkeypatch.setattr(EmbeddedGrid, "stream", stream)
    return kinds


@pytest.mark.parametrize("kind", QUIET)
def test_nodes_are_not_asked_what_would_tell_what_a_run_hides(
    app: Path, tmp_path: Path, asked: list[str], kind: str
) -> None:
    """At the end of every run each node's loss, accuracy and count went out and into a file."""
    options, why = QUIET[kind]
    said = Said()
    for every in (0, 1):
        out = tmp_path / str(every)
        given = {**PLAIN, **options, "client-eval-every": every}
        run(app, options=given, nodes=6, workers=0, out=out, progress=said)
        assert "train" in asked and "evaluate" not in asked
        assert any(f"not asked to evaluate the model, because {why}" in note for note in said.notes)
        directory = RunDirectory.open(out)
        assert not directory.nodes_path.exists()
        for line in directory.rounds():
            assert not line.get("federated")
        for file in (out / "metrics.jsonl", out / "log.txt"):
            assert "0.75" not in file.read_text()
        page = write_report(out).read_text()
        assert f"Nothing is shown of single nodes: nodes are not asked {reason_of(why)}" in page


def test_a_plain_run_asks_as_before(app: Path, tmp_path: Path, asked: list[str]) -> None:
    run(app, options=PLAIN, nodes=3, workers=0, out=tmp_path / "out", progress=SilentProgress())
    assert asked.count("evaluate") == 3
    rows = RunDirectory.open(tmp_path / "out").nodes()
    assert [row["accuracy"] for row in rows] == [0.75] * 3
    assert "Nothing is shown of single nodes" not in write_report(tmp_path / "out").read_text()


def test_who_asks_for_no_evaluation_reads_that(app: Path, tmp_path: Path) -> None:
    given = {**PLAIN, "federated-every": -1}
    run(app, options=given, nodes=3, workers=0, out=tmp_path, progress=SilentProgress())
    page = write_report(tmp_path).read_text()
    assert reason_of("client-eval-every is -1.") in page


def test_what_a_node_says_of_itself_when_it_connects() -> None:
    """The page on security lists it; whoever adds to it, adds to the page."""
    fields = {"protocol", "version", "instance", "app_digest", "partition", "partitions"}
    assert set(Hello.DESCRIPTOR.fields_by_name) == fields | {"device", "held"}
