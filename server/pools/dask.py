"""The pool on a Dask cluster: `dask://HOST:PORT`, or an existing `distributed.Client`.

    engine -> scheduler   the app, once a run; each content once, however many nodes get it
    worker -> worker      the same, from whoever has it
    engine -> scheduler   groups of tasks
    worker -> engine      replies, directly where the network allows it

Dask runs the groups of a worker that dies elsewhere. A worker is a process: of its threads one
works at a time, because random generators belong to a process. Workers may come and go.
"""

import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.server.pools.base import Group, Pool, Results, Work, WorkerLostError
from umbel.server.pools.cluster import ClusterPool
from umbel.server.pools.shipping import Shipment, bare_group, probe, run_shipped, shipped

try:
    import distributed
except ImportError as _missing:
    raise ConfigError(
        'the pool dask needs Dask, which is not installed: pip install "umbel[dask]"'
    ) from _missing

CONNECT_S = 20.0
"""Seconds to find the scheduler, and a first worker."""
TRIES = 5
"""How often something is sent again that was lost with a worker."""
PAUSE_S = 1.0
"""Seconds in between, in which the scheduler hears of that."""
LARGE_GROUP = 1 << 20
"""Bytes of nodes' states from which a group travels as data, and not within Dask's own messages."""


def from_options(options: Mapping[str, Any]) -> Pool:
    """The pool of `--pool dask://HOST:PORT`; with TLS where Dask's configuration has a certificate.

    Raises:
        ConfigError: no address, or nobody there.
    """
    import dask

    for name in list(logging.root.manager.loggerDict):  # each has a level of its own
        if name.split(".")[0] == "distributed":
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what matters becomes a sentence
    _, _, address = str(options["pool"]).partition("://")
    if not address:
        raise ConfigError(
            "the pool dask needs the address of a scheduler, as in --pool dask://HOST:8786; "
            "start one with: dask scheduler"
        )
    secure = dask.config.get("distributed.comm.tls.client.cert", None) is not None
    url = f"{'tls' if secure else 'tcp'}://{address}"
    try:
        client = distributed.Client(
            url, timeout=CONNECT_S, set_as_default=False, direct_to_workers=True, name="umbel"
        )
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"there is no Dask scheduler at {url} ({described(error)}); start one with: "
            "dask scheduler, or correct the address"
        ) from error
    return DaskPool(client, owned=True)


class DaskPool(ClusterPool):
    """Runs groups on the workers of a Dask cluster.

    Args:
        client: connected to the cluster.
        owned: close it with the pool.
        resources: that a group needs of a worker, as in `dask worker --resources "GPU=1"`.

    Raises:
        ConfigError: no worker comes.
    """

    def __init__(
        self,
        client: "distributed.Client",
        *,
        owned: bool = False,
        resources: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self._client, self._owned = client, owned
        self._where = str(client.scheduler.address)
        self._resources = dict(resources or {}) or None
        self._shipment: Shipment | None = None
        self._sent_shipment: Any = None
        try:
            self._client.wait_for_workers(1, timeout=CONNECT_S)
        except (TimeoutError, OSError) as error:
            if owned:
                self._client.close(timeout=2)
            raise ConfigError(
                f"the Dask scheduler at {self._where} has no worker; start one with: dask worker "
                f"{self._where} --nthreads 1"
            ) from error

    def _workers_now(self) -> int:
        try:
            return len(self._client.nthreads())
        except (OSError, TimeoutError, ValueError) as error:
            raise self._gone(error) from error

    def _gone(self, why: BaseException) -> RunError:
        return RunError(
            f"the Dask scheduler at {self._where} is gone ({_first_line(why)}); start it again "
            "with its workers, and go on with: umbel run --resume RUN"
        )

    def start(self, work: Work) -> None:
        """Send the app, and load it on every worker that is there.

        Raises:
            ConfigError: it does not load on one of them, or versions differ there.
        """
        self._shipment = shipped(work)
        try:
            self._sent_shipment = self._put(self._shipment)
            self._client.gather(
                [
                    self._client.submit(probe, self._sent_shipment, workers=[worker], pure=False)
                    for worker in self._client.nthreads()
                ]
            )
        except UmbelError:
            raise
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"a worker of {self._where} has no module {error.name!r}; install Umbel, and what "
                "the app needs, where the workers run"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"the workers of {self._where} cannot load the app: {described(error)}"
            ) from error

    def _put(self, thing: Any) -> Any:
        """The thing on a worker, from which others get it; tried again if that has just died."""
        for left in reversed(range(TRIES)):
            try:
                return self._client.scatter([thing], hash=False, direct=False)[0]
            except Exception:
                if not left or self._client.status != "running":
                    raise
                threading.Event().wait(PAUSE_S)
        raise AssertionError

    def submit(self, group: Group) -> Future[Results]:
        outer: Future[Results] = Future()
        try:
            self._begin(group, outer, TRIES)
        except Exception as error:
            raise self._gone(error) from error
        return outer

    def _begin(self, group: Group, outer: Future[Results], tries: int) -> None:
        bare, contents = bare_group(group)
        large = sum(len(task.state or b"") for task in bare) > LARGE_GROUP
        with self._turn:
            arguments = [self._content(content) for content in contents]
            inner = self._client.submit(
                run_shipped,
                self._sent_shipment,
                self._put(bare) if large else bare,
                *arguments,
                pure=False,
                resources=self._resources,
            )
        self._handed[outer] = inner
        inner.add_done_callback(lambda done: self._done(done, group, outer, tries))

    def _done(self, inner: Any, group: Group, outer: Future[Results], tries: int) -> None:
        """A group is done; Dask calls this in a thread of its own."""
        if outer.cancelled() or self._closed:
            return
        try:
            outer.set_result(inner.result(timeout=CONNECT_S * 30))
        except UmbelError as error:
            outer.set_exception(error)
        except distributed.scheduler.KilledWorker as error:
            said = f"{error.allowed_failures + 1} workers died under it"
            outer.set_exception(WorkerLostError(said))
        except Exception as error:
            lost = isinstance(error, distributed.client.FutureCancelledError)
            if lost and tries and self._client.status == "running":
                self._send_again(group, outer, tries - 1)  # whoever held its contents has died
                return
            outer.set_exception(self._gone(error) if lost else error)

    def _send_again(self, group: Group, outer: Future[Results], tries: int) -> None:
        try:
            with self._turn:
                self._contents.clear()
            self._sent_shipment = self._put(self._shipment)
            self._begin(group, outer, tries)
        except Exception as error:
            outer.set_exception(self._gone(error))

    def abandon(self, future: Future[Results]) -> None:
        inner = self._handed.pop(future, None)
        future.cancel()
        if inner is not None:
            inner.cancel(force=True)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._contents.clear()
        self._sent_shipment = None
        if self._owned:
            self._client.close(timeout=5)


def _first_line(error: BaseException) -> str:
    """What an error says in one line, without where it was raised."""
    return (str(error).splitlines() or [type(error).__name__])[0]
