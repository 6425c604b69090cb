"""The pool on a Ray cluster: `ray` for the one that runs here, `ray://HOST:PORT` from elsewhere.

    engine -> object store   the app, once a run; each content once, however many nodes get it
    engine -> Ray            groups of tasks, each of one processor
    Ray -> engine            replies

Ray runs the groups of a worker that dies elsewhere. Workers of Ray run one task at a time, so that
random generators are a task's own. Nodes of the cluster may come and go.
"""

import logging
import os
import socket
import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.server.pools.base import Group, Pool, Results, Work, WorkerLostError
from umbel.server.pools.cluster import ClusterPool
from umbel.server.pools.shipping import Shipment, bare_group, probe, run_shipped, shipped

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report home
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
try:
    import ray
except ImportError as _missing:
    raise ConfigError(
        'the pool ray needs Ray, which is not installed: pip install "umbel[ray]"'
    ) from _missing

CONNECT_S = 10.0
"""How long a cluster's address may take to answer."""
AGAIN = 4
"""How often Ray runs a group again whose worker has died."""


def from_options(options: Mapping[str, Any]) -> Pool:
    """The pool of `--pool ray` and `--pool ray://HOST:PORT`.

    Raises:
        ConfigError: nobody is there, or it has another version of Ray or Python.
    """
    asked = str(options["pool"])
    address = asked if "://" in asked else "auto"
    if ray.is_initialized():
        return RayPool()
    _check_there(asked if "://" in asked else os.environ.get("RAY_ADDRESS", ""))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Ray's own, about its own
            ray.init(
                address,
                logging_level=logging.CRITICAL,
                log_to_driver=False,
                configure_logging=False,
            )
    except Exception as error:
        where = "that runs on this machine" if address == "auto" else f"at {address}"
        raise ConfigError(
            f"there is no Ray cluster {where} that can be used ({described(error)}); start one "
            "with: ray start --head, or correct the address"
        ) from error
    return RayPool(owned=True)


def _check_there(address: str) -> None:
    """Refuse an address at which nobody is: Ray itself asks it again and again, for minutes.

    Raises:
        ConfigError: nobody answers.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not port.isdigit():
        return  # Ray's own names for a cluster, or none
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise ConfigError(
            f"there is no Ray cluster at {address} ({described(error)}); start one with: ray start "
            "--head, or correct the address"
        ) from error


class RayPool(ClusterPool):
    """Runs groups on the workers of the Ray cluster that this process is connected to.

    Args:
        owned: disconnect with the pool.
        resources: that a group needs, as in `{"GPU": 0.5}`; one processor if None.
    """

    def __init__(
        self, *, owned: bool = False, resources: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self._owned = owned
        self._resources = dict(resources or {"CPU": 1})
        self._run = ray.remote(run_shipped).options(max_retries=AGAIN, **self._needs())
        self._shipment: Any = None

    def _needs(self) -> dict[str, Any]:
        named = {"CPU": "num_cpus", "GPU": "num_gpus"}
        own = {key: value for key, value in self._resources.items() if key not in named}
        known = {named[key]: self._resources.get(key, 0) for key in named}
        return {**known, "resources": own} if own else known

    def _workers_now(self) -> int:
        try:
            there = ray.cluster_resources()
        except Exception as error:
            raise self._gone(error) from error
        return min(
            int(there.get(name, 0) / share) for name, share in self._resources.items() if share
        )

    def _put(self, thing: Any) -> Any:
        return ray.put(thing)

    def _gone(self, why: BaseException) -> RunError:
        return RunError(
            f"the Ray cluster is gone ({described(why)}); start it again, and go on with: umbel "
            "run --resume RUN"
        )

    def start(self, work: Work) -> None:
        """Send the app, and load it on every machine of the cluster.

        Raises:
            ConfigError: it does not load on one of them, or versions differ there.
        """
        if not self.workers:
            need = ", ".join(f"{name}={share:g}" for name, share in self._resources.items())
            raise ConfigError(f"nothing in the Ray cluster has {need}; add a node that has")
        shipment: Shipment = shipped(work)
        try:
            self._shipment = self._put(shipment)
            ray.get([self._probe(node["NodeID"]) for node in ray.nodes() if node["Alive"]])
        except UmbelError as error:
            raise _own(error) from error
        except Exception as error:
            raise ConfigError(
                f"the workers of the Ray cluster cannot load the app: {described(error)}; install "
                "Umbel, and what the app needs, where the workers run"
            ) from error

    def _probe(self, node: str) -> Any:
        there = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=False)
        tried = ray.remote(probe).options(num_cpus=0, scheduling_strategy=there)
        return tried.remote(self._shipment)

    def submit(self, group: Group) -> Future[Results]:
        outer: Future[Results] = Future()
        bare, contents = bare_group(group)
        try:
            with self._turn:
                ref = self._run.remote(self._shipment, bare, *map(self._content, contents))
            self._handed[outer] = ref
            ref.future().add_done_callback(lambda done: self._done(done, outer))
        except Exception as error:
            raise self._gone(error) from error
        return outer

    def _done(self, inner: "Future[Results]", outer: Future[Results]) -> None:
        if self._closed or not outer.set_running_or_notify_cancel():
            return
        error = inner.exception()
        if error is None:
            outer.set_result(inner.result())
        elif isinstance(error, UmbelError):
            outer.set_exception(_own(error))
        elif isinstance(error, ray.exceptions.WorkerCrashedError | ray.exceptions.NodeDiedError):
            outer.set_exception(WorkerLostError(f"{AGAIN + 1} workers died under it"))
        elif isinstance(error, ray.exceptions.RayTaskError):
            outer.set_exception(error)
        else:
            outer.set_exception(self._gone(error))

    def abandon(self, future: Future[Results]) -> None:
        ref = self._handed.pop(future, None)
        future.cancel()
        if ref is not None:
            ray.cancel(ref, force=True)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._contents.clear()
        self._shipment = None
        if self._owned:
            ray.shutdown()


def _own(error: BaseException) -> BaseException:
    """An error of Umbel's without the traceback that Ray writes into it."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, UmbelError) else error
