"""`python -m services.admission`: read the settings, connect, serve, drain."""

import asyncio
import sys
from contextlib import AsyncExitStack

from services.admission.compose import AdmissionProcess
from services.admission.settings import AdmissionSettings
from services.admission.stage_specs import check_catalogue
from services.admission.tokens import load_model_tokens
from services.common.broker import connect
from services.common.clock import Clock
from services.common.config import load_catalogue
from services.common.instruments import admission_instruments
from services.common.processes import announce, run_service
from services.common.telemetry import start_telemetry


async def serve(settings: AdmissionSettings, stop: asyncio.Event) -> None:
    """Serve until told to stop, then drain."""
    catalogue = load_catalogue(settings.catalogue)
    tokens = await asyncio.to_thread(load_model_tokens, settings.model)
    check_catalogue(catalogue, tokens)
    async with AsyncExitStack() as cleanup:
        redis = await connect(settings.redis_url)
        cleanup.push_async_callback(redis.aclose)
        telemetry = start_telemetry("admission", settings.admission_id, settings.data_dir)
        cleanup.callback(telemetry.shutdown)
        process = AdmissionProcess(settings, catalogue, tokens, redis, Clock(), admission_instruments())
        cleanup.push_async_callback(process.stop)
        await process.start()
        announce("admission", settings.host, process.port)
        await stop.wait()
        await process.drain(settings.drain_grace_s)


if __name__ == "__main__":
    sys.exit(run_service(AdmissionSettings, serve))
