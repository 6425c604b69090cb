"""The messages of a round: the model, and what layers tell the nodes."""

from collections.abc import Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from umbel.core.contents import take_record
from umbel.core.held import buffer_of
from umbel.core.records import Manifest, from_array, record_of, to_array
from umbel.server.base_grid import BaseGrid
from umbel.server.checkpoint import Position
from umbel.server.drive import ROUND_TTL
from umbel.server.queries import pool_requests, public_arrays
from umbel.server.roster import NodeRef
from umbel.server.training_spec import TrainingSpec
from umbel.strategies.collect import BUFFERS
from umbel.strategies.contexts import SENT
from umbel.strategies.layout import CONFIG, MODEL, PARAMETERS
from umbel.strategies.transform import Facts


class Requests:
    """Makes the messages of rounds.

    Args:
        job: what is trained.
        grid: the engine.
        manifest: of the parameters.
        synced_buffers: of the buffers that nodes average, which travel too.
        processes: ask by process, if above 0.
    """

    def __init__(
        self,
        job: TrainingSpec,
        grid: Grid,
        manifest: Manifest,
        synced_buffers: Manifest,
        processes: int,
    ) -> None:
        self._job, self._grid, self._processes = job, grid, processes
        self._manifest, self._synced_buffers = manifest, synced_buffers
        self._packed: tuple[Tensor, Array] | None = None

    def to_train(
        self, position: Position, number: int, cohort: Sequence[NodeRef], facts: Facts
    ) -> list[Message]:
        """Round `number`'s; `facts` are those of an update before the stack."""
        config = self._config(number)
        told = self._job.stack.broadcast(position.layers, facts)
        for name, value in told.scalars.items():
            config[name] = value
        model = self._model(position, position.parameters)
        model |= {SENT + name: to_array(value) for name, value in told.vectors.items()}
        if self._processes:
            return pool_requests(model, config, cohort, self._processes)
        return self._messages("train", model, config, cohort)

    def to_evaluate(self, position: Position, nodes: Sequence[NodeRef]) -> list[Message]:
        """About the model that the run would end with now."""
        model = self._model(position, position.delivered)
        return self._messages("evaluate", model, self._config(position.round), nodes)

    def learning_rate(self, number: int) -> float | None:
        """The nodes' in round `number`, after the schedule; None leaves it to them."""
        return self._job.options.rate_in(number, self._job.learning_rate)

    def share(self, vector: Tensor) -> Tensor:
        """The vector over the bytes that are sent of it, so that they do not take room twice."""
        array = self._array(vector)
        shared = from_array(array)
        if shared.dtype != vector.dtype:  # it travels as another type
            return vector
        self._packed = (shared, array)
        return shared

    def size_of(self, requests: Sequence[Message]) -> int:
        """Bytes of the models in these messages, and of what layers send beside them."""
        if not requests:
            return 0
        model = take_record(requests[0].content, MODEL, ArrayRecord)
        sent = sum(len(buffer_of(array)) for name, array in model.items() if name.startswith(SENT))
        size = self._manifest.size * self._manifest.dtype.itemsize
        return len(requests) * (size + self._synced_buffers.size * 4 + sent)

    def _config(self, number: int) -> ConfigRecord:
        return ConfigRecord({"round": number, "manifest": self._manifest.digest})

    def _model(self, position: Position, vector: Tensor) -> dict[str, Array]:
        model = {PARAMETERS: self._pack(vector)} | public_arrays(position.public)
        if self._synced_buffers.size:
            model[BUFFERS] = to_array(position.buffers)
        return model

    def _messages(
        self, kind: str, model: dict[str, Array], config: ConfigRecord, nodes: Sequence[NodeRef]
    ) -> list[Message]:
        content = RecordDict({MODEL: record_of(model), CONFIG: config})
        group = str(config["round"])
        return [
            Message(content, node.node_id, kind, ttl=ROUND_TTL, group_id=group) for node in nodes
        ]

    def _pack(self, vector: Tensor) -> Array:
        if self._packed is not None and self._packed[0] is vector:
            return self._packed[1]
        return self._array(vector)

    def _array(self, vector: Tensor) -> Array:
        """The vector as it is sent; an engine of Umbel's may lay it where its nodes can map it."""
        return self._grid.array(vector) if isinstance(self._grid, BaseGrid) else to_array(vector)
