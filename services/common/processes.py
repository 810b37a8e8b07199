"""What the main of every service does around its serving: settings, logging, signals, exit status.

Exit status 0 after a drained stop, 2 for a bad configuration, 3 where Redis (or another need) is absent at start.
"""

import asyncio
import gc
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

import uvloop

from services.common.config import ConfigError, ServiceSettings, load_settings
from services.common.errors import SloServeError

__all__ = ["announce", "run_service"]

EXIT_CONFIG = 2
EXIT_UNAVAILABLE = 3

S = TypeVar("S", bound=ServiceSettings)


def announce(service: str, host: str, port: int) -> None:
    """Tell whoever started the process that it serves now: one line on stdout.

    What start-up allocated stays for good: it is taken out of the collector's sight, so that a full collection costs
    what the requests made and nobody's token waits for a walk over all modules.
    """
    gc.collect()
    gc.freeze()
    print(f"{service} ready on {host}:{port}", flush=True)


def run_service(settings_class: type[S], serve: Callable[[S, asyncio.Event], Awaitable[None]]) -> int:
    """Build the settings, run `serve(settings, stop)` and return the exit status.

    SIGTERM or SIGINT sets `stop`: `serve` then drains and returns. A second signal cancels it.
    """
    try:
        settings = load_settings(settings_class)
    except ConfigError as error:
        return _refuse(str(error), EXIT_CONFIG)
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        uvloop.run(_until_signalled(settings, serve))
    except ConfigError as error:
        return _refuse(str(error), EXIT_CONFIG)
    except SloServeError as error:
        return _refuse(error.text, EXIT_UNAVAILABLE)
    except asyncio.CancelledError:
        return _refuse("stopped before everything was drained", 1)
    return 0


async def _until_signalled(settings: S, serve: Callable[[S, asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    task = asyncio.ensure_future(serve(settings, stop))

    def on_signal() -> None:
        if stop.is_set():
            task.cancel()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    await task


def _refuse(text: str, status: int) -> int:
    print(text, file=sys.stderr, flush=True)
    return status
