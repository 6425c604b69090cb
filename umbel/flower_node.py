"""`umbel client --engine flower`: a SuperNode with the key of an enrolled node."""

import asyncio
import json
import logging
import math
import signal
import socket
import threading
from collections.abc import Sequence
from typing import Any

from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from umbel.clients.ledger.names import COORDINATOR, STATE
from umbel.clients.process.membership import Membership, NodeSettings
from umbel.clients.process.policy_file import policy_file
from umbel.clients.process.start import StartSettings, enrolled, gpu_environment
from umbel.core.errors import ConfigError
from umbel.flower_process import FlowerProcess, environment, program
from umbel.strategies.policy.reading import FORMER, POLICY
from umbel.transport.certificates import load_key
from umbel.transport.keyfiles import write_secret

log = logging.getLogger("umbel.node")
_AGAIN_S = 2.0


def node_with_flower(start: StartSettings) -> None:
    """Run a SuperNode with this node's key until a signal ends it.

    Raises:
        ConfigError: the node has not enrolled, or brings its own certificate.
    """
    if start.once:
        raise ConfigError("--once is of the link engine; a SuperNode stays until it is stopped")
    membership = Membership(start.state)
    try:
        settings = asyncio.run(enrolled(membership, start))
        log.info("on Flower's engine a node runs the app that its SuperLink sends")
        _keep_running(membership, settings, start)
    finally:
        membership.close()


def _keep_running(membership: Membership, settings: NodeSettings, start: StartSettings) -> None:
    """Start a SuperNode again whenever it gives up, as it does without a SuperLink."""
    home = membership.folder.absolute() / "flower"
    words = gpu_environment(start.gpu, settings.node_config)
    if start.threads:
        words["OMP_NUM_THREADS"] = str(start.threads)
    stopped = threading.Event()
    current: list[FlowerProcess] = []

    def stop(*_: Any) -> None:
        stopped.set()
        for each in current:
            each.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    while not stopped.is_set():
        env = environment(home, **words)
        process = FlowerProcess(home, _command(membership, settings), env=env)
        current[:] = [process]
        if process.wait() != 0 and not stopped.is_set():
            log.warning("the SuperNode has ended; it is started again")
        stopped.wait(_AGAIN_S)
    for process in current:
        process.end()


def _command(membership: Membership, settings: NodeSettings) -> list[str]:
    identity = membership.identity(settings)
    if identity is None or settings.own_certificate is not None:
        raise ConfigError("--engine flower needs a node that has enrolled with --join FILE")
    home = membership.folder.absolute() / "flower"
    key = load_key(identity.key).private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    write_secret(home / "node.key", key)
    (home / "root.crt").write_bytes(identity.root)
    host, _, port = settings.address.rpartition(":")
    # The ledger lies in the node's folder on this engine too, and names who asked.
    config = {
        STATE: str(membership.folder.absolute()),
        COORDINATOR: settings.address,
        **{k: v for k, v in settings.node_config.items() if k != FORMER},
        POLICY: str(policy_file(membership.folder, settings)),
    }
    words = " ".join(f"{k}={toml(v)}" for k, v in config.items())
    return [
        program("flower-supernode"),
        *("--superlink", f"{host}:{int(port) + 1}"),
        *("--root-certificates", str(home / "root.crt")),
        *("--auth-supernode-private-key", str(home / "node.key")),
        *("--node-config", words),
        *("--port", str(_free_port())),
    ]


def toml(value: Any) -> str:
    """A plain value as TOML, for Flower's `K=V` options."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # inf, -inf and nan are words of TOML
    return (
        json.dumps(value, ensure_ascii=False) if not isinstance(value, bool) else str(value).lower()
    )


def _free_port() -> int:
    """For the SuperNode's own apps on this machine, so that several do not clash."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


__all__: Sequence[str] = ["node_with_flower", "toml"]
