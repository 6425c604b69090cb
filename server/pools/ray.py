"""The pool on a Ray cluster: `ray`, the one that runs on this machine, or `ray://HOST:PORT`.

    engine -> object store   the app, once a run; each content once, however many nodes get it
    engine -> workers        groups of tasks; a worker is a process with one of the cluster's CPUs
    workers -> engine        replies, through the object store

Ray runs the groups of a worker that dies elsewhere, up to three times.
"""

import time
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.server.embedded.packing import Packed
from umbel.server.pools.base import Group, Pool, Results, Work, WorkerLostError
from umbel.server.pools.shipping import bare_group, probe, run_shipped, shipped

try:
    import ray
except ImportError as _missing:
    raise ConfigError(
        'the pool ray needs Ray, which is not installed: pip install "umbel[ray]"'
    ) from _missing

TRIES = 3
COUNT_EVERY_S = 1.0
"""How often the cluster is asked how many workers there are."""
PROBE_S = 300.0


def from_options(options: Mapping[str, Any]) -> Pool:
    """The pool of `--pool ray` and `--pool ray://HOST:PORT`.

    Raises:
        ConfigError: there is no such cluster.
    """
    asked = str(options["pool"])
    if ray.is_initialized():
        return RayPool()
    try:
        ray.init(
            address="auto" if asked == "ray" else asked,
            namespace="umbel",
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, OSError, TimeoutError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"there is no Ray cluster at {asked} ({described(error)}); start one with: "
            "ray start --head"
        ) from error
    return RayPool(owned=True)


class RayPool(Pool):
    """Runs groups on the Ray cluster that this process is connected to.

    Args:
        owned: disconnect when the pool is closed.
        resources: of a worker while it runs a group, as for `ray.remote`: `{"num_gpus": 0.5}`.
    """

    def __init__(self, *, owned: bool = False, resources: Mapping[str, Any] | None = None) -> None:
        self._owned, self._resources = owned, dict(resources or {"num_cpus": 1})
        self._remote: Any = ray.remote(run_shipped).options(max_retries=TRIES, **self._resources)
        self._shipment: Any = None
        self._contents: dict[int, tuple[Packed, Any]] = {}
        self._refs: weakref.WeakKeyDictionary[Future[Results], Any] = weakref.WeakKeyDictionary()
        self._count, self._counted = 0, 0.0
        self._closed = False

    @property
    def workers(self) -> int:
        now = time.monotonic()
        if now - self._counted >= COUNT_EVERY_S:
            try:
                self._count = int(ray.cluster_resources().get("CPU", 0))
            except Exception as error:
                raise self._gone(error) from error
            self._counted = now
        return self._count

    def _gone(self, error: BaseException) -> RunError:
        return RunError(
            f"the Ray cluster is gone ({described(error)}); start it again, and go on with: "
            "umbel run --resume RUN"
        )

    def start(self, work: Work) -> None:
        """Put the app into the object store, and load it on a worker.

        Raises:
            ConfigError: it does not load there, or versions differ.
        """
        self._shipment = ray.put(shipped(work))
        try:
            tried: Any = ray.remote(probe).options(**self._resources)
            ray.get(tried.remote(self._shipment), timeout=PROBE_S)
        except UmbelError as error:
            raise ConfigError(str(cause_of(error))) from error
        except Exception as error:
            raise ConfigError(
                f"the workers of the Ray cluster cannot load the app: {described(cause_of(error))};"
                " install Umbel, and what the app needs, where they run"
            ) from error

    def submit(self, group: Group) -> Future[Results]:
        outer: Future[Results] = Future()
        bare, contents = bare_group(group)
        references = [self._content(content) for content in contents]
        try:
            reference = self._remote.remote(self._shipment, bare, *references)
        except Exception as error:
            raise self._gone(error) from error
        self._refs[outer] = reference
        reference.future().add_done_callback(lambda inner: self._done(inner, outer))
        return outer

    def _content(self, content: Packed) -> Any:
        """The content in the object store; what is sent no longer is let go."""
        if id(content) not in self._contents:
            self._contents = {id(content): (content, ray.put(content))}
        return self._contents[id(content)][1]

    def _done(self, inner: "Future[Any]", outer: Future[Results]) -> None:
        """A group is done; Ray calls this in a thread of its own."""
        if outer.cancelled() or self._closed:
            return
        try:
            outer.set_result(inner.result())
        except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
            outer.set_exception(WorkerLostError(f"{TRIES + 1} workers died under it: {error}"))
        except Exception as error:
            cause = cause_of(error)
            mine = isinstance(cause, UmbelError)
            outer.set_exception(ConfigError(str(cause)) if mine else cause)

    def abandon(self, future: Future[Results]) -> None:
        reference = self._refs.pop(future, None)
        future.cancel()
        if reference is not None:
            ray.cancel(reference, force=True)

    def rest(self) -> None:
        """Let the last contents go."""
        self._contents.clear()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._contents.clear()
        self._shipment = None
        if self._owned:
            ray.shutdown()


def cause_of(error: BaseException) -> BaseException:
    """What a worker raised, without what Ray says around it."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
