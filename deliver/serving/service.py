"""A model over HTTP.

    POST /predict       JSON {"inputs": [...]}, or a file as it is: image, .csv, .npy, .wav, text
    GET  /              a page to try it
    GET  /model         what it takes and gives
    GET  /health        200 while it answers
    GET  /metrics       for Prometheus
    GET  /openapi.json  the same, for programs

Every error is JSON: {"error": "one sentence"}.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from umbel.clients.data.inputs import Inputs, Pixels
from umbel.core.errors import ConfigError, UmbelError, described
from umbel.deliver.extras import needed
from umbel.deliver.serving.batching import OverloadedError
from umbel.deliver.serving.reading import from_json, parse
from umbel.deliver.serving.routes import Routes

Array = np.ndarray[Any, Any]

TYPES: Mapping[str, str] = {
    "text/csv": ".csv",
    "application/x-npy": ".npy",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/wave": ".wav",
    "text/plain": ".txt",
}
"""Media types of files that are taken as they are, beside images."""
JSON = ("application/json", "application/x-www-form-urlencoded", "")
"""The second is what `curl -d` says of a text, whatever it is."""


@dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
        bytes: of its body.
        rows: inputs.
        seconds: until it is answered.
        waiting: inputs that may wait for a model.
    """

    bytes: int = 10_000_000
    rows: int = 1024
    seconds: float = 30.0
    waiting: int = 8192


class RefusedError(Exception):
    """A request that is not answered with a prediction."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Counted:
    """What Prometheus asks for, of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "umbel_requests", "Requests.", ["model", "status"], registry=self.registry
        )
        self.rows = Counter("umbel_inputs", "Inputs.", ["model"], registry=self.registry)
        self.seconds = Histogram(
            "umbel_request_seconds",
            "Time to answer.",
            registry=self.registry,
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
        )
        self.answers = Counter(
            "umbel_answers", "Answers by class.", ["model", "answer"], registry=self.registry
        )
        self.rolled = Gauge("umbel_rolled", "Times of rolling over.", registry=self.registry)


def make_app(
    routes: Routes,
    limits: Limits,
    *,
    background: Callable[[], Any] | None = None,
) -> Any:
    """The ASGI application.

    Args:
        routes: who answers.
        limits: of requests.
        background: a coroutine function that runs while the server does.

    Raises:
        ConfigError: FastAPI is missing.
    """
    fastapi = needed("fastapi", "umbel predict --listen")
    responses = needed("starlette.responses", "umbel predict --listen")
    counted = Counted()

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        task = None if background is None else asyncio.create_task(background())
        yield
        if task is not None:
            task.cancel()
        await routes.drain()

    app = fastapi.FastAPI(
        title=routes.first.signature.name,
        description="A model trained by federated learning, served by Umbel.",
        version=routes.first.version,
        docs_url=None,  # those pages load scripts from elsewhere; `/` does not
        redoc_url=None,
        lifespan=lifespan,
    )
    handler = _Handler(routes, limits, counted)
    Json, Request = responses.JSONResponse, needed("starlette.requests", "serving").Request

    async def predict(request: Any) -> Any:
        began = time.perf_counter()
        model, status = "none", 200
        try:
            async with asyncio.timeout(limits.seconds):
                model, answer = await handler.answer(request)
            return responses.Response(answer, media_type="application/json")
        except RefusedError as refused:
            status = refused.status
            head = {"connection": "close"} if status == 413 else None
            return Json({"error": str(refused)}, status, headers=head)
        except TimeoutError:
            status = 504
            return Json(
                {"error": f"no answer within {limits.seconds:g} s; ask for less at a time"}, 504
            )
        finally:
            counted.requests.labels(model, str(status)).inc()
            counted.seconds.observe(time.perf_counter() - began)

    async def health() -> Any:
        return {"status": "ok", "model": routes.first.name}

    async def model() -> Any:
        second = routes.second
        return {
            **routes.first.signature.to_json(),
            "version": routes.first.version,
            "beside": None if second is None else {"name": second.name, "share": routes.share},
            "limits": {"bytes": limits.bytes, "rows": limits.rows, "seconds": limits.seconds},
        }

    async def metrics() -> Any:
        counted.rolled.set(routes.rolled)
        return responses.PlainTextResponse(generate_latest(counted.registry).decode())

    page = (
        resources.files("umbel.deliver.serving").joinpath("page.html").read_text(encoding="utf-8")
    )

    async def root() -> Any:
        return responses.HTMLResponse(page)

    predict.__annotations__["request"] = Request
    app.post("/predict", openapi_extra=_body(routes.first.signature.inputs))(predict)
    app.get("/health")(health)
    app.get("/model")(model)
    app.get("/metrics", response_class=responses.PlainTextResponse)(metrics)
    app.get("/", include_in_schema=False)(root)
    return app


