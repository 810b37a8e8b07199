"""One service of the local stack as a subprocess: start, wait until healthy, stop, kill."""

import asyncio
import contextlib
import os
import signal
import sys
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.parent_death import ends_with_parent
from services.common.rpc import open_channel

__all__ = ["ProcessSpec", "ServiceFailedError", "ServiceProcess"]

_TAIL_LINES = 25
_ROOT = Path(__file__).resolve().parents[2]


class ServiceFailedError(Exception):
    """A service ended or did not become healthy; the text holds the tail of its log."""


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to start one service."""

    name: str
    module: str
    address: str
    environment: Mapping[str, str]
    log_path: Path


class ServiceProcess:
    """Runs one service in a process group of its own, so that a terminal's Ctrl-C reaches only the stack."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._process.pid if self._process is not None and self.running else None

    @property
    def running(self) -> bool:
        """Started and not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def returncode(self) -> int | None:
        """Exit status of the last run; negative for a signal, None before it ended."""
        return self._process.returncode if self._process is not None else None

    async def start(self) -> None:
        """Start the process. A log of an earlier stack moves to `.1`; a restart appends to its own."""
        self.spec.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self._process is None and self.spec.log_path.exists():
            self.spec.log_path.replace(self.spec.log_path.with_suffix(".log.1"))
        with self.spec.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                self.spec.module,
                cwd=_ROOT,
                env=dict(self.spec.environment),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=ends_with_parent(),
            )

    async def wait_healthy(self, timeout_s: float) -> None:
        """Return once `grpc.health.v1` says SERVING; `ServiceFailedError` when it ends or takes too long."""
        healthy = asyncio.create_task(self._watch_health())
        ended = asyncio.create_task(self.wait_ended())
        try:
            done, _ = await asyncio.wait({healthy, ended}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if healthy in done:
                healthy.result()
            elif ended in done:
                raise ServiceFailedError(self.describe_end())
            else:
                raise ServiceFailedError(self._failure(f"{self.spec.name} was not healthy after {timeout_s:.0f} s"))
        finally:
            for task in (healthy, ended):
                task.cancel()
            await asyncio.gather(healthy, ended, return_exceptions=True)

    async def wait_ended(self) -> int:
        """Exit status, once the process ends."""
        if self._process is None:
            raise RuntimeError(f"{self.spec.name} was never started")
        return await self._process.wait()

    async def stop(self, grace_s: float) -> int | None:
        """SIGTERM, then SIGKILL to whatever is left of the process group after `grace_s`; the exit status."""
        if self._process is None:
            return None
        if self.running:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):  # killed below
                await asyncio.wait_for(self._process.wait(), grace_s)
        await self.kill()
        return self._process.returncode

    async def kill(self) -> None:
        """SIGKILL to the whole process group, as an out-of-memory kill of its container would."""
        if self._process is None:
            return
        self._signal_group(signal.SIGKILL)
        await self._process.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the whole process group of a running service."""
        if self._process is not None:
            self._signal_group(number)

    def log_tail(self, num_lines: int = _TAIL_LINES) -> str:
        """The last lines of the log."""
        try:
            with self.spec.log_path.open(encoding="utf-8", errors="replace") as log:
                return "".join(deque(log, maxlen=num_lines)).rstrip()
        except FileNotFoundError:
            return ""

    def describe_end(self) -> str:
        """What an ended process left behind: its exit status and the tail of its log."""
        return self._failure(f"{self.spec.name} ended with exit status {self.returncode}")

    def _signal_group(self, number: signal.Signals) -> None:
        assert self._process is not None
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return  # every member has ended

    def _failure(self, text: str) -> str:
        tail = self.log_tail() or "(the log is empty)"
        return f"{text}\n--- last lines of {self.spec.log_path}\n{tail}"

    async def _watch_health(self) -> None:
        """Follow the health stream until SERVING, connecting again while nothing listens yet."""
        async with open_channel(self.spec.address, traced=False) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)  # the published types leave `Watch` out
            while True:
                try:
                    async for answer in stub.Watch(health_pb2.HealthCheckRequest(), wait_for_ready=True):
                        if answer.status == health_pb2.HealthCheckResponse.SERVING:
                            return
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE:
                        raise
                await asyncio.sleep(0.05)
