"""The pool on a Spark cluster: `spark://HOST:PORT`, `local[N]`, `local-cluster[N,CORES,MIB]`.

    driver -> executors   the app and each content as broadcasts, once an executor
    driver -> executors   a group is a job of one task; Python workers keep the app loaded
    executors -> driver   replies, with the result of the job

Spark runs the task of an executor that dies elsewhere (`spark.task.maxFailures`, four times).
"""

import functools
import os
import pickle
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from umbel.core.errors import ConfigError, RunError, UmbelError, described
from umbel.server.embedded.packing import Packed
from umbel.server.pools.base import Group, Pool, Results, Work
from umbel.server.pools.shipping import Shipment, bare_group, probe, run_shipped, shipped

try:
    from pyspark import SparkContext
    from pyspark.sql import SparkSession
except ImportError as _missing:
    raise ConfigError(
        'the pool spark needs Spark, which is not installed: pip install "umbel[spark]", '
        "and Java 17 or newer"
    ) from _missing

COUNT_EVERY_S = 1.0
AHEAD = 2
"""Groups for each core that are handed over at the same time: a job takes a tenth of a second to
get there and back."""
THREADS = 64
"""Jobs that are waited for at the same time, at most."""


def from_options(options: Mapping[str, Any]) -> Pool:
    """The pool of `--pool spark://HOST:PORT` and of the masters that Spark starts itself.

    Raises:
        ConfigError: Java is missing, or there is no such master.
    """
    asked = str(options["pool"])
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else `python3`, whichever that is
    builder: Any = SparkSession.builder.master(asked).appName("umbel")
    builder = builder.config("spark.ui.enabled", "false").config("spark.log.level", "ERROR")
    if asked.startswith(("local", "spark://127.0.0.1", "spark://localhost")):
        for name in ("spark.driver.host", "spark.driver.bindAddress"):
            builder = builder.config(name, "127.0.0.1")
    try:
        return SparkPool(builder.getOrCreate(), owned=True)
    except UmbelError:
        raise
    except Exception as error:
        raise ConfigError(
            f"there is no Spark at {asked} ({described(error)}); check the address, and that "
            "java -version says 17 or newer"
        ) from error


class SparkPool(Pool):
    """Runs groups on the executors of a Spark session.

    Args:
        session: connected to the cluster.
        owned: stop it with the pool.
    """

    def __init__(self, session: "SparkSession", *, owned: bool = False) -> None:
        self._session, self._owned = session, owned
        self._context: SparkContext = session.sparkContext
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="umbel-spark")
        self._shipment: Any = None
        self._contents: dict[int, tuple[Packed, Any]] = {}
        self._count, self._counted = 0, 0.0
        self._closed = False

    @property
    def workers(self) -> int:
        now = time.monotonic()
        if now - self._counted >= COUNT_EVERY_S:
            try:
                self._count = self._context.defaultParallelism
            except Exception as error:
                raise RunError(
                    f"Spark is gone ({described(error)}); start it again, and go on with: "
                    "umbel run --resume RUN"
                ) from error
            self._counted = now
        return self._count

    @property
    def slots(self) -> int:
        return min(THREADS, max(1, AHEAD * self.workers))

    def start(self, work: Work) -> None:
        """Send the app, and load it in an executor.

        Raises:
            ConfigError: it does not load there, or versions differ.
        """
        self._shipment = self._context.broadcast(shipped(work))
        try:
            said = self._run(functools.partial(_probe, self._shipment))
        except UmbelError:
            raise
        except Exception as error:
            raise ConfigError(
                f"the executors cannot load the app: {described(error)}; install Umbel, and what "
                "the app needs, where they run, and name that Python in PYSPARK_PYTHON"
            ) from error
        assert said is None

    def submit(self, group: Group) -> Future[Results]:
        bare, contents = bare_group(group)
        sent = [self._content(content) for content in contents]
        payload = pickle.dumps(bare, protocol=5)
        task = functools.partial(_run_group, self._shipment, sent, payload)
        return self._threads.submit(self._run, task)

    def _content(self, content: Packed) -> Any:
        """The content as a broadcast; what is sent no longer is let go."""
        if id(content) not in self._contents:
            self._contents = {id(content): (content, self._context.broadcast(content))}
        return self._contents[id(content)][1]

    def _run(self, task: Any) -> Any:
        """One job of one task; what it gave."""
        (answer,) = self._context.parallelize([0], 1).mapPartitions(task).collect()
        refused, result = pickle.loads(answer)
        if refused:
            raise ConfigError(refused)
        return result

    def rest(self) -> None:
        """Let the last contents go."""
        self._contents.clear()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._contents.clear()
        if self._owned:
            self._session.stop()


def _probe(shipment: Any, _: Iterator[int]) -> Iterator[bytes]:
    yield _answered(functools.partial(probe, _value(shipment)))


def _run_group(shipment: Any, contents: Any, payload: bytes, _: Iterator[int]) -> Iterator[bytes]:
    values = [content.value for content in contents]
    yield _answered(
        functools.partial(run_shipped, _value(shipment), pickle.loads(payload), *values)
    )


def _value(shipment: Any) -> Shipment:
    value: Shipment = shipment.value
    return value


def _answered(what: Any) -> bytes:
    """The result, or the sentence by which it was refused: Spark would wrap an exception."""
    try:
        return pickle.dumps(("", what()), protocol=5)
    except UmbelError as error:
        return pickle.dumps((str(error), None), protocol=5)
