"""The app's process: answers, errors, hangs and crashes; and what a node needs to start."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from umbel.clients.process.app_process import Answer, AppProcess, AppSettings
from umbel.clients.process.membership import Membership, NodeSettings
from umbel.clients.process.node_process import write_shared
from umbel.clients.process.pipe import Pipe, pack
from umbel.clients.process.start import gpu_environment
from umbel.core.errors import ConfigError
from umbel.transport.codec import CodecError, decode, encode, size_of
from umbel.transport.link_pb2 import Begin

APP = """
import os
import time

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
print("this must not reach standard output")


@app.train()
def train(message, context):
    what = context.run_config.get("what")
    if what == "hang":
        time.sleep(10_000)
    if what == "die":
        os._exit(7)
    if what == "raise":
        raise ValueError("no data here")
    if what == "nothing":
        return None
    content = message.content
    content["who"] = ConfigRecord({"pid": os.getpid(), "part": context.node_config["partition-id"]})
    return Message(content, reply_to=message)
"""


def make_app(folder: Path, client: str = APP) -> Path:
    folder.mkdir()
    (folder / "client_app.py").write_text(client)
    (folder / "server_app.py").write_text("app = None\n")
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "x"\nversion = "1"\n[tool.flwr.app.components]\n'
        'serverapp = "server_app:app"\nclientapp = "client_app:app"\n'
    )
    return folder


def instruction(message_id: str, content: RecordDict, **config: Any) -> tuple[Begin, bytes]:
    data = b"".join(encode(content))
    options = b"".join(encode(RecordDict({"c": ConfigRecord(config)})))
    begin = Begin(
        id=message_id,
        size=len(data),
        inline=data if len(data) <= 1 << 16 else b"",
        run_id=1,
        message_type="train",
        ttl=60,
        run_config=options,
    )
    return begin, data


def with_trainee(tmp_path: Path, use: Callable[[AppProcess], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        settings = AppSettings(make_app(tmp_path / "app"), tmp_path / "memory", {"partition-id": 4})
        trainee = AppProcess(settings)
        try:
            await trainee.start()
            await use(trainee)
        finally:
            trainee.stop()

    asyncio.run(run())


DRAWS = """
import random

import numpy as np
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    drawn = [random.random(), float(np.random.rand()), float(torch.rand(1, dtype=torch.float64))]
    return Message(RecordDict({"c": ConfigRecord({"drawn": drawn})}), reply_to=message)
"""


def test_every_process_draws_numbers_of_its_own_in_every_message(tmp_path: Path) -> None:
    """Two nodes' shuffles, dropout and noise are not the same, nor those of a replaced process."""
    app, drawn = make_app(tmp_path / "app", DRAWS), []

    async def ask(name: str) -> None:
        process = AppProcess(AppSettings(app, tmp_path / name, {"partition-id": 4}))
        try:
            await process.start()
            for message in ("1", "2"):
                begin, _ = instruction(message, RecordDict())
                answer = await process.run(begin, 9, 60)
                assert answer.error is None
                drawn.append(decode(answer.parts).config_records["c"]["drawn"])
        finally:
            process.stop()

    for name in ("one", "other"):
        asyncio.run(ask(name))
    for numbers in zip(*drawn, strict=True):
        assert len(set(numbers)) == 4


