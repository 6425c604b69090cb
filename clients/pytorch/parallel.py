"""One job on several devices of its node: data-parallel training in a team of processes.

    trainer    -> each rank   weights, examples, job         (pickled, over a pipe of this machine)
    rank 0..n  <-> each other gradients, averaged            (gloo on CPUs, NCCL on GPUs; loopback)
    rank 0     -> trainer     weights after training, the node's memory

Every rank works on its part of each batch, and losses are weighted so that the averaged gradient
is that of the whole batch: the result is that of one process, to float tolerance. (Two things
see only a rank's own part: dropout, and batch norm on CPUs; on GPUs batch norm is synchronised.)
Every rank has the node's memory, and what rank 0 makes of it is kept.
A team is started by its first job and kept; it ends with its trainer or its process.

To train models that one device cannot hold, `spread` is the one function to change.
"""

import multiprocessing
import os
import pickle
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from umbel.clients.pytorch.loop import Share
from umbel.clients.trainers.base import Job, Trained, Weights
from umbel.core.errors import ConfigError, RunError, UmbelError

Work = Callable[[Weights, Any, Job, Share], Trained]
"""What a rank does with a job: its own share of it."""


def spread(module: nn.Module, device: torch.device) -> nn.Module:
    """How a model lies over the team's devices: a whole copy on each, gradients averaged."""
    if device.type == "cuda":
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]  # torch has no types for it
        return DistributedDataParallel(synchronised, device_ids=[device])
    return DistributedDataParallel(module)


def rank_device(share: Share, cuda: bool) -> torch.device:
    """The device of one rank: its own GPU, or the CPU for all."""
    return torch.device("cuda", share.rank) if cuda else torch.device("cpu")


class ProcessGroup:
    """Processes that train together; started when needed, and empty in a copy."""

    def __init__(self) -> None:
        self._group: _Group | None = None

    def train(
        self, work: Work, weights: Weights, examples: Any, job: Job, *, world: int, cuda: bool
    ) -> Trained:
        """Train with `world` processes.

        Args:
            work: what each rank does; it has to be picklable.
            cuda: whether each rank has a GPU.

        Raises:
            ConfigError: other processes cannot import the model, or must not be started here.
            RunError: a process of the team died.
        """
        group = self._group
        if group is None or not group.serves(world, cuda):
            self.close()
            group = self._group = _start(work, world, cuda)
        try:
            return group.train(weights, examples, job)
        except BaseException:
            self.close()  # ranks may be waiting for one that will never come
            raise

    def close(self) -> None:
        """End the processes."""
        if self._group is not None:
            self._group.end()
            self._group = None

    def __reduce__(self) -> tuple[type["ProcessGroup"], tuple[()]]:
        return ProcessGroup, ()


@dataclass(frozen=True)
class _Rank:
    process: BaseProcess
    pipe: "Connection[Any, Any]"


class _Group:
    def __init__(self, ranks: list[_Rank], cuda: bool, meeting: Path) -> None:
        self.ranks = ranks
        self.world = len(ranks)
        self.cuda = cuda
        self.held: Any = None
        self.end = weakref.finalize(self, _end, ranks, meeting)

    def serves(self, world: int, cuda: bool) -> bool:
        """Whether the processes are those that are wanted, and alive."""
        alive = all(rank.process.is_alive() for rank in self.ranks)
        return alive and (self.world, self.cuda) == (world, cuda)

    def train(self, weights: Weights, examples: Any, job: Job) -> Trained:
        known = examples is self.held
        request = (weights, None if known else examples, job)
        blob = _pickled(request, "the node's examples")
        for number, rank in enumerate(self.ranks):
            try:
                rank.pipe.send_bytes(blob)
            except OSError:
                raise self._death(number) from None
        self.held = examples
        results, memory = self._results()
        job.memory.clear()
        job.memory.update(memory)
        loss = sum(result.metrics["loss"] for result in results) / self.world
        return replace(results[0], metrics={**results[0].metrics, "loss": loss})

    def _results(self) -> tuple[list[Trained], RecordDict]:
        """One result a rank, and the node's memory as rank 0 leaves it.

        The first that fails speaks for all.
        """
        results: dict[int, Trained] = {}
        memory = RecordDict()
        waiting = {id(rank.pipe): number for number, rank in enumerate(self.ranks)}
        while waiting:
            for pipe in wait([self.ranks[number].pipe for number in waiting.values()]):
                number = waiting.pop(id(pipe))
                try:
                    result, kept = pickle.loads(self.ranks[number].pipe.recv_bytes())
                except (EOFError, OSError):
                    raise self._death(number) from None
                if isinstance(result, BaseException):
                    raise result
                results[number] = result
                memory = kept if number == 0 else memory
        return [results[number] for number in range(self.world)], memory

    def _death(self, number: int) -> RunError:
        return RunError(
            f"process {number} of the {self.world} that train together died; look for its last "
            "words above, or train with fewer (gpus, local-processes)"
        )


def _pickled(value: Any, what: str) -> bytes:
    try:
        return pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{what} cannot be sent to the processes that train together ({error}); define "
            "models, losses and data sets at the top level of a module, or set gpus=1 and "
            "local-processes=1"
        ) from error


def _start(work: Work, world: int, cuda: bool) -> _Group:
    blob = _pickled(work, "the trainer")
    context = multiprocessing.get_context("spawn")
    meeting = Path(tempfile.mkdtemp(prefix="umbel-team-"))
    threads = max(1, torch.get_num_threads() // world)
    ranks: list[_Rank] = []
    for number in range(world):
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_serve,
            args=(blob, Share(number, world), str(meeting / "store"), cuda, theirs, threads),
            daemon=True,
        )
        try:
            process.start()
        except AssertionError as error:
            _end(ranks, meeting)
            raise ConfigError(
                "several GPUs or local processes cannot be used by a worker process; run with "
                "workers=1 (or none), so that the node trains in the main process"
            ) from error
        theirs.close()
        ranks.append(_Rank(process, ours))
    return _Group(ranks, cuda, meeting)


def _end(ranks: list[_Rank], meeting: Path) -> None:
    for rank in ranks:
        rank.pipe.close()
        rank.process.terminate()
    for rank in ranks:
        rank.process.join()
    shutil.rmtree(meeting, ignore_errors=True)


def _serve(
    blob: bytes,
    share: Share,
    meeting: str,
    cuda: bool,
    pipe: "Connection[Any, Any]",
    threads: int,
) -> None:
    """The life of one rank: it ends when its pipe does."""
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    torch.set_num_threads(threads)
    if cuda:
        torch.cuda.set_device(share.rank)
    distributed.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{meeting}",
        rank=share.rank,
        world_size=share.world,
    )
    held: Any = None
    work: Work | None = None
    while True:
        try:
            weights, examples, job = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            return
        held = held if examples is None else examples
        answer: Any
        memory = None
        try:
            work = pickle.loads(blob) if work is None else work
            answer = work(weights, held, job, share)
            memory = job.memory if share.rank == 0 else None
        except UmbelError as error:
            answer = error
        except Exception as error:
            answer = RunError(f"training failed with {type(error).__name__}: {error}")
        pipe.send_bytes(pickle.dumps((answer, memory)))
