"""The Ray actor around a worker: the process that Ray starts, places and restarts.

Inside runs what `python -m services.worker` runs, on a thread and event loop of its own; its settings are the
`SLOS_*` variables of the actor's runtime environment. A worker that ends unasked takes the process with it, and Ray
starts the actor again, for ever.
"""

import asyncio
import logging
import os
import sys
import threading
import time

import ray
import uvloop

from services.common.config import load_settings
from services.worker.__main__ import serve
from services.worker.settings import WorkerSettings

__all__ = ["WorkerActor"]

_log = logging.getLogger(__name__)

_RESTART_PAUSE_S = 2.0  # Ray starts an actor again at once: a replica that cannot start must not spin


class WorkerActor:
    """One replica. `drain` is the only way to end it for good."""

    def __init__(self) -> None:
        self._retiring = False
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._thread.start()

    def pid(self) -> int:
        """The actor's process."""
        return os.getpid()

    def drain(self) -> None:
        """Finish what runs within the configured grace, leave the fleet, and stay ended."""
        self._retiring = True
        self._started.wait()
        if self._loop is not None and self._stop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        status = 0
        try:
            uvloop.run(self._serve())
        except Exception:  # whatever it is, Ray's answer is the same: another try in a new process
            _log.exception("the worker failed")
            status = 1
        finally:
            self._started.set()
        if not self._retiring:
            if status:
                time.sleep(_RESTART_PAUSE_S)
            sys.stderr.flush()
            os._exit(1)

    async def _serve(self) -> None:
        if not os.environ.get("SLOS_HOST"):  # on a cluster: wherever Ray has put it
            os.environ["SLOS_HOST"] = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        settings = load_settings(WorkerSettings)
        logging.basicConfig(
            level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
        )
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await serve(settings, self._stop)