class _Handler:
    """One request to /predict."""

    def __init__(self, routes: Routes, limits: Limits, counted: Counted) -> None:
        self.routes, self.limits, self.counted = routes, limits, counted

    async def answer(self, request: Any) -> tuple[str, bytes]:
        """The model that answered, and the answer's bytes.

        Raises:
            RefusedError: the request cannot be answered.
        """
        line = self.routes.choose(request.headers.get("x-user"))
        predictor = line.predictor
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip()
        x = self._inputs(await self._content(request), kind.lower(), predictor.signature.inputs)
        if len(x) > self.limits.rows:
            raise RefusedError(
                413, f"{len(x)} inputs in one request; give {self.limits.rows} or fewer at a time"
            )
        try:
            outputs = await line.batcher(x)
        except OverloadedError as error:
            raise RefusedError(503, f"the server is busy: {error}; try again later") from error
        except UmbelError as error:
            raise RefusedError(422, str(error)) from error
        except Exception as error:
            raise RefusedError(500, f"the model failed: {described(error, longest=200)}") from error
        answers = predictor.signature.answers(outputs)
        self.counted.rows.labels(predictor.name).inc(len(answers))
        if predictor.signature.labels:
            for one in answers:
                self.counted.answers.labels(predictor.name, one["label"]).inc()
        body = {"model": predictor.name, "predictions": answers}
        return predictor.name, json.dumps(body).encode()

    async def _content(self, request: Any) -> bytes:
        """The body, read no further than it may be long."""
        most = self.limits.bytes
        told = request.headers.get("content-length", "")
        if told.isdigit() and int(told) > most:
            raise RefusedError(413, f"a body of {int(told):,} bytes; {most:,} are the most")
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise RefusedError(413, f"a body of more than {most:,} bytes, which are the most")
            parts.append(part)
        return b"".join(parts)

    def _inputs(self, content: bytes, kind: str, inputs: Inputs) -> Array:
        try:
            if kind in JSON:
                return from_json(content, inputs)
            if kind.startswith("image/"):
                return parse(content, ".png", inputs)
            if kind in TYPES:
                return parse(content, TYPES[kind], inputs)
        except ConfigError as error:
            raise RefusedError(422, str(error)) from error
        raise RefusedError(
            415,
            f"the content type {kind!r} is not known here; send application/json, image/png, "
            f"{', '.join(TYPES)}",
        )


def _body(inputs: Inputs) -> dict[str, Any]:
    """What /predict takes, in the words of OpenAPI."""
    shape = inputs.shape
    if isinstance(inputs, Pixels):
        colours = (inputs.channels,) if inputs.channels > 1 else ()
        shape = (inputs.height, inputs.width, *colours)
    item: dict[str, Any] = {"type": "number"}
    for size in reversed(shape):
        item = {"type": "array", "items": item, "minItems": size, "maxItems": size}
    if inputs.KIND == "text":
        item = {"type": "string"}
    schema = {
        "type": "object",
        "required": ["inputs"],
        "properties": {"inputs": {"type": "array", "items": item, "minItems": 1}},
    }
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    files = {
        "image": ("image/png", "image/jpeg"),
        "table": ("text/csv", "application/x-npy"),
        "text": ("text/plain", "text/csv"),
        "sound": ("audio/wav",),
    }.get(inputs.KIND, ("application/x-npy", "text/csv"))
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content | dict.fromkeys(files, binary)}}
