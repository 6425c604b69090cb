"""What a run is made of: built once, for every kind of round."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from flwr.serverapp import Grid

from umbel.core.records import Manifest
from umbel.server.delivered import DeliveredModel
from umbel.server.drive import sharing
from umbel.server.observers.base import Observer
from umbel.server.observers.checkpoints import Checkpoints
from umbel.server.observers.client_evaluation import ClientEvaluation
from umbel.server.observers.evaluation import CentralEvaluation
from umbel.server.observers.run_lines import RunLines
from umbel.server.observers.statistics import RunningStatistics
from umbel.server.output.progress import Progress
from umbel.server.output.rundir import RunDirectory
from umbel.server.population import Population
from umbel.server.private.statements import Statements
from umbel.server.release import Release
from umbel.server.requests import Requests
from umbel.server.roster import NodeRef
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.layout import averaged_buffers
from umbel.strategies.optimizers import ServerOptimizer


@dataclass(frozen=True)
class RunParts:
    """The parts of a run, which collect, release and observe its rounds.

    Attributes:
        job: what is trained, without the first model: the position holds the model.
        grid: the engine.
        run: where the run is written down.
        progress: where a person watches.
        processes: that nodes' updates are added up in before they are sent; 0 is none.
        manifest: of the parameters.
        synced_buffers: of the buffers that nodes average.
        optimizer: of the server.
        population: the nodes.
        statements: what nodes say of the privacy of their records.
        requests: makes the messages.
        model: from positions to models.
        release: makes the next model of what was collected.
        checkpoints: saves positions, and finds the last one again.
        central: evaluation on held-out examples.
        clients: evaluation by the nodes.
        observers: what sees each round, in this order.
    """

    job: TrainingSpec
    grid: Grid
    run: RunDirectory
    progress: Progress
    processes: int
    manifest: Manifest
    synced_buffers: Manifest
    optimizer: ServerOptimizer
    population: Population
    statements: Statements
    requests: Requests
    model: DeliveredModel
    release: Release
    checkpoints: Checkpoints
    central: CentralEvaluation
    clients: ClientEvaluation
    observers: Sequence[Observer]

    @classmethod
    def of(
        cls,
        job: TrainingSpec,
        grid: Grid,
        nodes: Sequence[NodeRef],
        run: RunDirectory,
        progress: Progress,
    ) -> Self:
        """The parts of a run of `job` by `nodes`, which are in a fixed order."""
        options = job.options
        manifest = Manifest.of(job.parameters)
        job = replace(job, parameters={})
        synced = Manifest.of(averaged_buffers(job.buffers, options.buffers))
        statistics = Manifest.of({name: job.buffers[name] for name in job.statistics})
        optimizer = job.optimizer or options.part("optimizer")
        sampler = job.sampler or options.part("sampler")
        population = Population(job, grid, nodes, sampler, manifest.size, progress)
        failures = population.failures
        statements = Statements(run, failures.names)
        processes = sharing(grid) if job.pooled else 0
        requests = Requests(job, grid, manifest, synced, processes)
        model = DeliveredModel(job, manifest, synced, statistics)
        checkpoints = Checkpoints(run, grid, job.stack.collect, options.rounds, progress)
        central = CentralEvaluation(job, model, run)
        clients = ClientEvaluation(job, grid, run, lambda: population.present, requests.to_evaluate)
        return cls(
            job=job,
            grid=grid,
            run=run,
            progress=progress,
            processes=processes,
            manifest=manifest,
            synced_buffers=synced,
            optimizer=optimizer,
            population=population,
            statements=statements,
            requests=requests,
            model=model,
            release=Release(job, optimizer, requests.share, failures, progress, run.log_path),
            checkpoints=checkpoints,
            central=central,
            clients=clients,
            observers=(
                RunningStatistics(job, grid, statistics),
                central,
                clients,
                RunLines(run, failures, statements, progress),
                checkpoints,  # last: a line that is written may be repeated, but never lost
            ),
        )
