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
from services.common.watched import WatchedTasks
from services.router.compose import compose
from services.router.settings import RouterSettings

SERVICE = router_pb2.DESCRIPTOR.services_by_name["Router"].full_name


async def serve(settings: RouterSettings, stop: asyncio.Event) -> None:
    """Serve until told to stop; then finish the placements under way.

    Raises the error of a task that ended before: a router that counts nothing or sees to no orphan is no router.
    """
    catalogue = load_catalogue(settings.catalogue)
    redis = await connect(settings.redis_url)
    telemetry = start_telemetry("router", f"router-{settings.port}", settings.data_dir)
    parts = compose(settings, catalogue, redis, Clock())
    server = RpcServer(f"{settings.host}:{settings.port}")
    router_pb2_grpc.add_RouterServicer_to_server(parts.service, server.grpc)
    tasks = WatchedTasks()
    try:
        await parts.fleet.start()
        tasks.spawn("tally", parts.tally.run())
        tasks.spawn("orphanage", parts.orphanage.run())
        await server.start([SERVICE])
        announce("router", settings.host, server.port)
        await tasks.watch(stop)
    finally:
        parts.placer.stop_waiting()
        await server.stop(settings.drain_grace_s)
        await tasks.cancel()
        await parts.tally.write()
        await parts.fleet.stop()
        await parts.planners.close()
        await redis.aclose()
        telemetry.shutdown()


if __name__ == "__main__":
    sys.exit(run_service(RouterSettings, serve))
