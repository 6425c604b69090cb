"""Simulated devices: the order and the time of replies are the devices', and nobody else's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from tests.written import write_app
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError
from umbel.core.records import to_array
from umbel.runner import Subject, execute, prepare
from umbel.running import run
from umbel.server.embedded.grid import EmbeddedGrid
from umbel.server.output.progress import SilentProgress
from umbel.server.output.report import write_report
from umbel.server.output.rundir import RunDirectory
from umbel.server.simulated.devices import Device, devices_of
from umbel.server.simulated.grid import SimulatedGrid
from umbel.strategies.device_options import DeviceOptions

TASK = """
import time

import numpy as np

from umbel import Examples, Federation, FunctionTrainer, Split


def initial(options):
    return {"w": np.zeros(5, np.float32)}


def train(arrays, examples, job):
    if job.node["partition-id"] == 1:
        time.sleep(0.02)  # slow here, and fast as a device
    return {"w": arrays["w"] + 0.1 * examples.x.mean(0) * job.round}, len(examples), {}


def evaluate(arrays, examples):
    return {"accuracy": float(1 / (1 + np.abs(arrays["w"]).sum()))}


def data(node, options):
    rng = np.random.default_rng(node.partition)
    x = rng.normal(size=(8, 5)).astype(np.float32)
    return Split(Examples(x, np.zeros(8, int)), Examples(x, np.zeros(8, int)))


