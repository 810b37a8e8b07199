"""`python -m services.router`: read the settings, connect, serve."""

import asyncio
import sys

from protos import router_pb2, router_pb2_grpc
from services.common.broker import connect
from services.common.clock import Clock
from services.common.config import load_catalogue
from services.common.processes import announce, run_service
from services.common.rpc import RpcServer
from services.common.telemetry import start_telemetry
from services.router.compose import compose
from services.router.settings import RouterSettings

SERVICE = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Serve until told to stop; then finish the placements under way."""
    catalogue = load_catalogue(settings.catalogue)
    redis = await connect(settings.redis_url)
    telemetry = start_telemetry("router", f"router-{settings.port}", settings.data_dir)
    parts = compose(settings, catalogue, redis, Clock())
    server = RpcServer(f"{settings.host}:{settings.port}")
    router_pb2_grpc.add_RouterServicer_to_server(parts.service, server.grpc)
    try:
        await parts.fleet.start()
        counting = asyncio.create_task(parts.tally.run(), name="tally")
        orphanage = asyncio.create_task(parts.orphanage.run(), name="orphanage")
        await server.start([SERVICE])
        announce("router", settings.host, server.port)
        await stop.wait()
        parts.placer.stop_waiting()
        counting.cancel()
        await parts.tally.write()
        orphanage.cancel()
    finally:
        await server.stop(settings.drain_grace_s)
        await parts.fleet.stop()
        await parts.planners.close()
        await redis.aclose()
        telemetry.shutdown()


if __name__ == "__main__":
    sys.exit(run_service(RouterSettings, serve))