def test_one_process_answers_small_and_large_and_survives_what_apps_do(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async def use(trainee: AppProcess) -> None:
        async def ask(name: str, content: RecordDict, limit: float = 60, **config: Any) -> Answer:
            begin, data = instruction(name, content, **config)
            file = 1 if not begin.inline else 0
            if not begin.inline:
                write_shared(trainee.inbound[file], [data])
            return await trainee.run(begin, 9, limit, file=file)

        small = RecordDict({"c": ConfigRecord({"a": 1})})
        array = Array(np.arange(300_000, dtype=np.float32))
        large = RecordDict({"a": ArrayRecord({"x": array})})
        first = decode((await ask("1", small)).parts)
        second = await ask("2", large)
        assert size_of(second.parts) > 1_200_000
        got = decode(second.parts)
        assert got.array_records["a"]["x"].data == array.data
        assert first.config_records["who"]["part"] == 4
        pid = trainee.pid
        assert first.config_records["who"] == got.config_records["who"]  # it stayed warm

        raised = await ask("3", small, what="raise")
        assert raised.error is not None
        assert raised.error[0] == 2
        assert raised.error[1].startswith("ValueError: no data here (")
        assert raised.error[1].endswith("client_app.py, line 20)")
        nothing = await ask("4", small, what="nothing")
        assert nothing.error is not None and "not a Message" in nothing.error[1]
        assert trainee.pid == pid

        hung = await ask("5", small, limit=0.3, what="hang")
        assert hung.error is not None and "was stopped" in hung.error[1]
        died = await ask("6", small, what="die")
        assert died.error is not None and "exit status 7" in died.error[1]
        again = decode((await ask("7", small)).parts)
        assert again.config_records["who"]["pid"] == trainee.pid != pid

    with_trainee(tmp_path, use)
    assert capfd.readouterr().out == ""


def test_an_app_that_does_not_load_says_why(tmp_path: Path) -> None:
    async def run() -> None:
        app = make_app(tmp_path / "bad", "import nothing_of_that_name\n")
        trainee = AppProcess(AppSettings(app, tmp_path / "memory", {}))
        try:
            with pytest.raises(ConfigError, match="nothing_of_that_name"):
                await trainee.start()
        finally:
            trainee.stop()

    asyncio.run(run())


def test_nodes_of_one_machine_share_its_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_environment("none", {}) == {"CUDA_VISIBLE_DEVICES": ""}
    assert gpu_environment("3", {}) == {"CUDA_VISIBLE_DEVICES": "3"}
    with pytest.raises(ConfigError, match="auto, none"):
        gpu_environment("all", {})
    four = [Path(f"/dev/nvidia{i}") for i in range(4)] + [Path("/dev/nvidiactl")]
    monkeypatch.setattr(Path, "glob", lambda _self, _pattern: iter(four))
    given = [gpu_environment("auto", {"partition-id": i})["CUDA_VISIBLE_DEVICES"] for i in range(6)]
    assert given == ["0", "1", "2", "3", "0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert gpu_environment("auto", {}) == {}


def test_a_state_folder_has_one_owner_and_remembers(tmp_path: Path) -> None:
    first = Membership(tmp_path / "node")
    with pytest.raises(ConfigError, match="another process uses"):
        Membership(tmp_path / "node")
    settings = NodeSettings("hub:1", "n1", "/app", {"partition-id": 1})
    first.remember(settings)
    first.close()
    second = Membership(tmp_path / "node")
    assert second.settings() == settings
    (tmp_path / "node" / "node.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        second.settings()
    second.close()


def test_a_pipe_hears_whole_messages_however_they_come_in_pieces() -> None:
    async def listen() -> list[tuple[dict[str, Any], bytes]]:
        pipe = Pipe()
        both = pack({"op": "ready"}) + pack({"op": "done", "size": 3}, b"abc")
        for at in range(0, len(both), 5):
            pipe.data_received(both[at : at + 5])
        return [await pipe.hear(), await pipe.hear()]

    assert asyncio.run(listen()) == [({"op": "ready"}, b""), ({"op": "done", "size": 3}, b"abc")]


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", EOFError),
        (pack({"op": "done"}, b"abc")[:-1], EOFError),
        (b"\xff" * 12, CodecError),
        (b"\x02" + bytes(11) + b"{]", ValueError),
    ],
)
def test_a_pipe_that_is_cut_or_brings_nonsense_says_so(data: bytes, kind: type[Exception]) -> None:
    async def listen() -> None:
        pipe = Pipe()
        heard = asyncio.ensure_future(pipe.hear())
        await asyncio.sleep(0)
        pipe.data_received(data)
        pipe.connection_lost(None)
        await heard

    with pytest.raises(kind):
        asyncio.run(listen())


def test_a_connection_needs_no_pytorch() -> None:
    """It holds no tensor, and on a small device PyTorch is most of its memory and of its start."""
    code = "import sys, umbel.clients.process.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
