"""What a worker writes about itself in its lease: who it is at once, what it can hold once the engine has started."""

from protos import router_pb2
from services.common.wire import perf_model_to_wire
from services.worker.engine_api import Engine
from services.worker.settings import WorkerSettings

__all__ = ["capacity_of", "identity_of"]

_ROLES = ("prefill", "decode")


def identity_of(settings: WorkerSettings, *, port: int, planner: str, started_us: int) -> router_pb2.Replica:
    """What is known before the engine has started; `port` is where the gRPC service listens."""
    return router_pb2.Replica(
        replica_id=settings.replica_id,
        address=settings.advertise or f"{settings.host}:{port}",
        model=settings.model,
        engine=settings.engine,
        planner=planner,
        started_us=started_us,
        roles=_ROLES,
    )


def capacity_of(engine: Engine) -> router_pb2.Replica:
    """What the engine turned out to be, to be merged into the identity."""
    info = engine.info
    return router_pb2.Replica(
        model=info.model,
        perf_model=perf_model_to_wire(engine.perf_model),
        total_blocks=info.total_blocks,
        block_size=info.block_size,
        max_num_seqs=info.max_num_seqs,
        max_model_len=info.max_model_len,
    )
