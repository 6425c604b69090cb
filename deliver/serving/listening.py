"""A served model as a process: its socket, its signals, and rolling over to another model.

SIGTERM and Ctrl-C let what was accepted be answered; SIGHUP looks for a new model at once. Without
any, the server looks every second whether the name that it was given (a link, a run, a tag of the
registry) means another model now.
"""

import asyncio
import re
import signal
import socket
from collections.abc import Callable, Hashable
from contextlib import suppress
from pathlib import Path
from typing import Any

from umbel.core.errors import ConfigError, UmbelError
from umbel.deliver.extras import needed
from umbel.deliver.predictor import Predictor
from umbel.deliver.serving.routes import Routes
from umbel.deliver.serving.service import Limits, make_app

EVERY_S = 1.0


def address(text: str) -> tuple[str, int]:
    """`HOST:PORT`, `[::1]:PORT` or `:PORT` (of this machine alone).

    Raises:
        ConfigError: it is none of these.
    """
    found = re.fullmatch(r"(?:\[([^\]]+)\]|([^:]*)):(\d{1,5})", text)
    if found is None or int(found.group(3)) > 65535:
        raise ConfigError(f"--listen is {text!r}; give HOST:PORT, such as 127.0.0.1:8000")
    return found.group(1) or found.group(2) or "127.0.0.1", int(found.group(3))


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ConfigError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen(2048)
    except OSError as error:
        made.close()
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another address "
            "with --listen"
        ) from error
    return made


def checked_files(certificate: Path | None, key: Path | None) -> None:
    """Refuse half of a certificate, or one that cannot be read, before anything starts.

    Raises:
        ConfigError: which file.
    """
    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key belong together; give both, or neither")
    if certificate is not None and key is not None:
        import ssl

        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(
                f"the certificate {certificate} with the key {key} cannot be used ({error})"
            ) from error


def serve(
    routes: Routes,
    *,
    listen: str,
    limits: Limits,
    reload: Callable[[], Predictor],
    current: Callable[[], Hashable],
    say: Callable[[str], None],
    certificate: Path | None = None,
    key: Path | None = None,
) -> None:
    """Answer until a signal ends it.

    Args:
        routes: who answers.
        listen: where.
        limits: of requests.
        reload: opens the model that the given name means now.
        current: what the name means now; another value is another model.
        say: one line for the operator.
        certificate: PEM, for HTTPS.
        key: PEM.

    Raises:
        ConfigError: the address, or the certificate, cannot be used.
    """
    uvicorn = needed("uvicorn", "umbel predict --listen")
    checked_files(certificate, key)
    host, port = address(listen)
    made = bound(host, port)
    wake = _Wake()

    async def watch() -> None:
        with suppress(ValueError, NotImplementedError):
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, wake.now.set)
        await _watch(routes, reload, current, say, wake)

    app = make_app(routes, limits, background=watch)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        timeout_graceful_shutdown=int(limits.seconds) + 1,
        timeout_keep_alive=75,
        backlog=2048,
        server_header=False,
    )
    server = _Server.of(uvicorn, config, lambda: say(_hello(routes, made, certificate)))
    try:
        server.run(sockets=[made])
    except KeyboardInterrupt:  # uvicorn has ended already, and says by which signal
        pass
    finally:
        made.close()


class _Wake:
    """What a signal sets; made where the loop runs."""

    def __init__(self) -> None:
        self.now = asyncio.Event()


class _Server:
    """A server of uvicorn that says when it is ready."""

    @staticmethod
    def of(uvicorn: Any, config: Any, ready: Callable[[], None]) -> Any:
        class Server(uvicorn.Server):  # type: ignore[misc]  # a package that may be missing
            async def startup(self, sockets: Any = None) -> None:
                await super().startup(sockets)
                if self.started:
                    ready()

        return Server(config)


def _hello(routes: Routes, made: socket.socket, certificate: Path | None) -> str:
    host, port = made.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    scheme = "http" if certificate is None else "https"
    return f"serving {routes.first.name} on {scheme}://{host}:{port}"


async def _watch(
    routes: Routes,
    reload: Callable[[], Predictor],
    current: Callable[[], Hashable],
    say: Callable[[str], None],
    wake: _Wake,
) -> None:
    known = _meaning(current)
    while True:
        with suppress(TimeoutError):
            async with asyncio.timeout(EVERY_S):
                await wake.now.wait()
        asked = wake.now.is_set()
        wake.now.clear()
        now = _meaning(current)
        if now is None or (now == known and not asked):
            continue
        known = now
        before = routes.first.name
        try:
            after = await routes.roll(reload)
        except UmbelError as error:
            say(f"still serving {before}: {error}")
        else:
            say(f"rolled over from {before} to {after.name}")


def _meaning(current: Callable[[], Hashable]) -> Hashable:
    """What the name means; None while a folder is being replaced."""
    try:
        return current()
    except (UmbelError, OSError):
        return None
