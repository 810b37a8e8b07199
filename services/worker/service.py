"""The gRPC face of a worker: tokens to admission processes, and operations."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import asdict

import grpc.aio

from protos import worker_pb2, worker_pb2_grpc
from services.common.errors import FieldViolation, InvalidRequestError
from services.common.wire import perf_model_to_wire
from services.core.fit import Sample
from services.worker.engine_api import Engine
from services.worker.generations import Generations
from services.worker.outbox import Outbox
from services.worker.state_mirror import StateMirror

__all__ = ["WorkerService"]


class WorkerService(worker_pb2_grpc.WorkerServicer):
    """Answers `slosserve.v1.Worker`."""

    def __init__(
        self,
        *,
        replica_id: str,
        engine_name: str,
        engine: Engine,
        outbox: Outbox,
        generations: Generations,
        mirror: StateMirror,
        recent: Sequence[Sample],
        drain: Callable[[float | None], Awaitable[int]],
        is_draining: Callable[[], bool],
    ) -> None:
        """`recent` are the batches executed last, oldest first.

        `drain(grace_s)` returns how many requests it had to leave unfinished; None is the configured grace.
        """
        self._replica_id = replica_id
        self._engine_name = engine_name
        self._engine = engine
        self._outbox = outbox
        self._generations = generations
        self._mirror = mirror
        self._recent = recent
        self._drain = drain
        self._is_draining = is_draining

    async def Subscribe(
        self,
        request: worker_pb2.SubscribeRequest,
        context: grpc.aio.ServicerContext[worker_pb2.SubscribeRequest, worker_pb2.TokenBatch],
    ) -> AsyncIterator[worker_pb2.TokenBatch]:
        """Stream the output of one admission process's requests; the newest subscription of an id wins."""
        if not request.admission_id:
            raise InvalidRequestError(FieldViolation("admission_id", "must not be empty"))
        batches = self._outbox.subscribe(request.admission_id)
        try:
            async for batch in batches:
                yield batch
        finally:
            await batches.aclose()

    async def Attach(
        self,
        request: worker_pb2.AttachRequest,
        context: grpc.aio.ServicerContext[worker_pb2.AttachRequest, worker_pb2.AttachResponse],
    ) -> worker_pb2.AttachResponse:
        """Send a request's output to this admission process, again from a token on."""
        if not request.admission_id:
            raise InvalidRequestError(FieldViolation("admission_id", "must not be empty"))
        return self._outbox.attach(
            request.request_id, request.admission_id, request.from_token, max(0, request.grace_us) / 1e6
        )

    async def Cancel(
        self,
        request: worker_pb2.WorkerCancelRequest,
        context: grpc.aio.ServicerContext[worker_pb2.WorkerCancelRequest, worker_pb2.WorkerCancelResponse],
    ) -> worker_pb2.WorkerCancelResponse:
        """End a request; its KV blocks are free within one engine step."""
        cancelled = await self._generations.cancel(request.request_id, request.attempt, request.reason)
        return worker_pb2.WorkerCancelResponse(cancelled=cancelled)

    async def Drain(
        self,
        request: worker_pb2.DrainRequest,
        context: grpc.aio.ServicerContext[worker_pb2.DrainRequest, worker_pb2.DrainResponse],
    ) -> worker_pb2.DrainResponse:
        """Finish what runs (grace 0: as long as configured), leave the rest to other replicas, then stop."""
        unfinished = await self._drain(request.grace_s if request.grace_s > 0 else None)
        return worker_pb2.DrainResponse(unfinished=unfinished)

    async def Status(
        self,
        request: worker_pb2.StatusRequest,
        context: grpc.aio.ServicerContext[worker_pb2.StatusRequest, worker_pb2.StatusResponse],
    ) -> worker_pb2.StatusResponse:
        """The replica as of the last engine step."""
        info, latest = self._engine.info, self._mirror.latest
        status = worker_pb2.StatusResponse(
            replica_id=self._replica_id,
            engine=self._engine_name,
            model=info.model,
            free_blocks=info.total_blocks,
            total_blocks=info.total_blocks,
            perf_model=perf_model_to_wire(self._mirror.perf_model),
            r2_heldout=self._engine.profile.r2_heldout,
            draining=self._is_draining(),
        )
        if latest is not None:
            status.running, status.waiting = latest.running, latest.waiting
            status.free_blocks, status.steps = latest.free_blocks, latest.step
            status.best_effort_running, status.preemptions = latest.best_effort, latest.preemptions
        return status

    async def Profile(
        self,
        request: worker_pb2.ProfileRequest,
        context: grpc.aio.ServicerContext[worker_pb2.ProfileRequest, worker_pb2.ProfileResponse],
    ) -> worker_pb2.ProfileResponse:
        """The batches behind the performance model, and those executed last."""
        profile = self._engine.profile
        return worker_pb2.ProfileResponse(
            replica_id=self._replica_id,
            fitted=perf_model_to_wire(profile.model),
            current=perf_model_to_wire(self._mirror.perf_model),
            profiled=[_measured(batch.sample, heldout=batch.heldout) for batch in profile.batches],
            recent=[_measured(sample) for sample in self._recent],
            samples=profile.samples,
        )


def _measured(sample: Sample, *, heldout: bool = False) -> worker_pb2.MeasuredBatch:
    return worker_pb2.MeasuredBatch(**asdict(sample.shape), seconds=sample.seconds, heldout=heldout)
