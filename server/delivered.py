"""From where a run stands to the model that it would end with."""

from collections.abc import Mapping

from torch import Tensor

from umbel.core.records import Manifest, Tree
from umbel.server.checkpoint import Position
from umbel.server.training_spec import TrainingSpec


class DeliveredModel:
    """Puts the flat vectors of a position back under their names.

    Args:
        job: what is trained.
        manifest: of the parameters.
        synced_buffers: of the buffers that nodes average.
        statistics: of the running statistics that nodes show.
    """

    def __init__(
        self, job: TrainingSpec, manifest: Manifest, synced_buffers: Manifest, statistics: Manifest
    ) -> None:
        self._buffers, self._manifest = job.buffers, manifest
        self._synced_buffers, self._statistics = synced_buffers, statistics

    def of(self, position: Position) -> tuple[Tree, Tree]:
        """Parameters and buffers of the model that the run would end with now."""
        return self._tree(position.delivered, position.buffers, position.public)

    def best(self, position: Position) -> tuple[Tree, Tree]:
        """Those of the best model so far, or of the last one where nobody keeps track."""
        if position.best is None:
            return self.of(position)
        return self._tree(position.best.parameters, position.best.buffers, position.public)

    def _tree(
        self, vector: Tensor, buffers: Tensor, public: Mapping[str, Tensor]
    ) -> tuple[Tree, Tree]:
        own = {name: value for name, value in public.items() if name in self._buffers}
        mixed = {**self._buffers, **own}
        if self._synced_buffers.size:
            mixed |= self._synced_buffers.unflatten(buffers)
        elif self._statistics.size:
            mixed |= self._statistics.unflatten(buffers)
        return self._manifest.unflatten(vector), mixed
