"""Starting a node process: join or remember, load the app in its child, and stay connected."""

import asyncio
import contextlib
import logging
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from umbel.clients.ledger.names import COORDINATOR, STATE
from umbel.clients.process.app_process import AppProcess, AppSettings
from umbel.clients.process.link import NodeLink
from umbel.clients.process.membership import ExpiredError, Membership, NodeSettings
from umbel.clients.process.policy_file import policy_file
from umbel.core.app_folder import open_app
from umbel.core.errors import ConfigError, RunError
from umbel.strategies.policy.reading import FORMER, POLICY, policy_of
from umbel.strategies.secure.node import IDENTITY
from umbel.transport import loop
from umbel.transport.allocator import share_one_arena
from umbel.transport.scheduling import work_in_batches

log = logging.getLogger("umbel.node")


@dataclass(frozen=True)
class StartSettings:
    """How a node process is started.

    Attributes:
        state: the node's folder.
        app: the app's folder; None takes that of the last start.
        join: a join file, for the first start.
        node_config: of the node; None takes that of the last start.
        address: HOST:PORT, where it has moved, or with certificates brought along.
        own_certificate: paths of certificate, key and root that someone brought along.
        any_app: work for a coordinator whose copy of the app differs.
        once: end with the coordinator's run.
        threads: of tensor operations; 0 leaves it to the libraries.
        gpu: `auto`, `none`, or the number of a GPU.
        give_up: end when the coordinator refuses this node, in place of asking again slowly.
        proxy: go through the environment's HTTP proxy or not; None does as the last start.
        policy: the policy file; None takes that of the last start, or the one in the state folder.
    """

    state: Path
    app: Path | None = None
    join: Path | None = None
    node_config: Mapping[str, Any] | None = None
    address: str = ""
    own_certificate: tuple[Path, Path, Path] | None = None
    any_app: bool = False
    once: bool = False
    threads: int = 0
    gpu: str = "auto"
    give_up: bool = False
    proxy: bool | None = None
    policy: Path | None = None
    on_event: Callable[[str], None] = field(default=lambda _: None)


def start_node(start: StartSettings, *, version: str) -> None:
    """Run a node until a signal ends it.

    Raises:
        ConfigError: a value that cannot be used, or a coordinator that refuses for good.
        RunError: the coordinator could not be reached to enrol.
    """
    share_one_arena()
    work_in_batches()
    membership = Membership(start.state)
    try:
        loop.run(_run(membership, start, version))
    finally:
        membership.close()


async def _run(membership: Membership, start: StartSettings, version: str) -> None:
    settings = await enrolled(membership, start)
    folder = open_app(Path(settings.app))
    trainee = AppProcess(
        AppSettings(
            app=folder.path,
            memory=membership.folder / "memory",
            node_config=app_config(membership, settings),
            threads=start.threads,
            environment=gpu_environment(start.gpu, settings.node_config),
            spent=membership.folder / "rounds",
        )
    )
    running, stopped = asyncio.get_running_loop(), asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(ValueError, RuntimeError):
            running.add_signal_handler(each, stopped.set)
    link = NodeLink(
        membership,
        settings,
        trainee,
        version=version,
        app_digest=folder.digest(),
        any_app=start.any_app,
        once=start.once,
        give_up=start.give_up,
        on_event=start.on_event,
    )
    stopping = asyncio.create_task(stopped.wait())
    working = asyncio.create_task(_work(trainee, link))
    try:
        await asyncio.wait({stopping, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
    finally:
        for task in (stopping, working):
            task.cancel()
        await asyncio.gather(stopping, working, return_exceptions=True)
        trainee.stop()


async def _work(trainee: AppProcess, link: NodeLink) -> None:
    await trainee.start()
    await link.run()


async def enrolled(membership: Membership, start: StartSettings) -> NodeSettings:
    """What this start says, over what earlier ones have left; enrols where that is asked."""
    before = membership.settings()
    membership.proxy = bool(start.proxy) or (start.proxy is None and bool(before and before.proxy))
    own = start.own_certificate
    if own is not None:
        if not (start.address or before):
            raise ConfigError("with --certificate, say where the coordinator is: --address")
        paths = (str(own[0].absolute()), str(own[1].absolute()), str(own[2].absolute()))
        settings = replace(before or NodeSettings(start.address), own_certificate=paths)
    elif start.join is not None and not _has_identity(membership, before):
        settings = await _enrol(membership, start.join)
        if before is not None:  # it comes again: its app and its configuration are what they were
            settings = replace(before, address=settings.address, name=settings.name)
    elif before is None:
        raise ConfigError(
            f"{start.state} belongs to no federation yet; start it with --join FILE, which the "
            "operator makes with: umbel nodes add NAME"
        )
    else:
        settings = before
    if start.address:
        settings = replace(settings, address=start.address)
    settings = replace(settings, proxy=membership.proxy)
    if start.node_config is not None:
        settings = replace(settings, node_config=dict(start.node_config))
    if start.policy is not None:
        settings = replace(settings, policy=str(start.policy.expanduser().resolve()))
    policy_of(
        {POLICY: str(policy_file(membership.folder, settings))}
    )  # raises before anything begins
    if start.app is not None:
        settings = replace(settings, app=str(start.app.expanduser().resolve()))
    if not settings.app:
        raise ConfigError("say which app this node runs: umbel client APP ...")
    if settings != before:
        membership.remember(settings)
    return settings


def _has_identity(membership: Membership, settings: NodeSettings | None) -> bool:
    if settings is None:
        return False
    try:
        return membership.identity(settings) is not None
    except ExpiredError:
        return False


def app_config(membership: Membership, settings: NodeSettings) -> dict[str, Any]:
    """The node's configuration as its app sees it: who it is, and where its ledger lies."""
    return {
        IDENTITY: _identity_files(membership, settings),
        STATE: str(membership.folder.absolute()),
        COORDINATOR: settings.address,
        **{k: v for k, v in settings.node_config.items() if k != FORMER},
        POLICY: str(policy_file(membership.folder, settings)),
    }


def _identity_files(membership: Membership, settings: NodeSettings) -> str:
    """Where the app finds the node's certificate and key, to sign with in a secure sum."""
    if settings.own_certificate is not None:
        return os.pathsep.join(settings.own_certificate)
    return str(membership.folder.absolute() / "identity.pem")


async def _enrol(membership: Membership, join: Path) -> NodeSettings:
    """Enrol; a coordinator that is not up yet is waited for."""
    wait = 0.2
    while True:
        try:
            return await membership.enrol(join)
        except RunError as problem:
            log.warning("%s; trying again", problem)
        await asyncio.sleep(wait * random.uniform(0.5, 1.5))
        wait = min(10.0, wait * 1.6)


def gpu_environment(choice: str, node_config: Mapping[str, Any]) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES for the app: nodes of one machine share its GPUs evenly.

    Raises:
        ConfigError: neither `auto`, `none` nor a number.
    """
    if choice == "none":
        return {"CUDA_VISIBLE_DEVICES": ""}
    if choice.isdigit():
        return {"CUDA_VISIBLE_DEVICES": choice}
    if choice != "auto":
        raise ConfigError(f"--gpu is {choice!r}; use auto, none, or the number of a GPU")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return {}
    count = len([each for each in Path("/dev").glob("nvidia[0-9]*") if each.name[6:].isdigit()])
    if count < 2:
        return {}
    partition = node_config.get("partition-id", os.getpid())
    return {"CUDA_VISIBLE_DEVICES": str(int(partition) % count)}


__all__ = ["StartSettings", "enrolled", "gpu_environment", "start_node"]
