"""A served model: right answers to many at once, one sentence for whatever is wrong."""

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from umbel import ConfigError
from umbel.deliver import registry
from umbel.deliver.export import Exported
from umbel.deliver.predictor import Predictor, open_delivered
from umbel.deliver.serving.batching import Batcher, OverloadedError
from umbel.deliver.serving.listening import address, checked_files
from umbel.deliver.serving.routes import Routes
from umbel.deliver.serving.service import Limits, make_app
from umbel.deliver.trained import TrainedModel

pytest.importorskip("fastapi", reason="pip install 'umbel[deliver]'")


@asynccontextmanager
async def client(routes: Routes, limits: Limits | None = None) -> AsyncIterator[httpx.AsyncClient]:
    app = make_app(routes, limits or Limits())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://model") as made:
        yield made


def served(coroutine: Callable[[], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        return await coroutine()

    return asyncio.run(run())


@pytest.fixture(scope="module")
def predictor(onnx: Exported) -> Predictor:
    return open_delivered(onnx.path)


@pytest.fixture(scope="module")
def raw(trained: TrainedModel) -> np.ndarray:
    """Rows as people have them: 64 whole numbers from 0 to 16."""
    return np.asarray(trained.examples.x[:60]) * 16


def test_every_form_of_a_request_gets_the_models_answer(
    predictor: Predictor, raw: np.ndarray
) -> None:
    wanted = predictor.signature.answers(predictor.predict((raw / 16).astype(np.float32)))
    names = predictor.signature.inputs.names  # type: ignore[union-attr]
    array = io.BytesIO()
    np.save(array, raw)
    table = ",".join(names) + "\n" + "".join(",".join(map(str, r)) + "\n" for r in raw)
    forms = {
        "application/json": json.dumps({"inputs": raw.tolist()}).encode(),
        "application/x-npy": array.getvalue(),
        "text/csv": table.encode(),
        "application/x-www-form-urlencoded": json.dumps(
            {"inputs": [dict(zip(names, row, strict=True)) for row in raw.tolist()]}
        ).encode(),
    }

    async def ask() -> None:
        async with client(Routes(predictor, None)) as http:
            for kind, body in forms.items():
                reply = await http.post("/predict", content=body, headers={"content-type": kind})
                found = reply.json()
                assert reply.status_code == 200 and found["model"] == predictor.name
                assert [one["label"] for one in found["predictions"]] == [
                    one["label"] for one in wanted
                ]
            page = await http.get("/")
            assert "<title>" in page.text and "http" not in page.text.replace("http-equiv", "")
            described = (await http.get("/openapi.json")).json()
            body = described["paths"]["/predict"]["post"]["requestBody"]["content"]
            assert "text/csv" in body
            assert (await http.get("/health")).json()["status"] == "ok"
            assert (await http.get("/model")).json()["labels"] == list(map(str, range(10)))
            counted = (await http.get("/metrics")).text
            assert f'umbel_inputs_total{{model="{predictor.name}"}} 240.0' in counted

    served(ask)


def test_what_is_wrong_is_one_sentence_and_the_server_goes_on(predictor: Predictor) -> None:
    limits = Limits(bytes=2000, rows=3)
    rows = {"inputs": [[0] * 64] * 4}
    bad: list[tuple[dict[str, Any], int, str]] = [
        ({"json": {"inputs": [[1, 2]]}}, 422, "a row has 2 values, but the model takes 64"),
        ({"json": {"inputs": "x"}}, 422, 'no list "inputs"'),
        ({"json": {"inputs": [["x"] * 64]}}, 422, "no array of numbers"),
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 422, "no JSON"),
        ({"content": b"", "headers": {"content-type": "text/csv"}}, 422, "empty"),
        ({"content": b"x", "headers": {"content-type": "image/png"}}, 422, "takes rows of 64"),
        ({"content": b"x", "headers": {"content-type": "video/mp4"}}, 415, "is not known here"),
        ({"content": b"x" * 2001}, 413, "a body of 2,001 bytes; 2,000 are the most"),
        ({"json": rows}, 413, "4 inputs in one request; give 3 or fewer"),
    ]

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 1000

    async def ask() -> None:
        async with client(Routes(predictor, None), limits) as http:
            for request, status, said in bad:
                reply = await http.post("/predict", **request)
                assert (reply.status_code, said in reply.json()["error"]) == (status, True), (
                    reply.text
                )
            reply = await http.post("/predict", content=endless())
            assert reply.status_code == 413 and "more than 2,000 bytes" in reply.json()["error"]
            good = await http.post("/predict", json={"inputs": [[0] * 64]})
            assert good.status_code == 200

    served(ask)


def test_batches_are_cut_and_put_together_right() -> None:
    sizes: list[int] = []

    def predict(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return x * 2

    async def ask() -> None:
        batcher = Batcher(predict, size=8)
        given = [np.full((1 + i % 3, 2), i) for i in range(50)]
        found = await asyncio.gather(*map(batcher, given))
        assert all(np.array_equal(f, g * 2) for f, g in zip(found, given, strict=True))
        assert batcher.batches == len(sizes) < 50 and max(sizes) <= 8
        await batcher.drain()

    served(ask)


def test_a_failing_model_fails_its_batch_alone_and_a_full_queue_says_so() -> None:
    def predict(x: np.ndarray) -> np.ndarray:
        if (x < 0).any():
            raise ValueError("negative")
        return x

    async def ask() -> None:
        batcher = Batcher(predict, size=1, room=3)
        one, bad, other, late = await asyncio.gather(
            *(batcher(np.full((1, 1), v)) for v in (1, -1, 2, 3)), return_exceptions=True
        )
        assert isinstance(bad, ValueError) and isinstance(late, OverloadedError)
        assert one.item() == 1 and other.item() == 2  # type: ignore[union-attr]
        assert (await batcher(np.ones((1, 1)))).item() == 1

    served(ask)


def test_rolling_over_drops_no_request(predictor: Predictor, raw: np.ndarray) -> None:
    """Requests go on while the model is replaced again and again; every one has an answer."""
    new = replace(predictor, version="new")

    async def ask() -> None:
        routes = Routes(predictor, None)
        stop = asyncio.Event()
        models: list[str] = []

        async def go_on(http: httpx.AsyncClient) -> None:
            while not stop.is_set():
                reply = await http.post("/predict", json={"inputs": raw[:3].tolist()})
                assert reply.status_code == 200, reply.text
                models.append(reply.json()["model"])

        async with client(routes) as http:
            tasks = [asyncio.create_task(go_on(http)) for _ in range(8)]
            for turn in range(6):
                await routes.roll(lambda turn=turn: predictor if turn % 2 else new)  # type: ignore[misc]
                seen = len(models)
                while len(models) < seen + 20:
                    await asyncio.sleep(0)
            stop.set()
            await asyncio.gather(*tasks)
        assert routes.rolled == 6 and {predictor.name, new.name} == set(models)

    served(ask)


def test_a_model_of_another_kind_does_not_take_over(predictor: Predictor) -> None:
    other = replace(predictor, signature=replace(predictor.signature, labels=()))
    liar = replace(predictor, predict=lambda x: x[:, :3])

    async def ask() -> None:
        routes = Routes(predictor, None)
        with pytest.raises(ConfigError, match="has other labels than the model that is served"):
            await routes.roll(lambda: other)
        with pytest.raises(ConfigError, match=r"gives 3 numbers .* signature says 10"):
            await routes.roll(lambda: liar)
        assert routes.first is predictor and routes.rolled == 0

    served(ask)
    with pytest.raises(ConfigError, match="has other labels"):
        Routes(predictor, other)


def test_two_models_share_requests_and_a_user_stays_with_one(predictor: Predictor) -> None:
    """With 400 users at a share of 0.25, 5.2 standard deviations bound the count: under 1e-6."""
    routes = Routes(predictor, replace(predictor, version="b"), share=0.25)
    chosen = [routes.choose(f"user {i}").predictor.version for i in range(400)]
    assert chosen == [routes.choose(f"user {i}").predictor.version for i in range(400)]
    assert abs(chosen.count("b") - 100) < 5.2 * (400 * 0.25 * 0.75) ** 0.5


def test_addresses_and_certificates_are_checked_first(tmp_path: Path) -> None:
    assert address("127.0.0.1:80") == ("127.0.0.1", 80)
    assert address(":8000") == ("127.0.0.1", 8000) and address("[::1]:1") == ("::1", 1)
    for wrong in ("here", "host:99999", "host:", "1.2.3.4"):
        with pytest.raises(ConfigError, match="give HOST:PORT"):
            address(wrong)
    with pytest.raises(ConfigError, match="belong together"):
        checked_files(tmp_path / "a.pem", None)
    with pytest.raises(ConfigError, match="cannot be used"):
        checked_files(tmp_path / "a.pem", tmp_path / "b.pem")


class Process:
    """`umbel predict --listen` as its users start it."""

    def __init__(self, *arguments: str) -> None:
        command = "import sys; from umbel.commands.cli import main; sys.argv[0] = 'umbel'; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, "predict", *arguments],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        assert line.startswith("serving"), line + self.process.stderr.read()
        self.url = line.split()[-1]

    def line(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline()

    def end(self, how: int = signal.SIGTERM) -> int:
        self.process.send_signal(how)
        code = self.process.wait(60)
        if self.process.stderr is not None:
            self.process.stderr.close()
        return code


def test_a_process_rolls_over_when_a_tag_moves_and_ends_politely(
    onnx: Exported, private_onnx: Exported
) -> None:
    for made in (onnx, private_onnx):
        registry.add("digits", made.path, registry.lineage_of(made.path))
    registry.tag("digits", 1, "production")
    server = Process("digits@production", "--listen", "127.0.0.1:0")
    try:
        rows = {"inputs": [[0] * 64]}
        first = httpx.post(f"{server.url}/predict", json=rows).json()["model"]
        registry.tag("digits", 2, "production")
        assert server.line().startswith(f"rolled over from {first} to digits@")
        second = httpx.post(f"{server.url}/predict", json=rows).json()["model"]
        assert first == open_delivered(onnx.path).name != second
        registry.tag("digits", 1, "production")
        server.process.send_signal(signal.SIGHUP)
        assert server.line().endswith(f"to {first}\n")
    finally:
        assert server.end() == 0


def test_a_killed_server_loses_nothing_silently(onnx: Exported) -> None:
    """Who was not answered gets an error, and the next server answers at the same address."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{found.getsockname()[1]}"
    server = Process(str(onnx.path), "--listen", listen)
    body = b'{"inputs": [[' + b"0," * 63 + b"0]]}"
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    host, port = address(listen)
    with socket.create_connection((host, port)) as half, httpx.Client() as http:
        assert http.post(f"{server.url}/predict", content=body).status_code == 200
        half.sendall(head + body[:20])  # accepted, and not yet whole
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        with pytest.raises(httpx.TransportError):
            http.post(f"{server.url}/predict", content=body)
        half.settimeout(20)
        with suppress(ConnectionResetError):
            assert half.recv(100) == b""  # an end without an answer, which is an error in HTTP
    again = Process(str(onnx.path), "--listen", listen)
    try:
        assert httpx.post(f"{again.url}/predict", content=body).status_code == 200
    finally:
        assert again.end() == 0
