"""Pools by name: `--pool NAME`, `--pool NAME://ADDRESS`, or a pool as a value.

    processes           worker processes of this machine (0 workers: none, in this process)
    threads             threads of this process
    dask://HOST:PORT    a Dask cluster
    ray                 the Ray cluster of this machine
    ray://HOST:PORT     a Ray cluster elsewhere
    NAME                registered in the app's task.py: register("pool", NAME, pool)

A package that is not installed is missed only by whoever asks for its pool.
"""

import concurrent.futures
import importlib
from collections.abc import Mapping
from typing import Any, TypeAlias

from umbel.core import registry
from umbel.core.errors import ConfigError
from umbel.core.options import choose
from umbel.server.pools.base import Pool
from umbel.server.pools.executors import ExecutorPool, Threads
from umbel.server.pools.here import Here
from umbel.server.pools.processes import ForkServer, Processes

PoolLike: TypeAlias = Pool | concurrent.futures.Executor | str

DEFAULT = "processes"
CLUSTERS = {"dask": "dask", "ray": "ray"}
"""Names of pools that are clusters, and the modules that know how to talk to them."""


def make_pool(
    asked: PoolLike,
    options: Mapping[str, Any],
    *,
    workers: int | None,
    processors: int,
    fork_server: ForkServer | None = None,
) -> Pool:
    """The pool of a run.

    Args:
        asked: a pool, an executor, or the name of one, with the address of its cluster behind
            `://` if it has one.
        options: of the run. A function that was registered as a pool gets them, with what was
            asked as `pool` and how many workers it shall have as `workers`.
        workers: how many were asked for; None if nobody said so.
        processors: of this machine: how many workers there are then.
        fork_server: started earlier, for worker processes; closed with them.

    Raises:
        ConfigError: no such pool, or a number of workers where a pool has its own.
    """
    count = processors if workers is None else workers
    if isinstance(asked, concurrent.futures.Executor):
        return ExecutorPool(asked, count)
    if isinstance(asked, str):
        name = asked.partition("://")[0].partition("[")[0]
        if workers is not None and name != asked:
            raise ConfigError(
                f"workers is {workers}, but {asked} has the workers of its cluster; leave it out"
            )
        more = {"pool": asked, "workers": count, _FORK_SERVER: fork_server}
        asked = registry.make("pool", name, {**options, **more})
    elif workers is not None:
        raise ConfigError(
            f"workers is {workers}, but the pool has its own workers; leave one of them out"
        )
    if not isinstance(asked, Pool):
        raise ConfigError(
            f"pool is a {type(asked).__name__}; it must be a Pool, a concurrent.futures.Executor "
            f"or one of {', '.join(registry.names('pool'))}"
        )
    return asked


def check_here(pool: str, what: str) -> None:
    """Refuse a pool by name that cannot run an object of this process.

    Args:
        pool: the name, with its address if it has one.
        what: why there is an object and no app's folder, as a sentence's middle.

    Raises:
        ConfigError: no such pool, or one whose workers are other processes.
    """
    name = pool.partition("://")[0].partition("[")[0]
    choose("--pool", name, registry.names("pool"))
    if name == DEFAULT or name in CLUSTERS:
        raise ConfigError(
            f"--pool is {pool}, but {what}, which other processes do not have; take --pool "
            "threads, or leave it out"
        )


_FORK_SERVER = "umbel.fork-server"


def _processes(options: Mapping[str, Any]) -> Pool:
    count = options["workers"]
    return Processes(count, options[_FORK_SERVER]) if count else Here()


def _threads(options: Mapping[str, Any]) -> Pool:
    return Threads(options["workers"])


def _cluster(module: str) -> Any:
    """A pool of a cluster: its module imports a package that is an extra."""

    def made(options: Mapping[str, Any]) -> Pool:
        pool: Pool = importlib.import_module(f"umbel.server.pools.{module}").from_options(options)
        return pool

    return made


for _name, _module in CLUSTERS.items():
    registry.provide("pool", _name, _cluster(_module))
registry.provide("pool", "processes", _processes)
registry.provide("pool", "threads", _threads)
