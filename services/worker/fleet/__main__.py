"""`python -m services.worker.fleet`: read the settings, connect to Ray and Redis, keep the fleet at its size."""

import argparse
import asyncio
import os
import signal
import sys
from collections.abc import Sequence

from services.common.broker import connect
from services.common.clock import Clock
from services.common.config import load_settings
from services.common.processes import run_service
from services.worker.fleet.controller import Controller
from services.worker.fleet.ray_replicas import RayReplicas
from services.worker.fleet.settings import FleetSettings
from services.worker.fleet.signals import Signals
from services.worker.settings import WorkerSettings

_OPTIONS = {
    "--replicas": ("SLOS_REPLICAS", "how many to start with"),
    "--min": ("SLOS_MIN_REPLICAS", "never fewer than these"),
    "--max": ("SLOS_MAX_REPLICAS", "never more than these; without it the fleet keeps its size"),
    "--address": ("SLOS_RAY_ADDRESS", "a Ray cluster (host:port or auto); without it a local Ray is started"),
    "--cpus": ("SLOS_CPUS", "CPUs that a replica reserves"),
    "--gpus": ("SLOS_GPUS", "GPUs that a replica reserves"),
    "--prefix": ("SLOS_REPLICA_PREFIX", "the replicas are called PREFIX-0, PREFIX-1..."),
}


async def serve(settings: FleetSettings, stop: asyncio.Event) -> None:
    """Keep the fleet until told to stop; then drain every replica."""
    load_settings(WorkerSettings)  # what no worker could start with ends the fleet, not one actor after the other
    redis = await connect(settings.redis_url)
    replicas = RayReplicas(
        settings.ray_address, settings.replica_prefix, settings.cpus, settings.gpus, settings.drain_grace_s
    )
    await asyncio.to_thread(replicas.connect)
    for number in (signal.SIGTERM, signal.SIGINT):  # Ray has put a handler of its own there, which aborts
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    controller = Controller(
        replicas,
        Signals(redis, Clock()),
        settings.policy,
        first=settings.replicas,
        max_starting=settings.max_starting,
    )
    try:
        await controller.run(settings.scale_every_s, stop)
    finally:
        await controller.retire_all()
        await redis.aclose()
        await asyncio.to_thread(replicas.disconnect)


def main(arguments: Sequence[str]) -> int:
    """Every option is a variable of `FleetSettings`; the option wins."""
    parser = argparse.ArgumentParser(prog="python -m services.worker.fleet", description="Workers as Ray actors.")
    for option, (variable, text) in _OPTIONS.items():
        parser.add_argument(option, dest=variable, help=f"{text} ({variable})")
    os.environ.update({name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None})
    return run_service(FleetSettings, serve)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