federation = Federation(trainer=FunctionTrainer(initial, train, evaluate), data=data)
"""


def echo() -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        if message.content["model"]["x"].numpy()[0] == context.node_id - 1001:
            raise ValueError("this one fails")
        return Message(message.content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:  # noqa: ARG001
        return Message(RecordDict(), reply_to=message)

    return app


def asked(grid: SimulatedGrid, kind: str = "train", ttl: float = 1e6, fails: int = -1) -> list[Any]:
    vector = torch.full((250,), float(fails))
    content = RecordDict({"model": ArrayRecord({"x": to_array(vector)})})
    return [Message(content, node, kind, ttl=ttl, group_id="1") for node in grid.get_node_ids()]


DEVICES = (
    Device(4.0),
    Device(1.0, download=1128, upload=564, latency=0.25),
    Device(3.0),
    Device(3.0),
)
"""The second takes 0.25 + 1 s to receive 250 floats and their head of 128 bytes, 1 s to train, and
0.25 + 2 s to send them."""


@pytest.fixture
def grid() -> Iterator[SimulatedGrid]:
    with SimulatedGrid(echo(), 4, devices=DEVICES) as made:
        yield made


def arrivals(grid: SimulatedGrid, messages: list[Any], timeout: float | None = None) -> list[Any]:
    return [
        (reply.metadata.src_node_id - 1001, grid.clock.now, reply.has_error())
        for reply in grid.stream(messages, timeout)
    ]


def test_replies_come_when_their_devices_would_send_them(grid: SimulatedGrid) -> None:
    assert arrivals(grid, asked(grid)) == [
        *((2, 3.0, False), (3, 3.0, False), (0, 4.0, False)),
        (1, 4.5, False),
    ]
    # Another question takes no time but the way; the clock goes on.
    wanted = [(0, 4.5, False), (2, 4.5, False), (3, 4.5, False), (1, 6.0, False)]
    assert arrivals(grid, asked(grid, "evaluate")) == wanted


def test_a_deadline_and_a_ttl_are_of_the_virtual_clock(grid: SimulatedGrid) -> None:
    assert arrivals(grid, asked(grid), 3.5) == [(2, 3.0, False), (3, 3.0, False)]
    assert grid.clock.now == 3.5
    assert arrivals(grid, asked(grid, ttl=2.0)) == [(node, 5.5, True) for node in range(4)]


def test_a_node_that_fails_says_so_when_it_has_failed(grid: SimulatedGrid) -> None:
    assert arrivals(grid, asked(grid, fails=1))[0] == (1, 2.5, True)


def test_who_is_asked_later_answers_later(grid: SimulatedGrid) -> None:
    messages = asked(grid)
    with grid.open() as box:
        box.send(messages[2:3])
        seen = []
        for reply in box:
            seen.append((reply.metadata.src_node_id - 1001, grid.clock.now))
            if len(seen) == 1:
                box.send(messages[:1] + messages[3:])
    assert seen == [(2, 3.0), (3, 6.0), (0, 7.0)]
    answers = grid.send_and_receive(asked(grid), timeout=3.5)
    assert [reply.metadata.src_node_id - 1001 for reply in answers] == [2, 3]


def test_the_draws_are_the_distribution_that_they_are_said_to_be() -> None:
    asked = DeviceOptions("lognormal", 2.0, 1.5, 8.0, 16.0)
    found = devices_of(asked, 20_000, seed=3)
    assert found == devices_of(asked, 20_000, seed=3) != devices_of(asked, 20_000, seed=4)
    logs = np.log([[d.seconds / 2, d.download / 1e6, d.upload / 2e6] for d in found])
    # Of 20,000 draws the mean is within 6 of its standard deviations but once in 5e8.
    assert np.abs(logs.mean(0)).max() < 6 * 1.5 / 20_000**0.5
    assert np.abs(logs.std(0) - 1.5).max() < 6 * 1.5 / 40_000**0.5
    assert devices_of(DeviceOptions("equal", 2.0), 2, seed=0) == [Device(2.0)] * 2


def test_a_table_says_what_each_device_is_like(tmp_path: Path) -> None:
    file = tmp_path / "devices.csv"
    head = "partition,seconds,download_mbit,upload_mbit,latency\n"
    file.write_text(head + "1,2,8,,\n0,0.5,,16,0.1\n")
    asked = DeviceOptions(str(file))
    assert devices_of(asked, 2, 0) == [Device(0.5, upload=2e6, latency=0.1), Device(2.0, 1e6)]
    for text, said in {
        head + "0,0,,,\n1,1,,,\n": "line 2 .*seconds is 0; a training takes some time",
        head + "0,nan,,,\n1,1,,,\n": "line 2 .*seconds is 'nan'; give a number",
        head + "0,-1,,,\n1,1,,,\n": "line 2 .*seconds is '-1'; give a number that is not negative",
        head + "0,1,0,,\n1,1,,,\n": "download_mbit is 0; it must be above 0",
        head + "0,1,,,\n0,1,,,\n": "line 3 .*partition is 0; give each node once",
        head + "0,1,,,\n": "lacks partition 1 of the 2 nodes",
        "node,speed\n0,1\n": "has the columns node, speed; give partition, seconds",
        "": "has the columns ",
    }.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=said):
            devices_of(asked, 2, 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        devices_of(DeviceOptions("nowhere.csv"), 2, 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"devices": "phones"},
            "devices is 'phones'; it can be none, equal, lognormal or the path",
        ),
        ({"device-seconds": 2.0}, "no devices are simulated; add devices=lognormal"),
        ({"devices": "equal", "device-spread": 2.0}, "devices=equal are all alike"),
        ({"devices": "lognormal", "device-seconds": 0.0}, "it must be above 0"),
        ({"devices": "a.csv", "device-seconds": 2.0}, "a.csv says what each device is like"),
    ],
)
def test_what_cannot_be_simulated_is_refused_first(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    app = write_app(tmp_path / "app", TASK, "")
    with pytest.raises(ConfigError, match=said):
        run(app, options=options, nodes=4, out=tmp_path / "run", progress=SilentProgress())
    assert not (tmp_path / "run").exists()


def test_an_engine_whose_nodes_are_not_simulated_refuses(tmp_path: Path) -> None:
    subject = Subject.of(open_app(write_app(tmp_path / "app", TASK, "")))
    prepared = prepare(subject, {"devices": "lognormal"})
    directory = RunDirectory.create(tmp_path, "app", prepared.config("another"))
    quiet = SilentProgress()
    with (
        EmbeddedGrid(subject.client, 4, run_config=prepared.options) as grid,
        pytest.raises(
            ConfigError, match=r"devices=lognormal simulates .* run the app on one machine"
        ),
    ):
        execute(prepared, grid, directory, quiet, quiet)
    assert not directory.rounds()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {"devices": "lognormal"},
        {"devices": "lognormal", "mode": "async", "async-buffer": 2},
        {"devices": "lognormal", "round-timeout": 0},
    ],
)
def test_neither_workers_nor_a_stop_change_what_the_devices_do(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    """An asynchronous run, too, has the same order, so the same bits, on any number of workers."""
    app = write_app(tmp_path / "app", TASK, "")
    found = {}
    for workers in (0, 2):
        out = tmp_path / str(workers)
        more = {**options, "rounds": 5}
        run(app, options=more, nodes=6, workers=workers, out=out, progress=SilentProgress())
        found[workers] = (
            [line["simulated_s"] for line in lines(out)],
            (out / "model.safetensors").read_bytes(),
        )
    assert found[0] == found[2]
    times = found[0][0]
    assert len(times) == 5 and 0 < times[0] < times[1] < times[4]
    if "mode" in options:
        return  # a coordinator that stops forgets who was at work
    out = tmp_path / "stopped"
    quiet = SilentProgress()
    run(app, options={**options, "rounds": 2}, nodes=6, workers=0, out=out, progress=quiet)
    run(resume=out, options={"rounds": 5}, workers=0, progress=quiet)
    assert [line["simulated_s"] for line in lines(out)] == times
    assert "by the time of devices" in write_report(out).read_text()


def test_asynchronous_rounds_do_not_wait_for_the_slowest(tmp_path: Path) -> None:
    """Eight updates, as two rounds of a cohort of four and as four buffers of two."""
    app = write_app(tmp_path / "app", TASK, "")
    file = tmp_path / "devices.csv"
    file.write_text("partition,seconds\n0,1\n1,1\n2,1\n3,10\n")
    ended = {}
    for mode, more in {
        "sync": {"rounds": 2},
        "async": {"rounds": 4, "mode": "async", "async-buffer": 2, "async-concurrency": 4},
    }.items():
        out = tmp_path / mode
        options = {"devices": str(file), **more}
        run(app, options=options, nodes=4, workers=0, out=out, progress=SilentProgress())
        ended[mode] = lines(out)[-1]["simulated_s"]
    assert ended["sync"] == 20.0
    assert 3.0 <= ended["async"] <= 4.0  # three nodes give at most three updates a second
