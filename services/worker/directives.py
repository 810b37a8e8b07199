"""What the planner may tell a replica, applied to its engine from the next step on."""

import logging

from protos import planner_pb2
from services.worker.engine_api import Engine
from services.worker.generations import Generations

__all__ = ["Directives"]

_log = logging.getLogger(__name__)


class Directives:
    """Applies directives. One for a request or attempt that no longer runs here is forgotten: it came too late."""

    def __init__(self, engine: Engine, generations: Generations) -> None:
        self._engine = engine
        self._generations = generations

    async def apply(self, directive: planner_pb2.Directive) -> None:
        """Apply one directive."""
        kind = directive.WhichOneof("directive")
        if kind == "promote":
            self._promote(directive.promote)
        elif kind == "batch_parameters":
            self._batch_parameters(directive.batch_parameters)
        elif kind == "release":
            await self._release(directive.release)
        else:
            _log.warning("directive %d is of a kind this worker does not know", directive.seq)

    def _promote(self, promote: planner_pb2.Promote) -> None:
        generation = self._generations.get(promote.request_id)
        if generation is not None and generation.claimed.attempt == promote.attempt and not generation.promised:
            generation.promote(promote.tier, promote.verdict)

    def _batch_parameters(self, parameters: planner_pb2.BatchParameters) -> None:
        cap_ms = parameters.duration_cap_ms
        self._engine.set_duration_cap(cap_ms / 1000 if cap_ms > 0 else None)
        if parameters.promises_wanted:
            self._engine.expect_promises()

    async def _release(self, release: planner_pb2.ReleaseRequestId) -> None:
        """The request leaves this replica for the shared queue, unless its prefill has begun."""
        generation = self._generations.get(release.request_id)
        if generation is not None and generation.claimed.attempt == release.attempt and not generation.started:
            await generation.hand_back()
