"""`python -m services.worker`: read the settings, connect, serve one replica."""

import asyncio
import sys
from functools import partial

from services.common.broker import connect
from services.common.clock import Clock
from services.common.config import load_catalogue
from services.common.processes import announce, run_service
from services.common.telemetry import start_telemetry
from services.worker.settings import WorkerSettings
from services.worker.vllm_engine import VllmEngine
from services.worker.worker import Worker


async def serve(settings: WorkerSettings, stop: asyncio.Event) -> None:
    """Serve until told to stop."""
    catalogue = load_catalogue(settings.catalogue)
    redis = await connect(settings.redis_url)
    telemetry = start_telemetry("worker", settings.replica_id, settings.data_dir)
    worker = Worker(settings, catalogue, redis, VllmEngine(settings.engine_settings()), Clock())
    try:
        await worker.run(stop, partial(announce, "worker", settings.host))
    finally:
        await worker.stop()
        await redis.aclose()
        telemetry.shutdown()


if __name__ == "__main__":
    sys.exit(run_service(WorkerSettings, serve))
