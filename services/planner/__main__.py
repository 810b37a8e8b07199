"""`python -m services.planner`: read the settings, connect, serve."""

import asyncio
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from protos import planner_pb2, planner_pb2_grpc
from services.common.clock import Clock
from services.common.config import load_catalogue
from services.common.instruments import planner_instruments
from services.common.processes import announce, run_service
from services.common.rpc import RpcServer
from services.common.telemetry import start_telemetry
from services.core.warm import warm_up
from services.planner.compose import compose
from services.planner.decision_log import DecisionLog
from services.planner.measure import measure_outcome, measure_run
from services.planner.promises import PlanRun
from services.planner.settings import PlannerSettings

SERVICE = planner_pb2.DESCRIPTOR.services_by_name["Planner"].full_name


async def serve(settings: PlannerSettings, stop: asyncio.Event) -> None:
    """Serve until told to stop."""
    catalogue = load_catalogue(settings.catalogue)
    with ExitStack() as cleanup:
        telemetry = start_telemetry("planner", f"planner-{settings.port}", settings.data_dir)
        cleanup.callback(telemetry.shutdown)
        await asyncio.to_thread(warm_up, settings.policy)
        instruments = planner_instruments()
        clock = Clock()
        watchers: list[Callable[[PlanRun], None]] = [partial(measure_run, instruments)]
        if settings.decision_log is not None:
            log = DecisionLog(settings.decision_log, settings.decision_log_mb << 20, clock)
            cleanup.callback(log.close)
            watchers.append(log.record)
        parts = compose(
            settings,
            catalogue,
            clock,
            on_run=watchers,
            on_outcome=partial(measure_outcome, instruments),
        )
        server = RpcServer(f"{settings.host}:{settings.port}")
        planner_pb2_grpc.add_PlannerServicer_to_server(parts.service, server.grpc)
        await server.start([SERVICE])
        announce("planner", settings.host, server.port)
        await stop.wait()
        await server.stop(1.0)


if __name__ == "__main__":
    sys.exit(run_service(PlannerSettings, serve))
