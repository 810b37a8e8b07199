"""The whole system on one machine: Redis, planner, router, workers and admission as subprocesses.

`async with LocalStack(spec) as stack` starts everything, returns when a request can be served, and stops everything in
order at the end. Tests kill and restart single services through it.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
import psutil

from protos import router_pb2, router_pb2_grpc
from services.cli.run_file import RunInfo, StackLock, remove_run_file, write_run_file
from services.cli.service_process import ServiceFailedError, ServiceProcess
from services.cli.stack_layout import Addresses, lay_out, process_specs, redis_port
from services.cli.stack_spec import ServiceEvent, ServiceState, StackSpec
from services.common.embedded_redis import EmbeddedRedis
from services.common.rpc import open_channel

__all__ = ["LocalStack"]

_STOP_ORDER = ("admission", "router", "worker", "planner")
_EXTRA_STOP_S = 5.0  # on top of the drain grace, before a service is killed
_LEASE_POLL_S = 0.1


class LocalStack:
    """Runs a stack. `on_event` hears of every change of state, for a progress display."""

    def __init__(self, spec: StackSpec, on_event: Callable[[ServiceEvent], None] | None = None) -> None:
        self.spec = spec
        self.redis_url = spec.redis_url or ""
        self._on_event = on_event
        self._addresses: Addresses | None = None
        self._redis: EmbeddedRedis | None = None
        self._processes: dict[str, ServiceProcess] = {}
        self._lock = StackLock(spec.data_dir)

    async def __aenter__(self) -> Self:
        """Start everything; on failure or cancellation stop what was started and raise."""
        self._lock.__enter__()
        try:
            await self._start()
        except BaseException:
            await self._stop(grace_s=0.0)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stop(self.spec.drain_grace_s + _EXTRA_STOP_S)

    @property
    def addresses(self) -> Addresses:
        """host:port of every process."""
        if self._addresses is None:
            raise RuntimeError("the stack was not started")
        return self._addresses

    @property
    def admission_address(self) -> str:
        """Where clients go."""
        return self.addresses.admission[0]

    @property
    def router_address(self) -> str:
        """Where the replicas are listed."""
        return self.addresses.router[0]

    @property
    def process_names(self) -> tuple[str, ...]:
        """Every process that can be killed or restarted: `worker-0`, `planner-0`..., and `redis` when embedded."""
        return (*self._processes, *(("redis",) if self._redis is not None else ()))

    def process(self, name: str) -> ServiceProcess:
        """One service's process; KeyError for an unknown name."""
        return self._processes[name]

    async def kill(self, name: str) -> None:
        """SIGKILL one service with all its children, and wait until it is gone."""
        if name == "redis":
            self._embedded().kill()
        else:
            await self._processes[name].kill()

    def kill_engine(self, name: str) -> None:
        """SIGKILL the engine process of one worker, not the worker."""
        worker = psutil.Process(self._processes[name].pid)
        for child in worker.children():
            if "resource_tracker" not in " ".join(child.cmdline()):
                child.kill()

    def pause(self, name: str) -> None:
        """SIGSTOP one service with all its children; `go_on` ends it."""
        self._processes[name].send_signal(signal.SIGSTOP)

    def go_on(self, name: str) -> None:
        """SIGCONT a paused service."""
        self._processes[name].send_signal(signal.SIGCONT)

    async def terminate(self, name: str) -> int | None:
        """SIGTERM one service, so that it drains; its exit status. It is killed after the drain grace."""
        return await self._processes[name].stop(self.spec.drain_grace_s + _EXTRA_STOP_S)

    async def restart(self, name: str) -> None:
        """Start a stopped or killed service at the same address; return when it is healthy."""
        if name == "redis":
            self._embedded().start()
        else:
            await self._bring_up(self._processes[name])

    async def wait_for_failure(self) -> str:
        """Block until a service that should be running ends; what happened, with the tail of its log."""
        ended = {asyncio.create_task(process.wait_ended()): process for process in self._processes.values()}
        try:
            done, _ = await asyncio.wait(ended, return_when=asyncio.FIRST_COMPLETED)
            return ended[done.pop()].describe_end()
        finally:
            for task in ended:
                task.cancel()

    async def wait_for_replicas(self, count: int, timeout_s: float) -> None:
        """Return once the router sees exactly `count` ready replicas; `ServiceFailedError` after `timeout_s`."""
        seen = 0
        async with open_channel(self.router_address, traced=False) as channel:
            stub = router_pb2_grpc.RouterStub(channel)
            try:
                async with asyncio.timeout(timeout_s):
                    while True:
                        answer = await stub.ListReplicas(router_pb2.ListReplicasRequest(), wait_for_ready=True)
                        ready = [r for r in answer.replicas if r.status == router_pb2.REPLICA_STATUS_READY]
                        seen = len(ready)
                        if seen == count:
                            return
                        await asyncio.sleep(_LEASE_POLL_S)
            except (TimeoutError, grpc.aio.AioRpcError) as error:
                raise ServiceFailedError(
                    f"the router lists {seen} ready replicas instead of {count} after {timeout_s:.0f} s ({error!r})"
                ) from error

    def _embedded(self) -> EmbeddedRedis:
        if self._redis is None:
            raise ServiceFailedError("Redis is not embedded in this stack: it belongs to whoever gave its URL")
        return self._redis

    async def _start(self) -> None:
        self._addresses = lay_out(self.spec)
        if self.spec.redis_url is None:
            self._start_redis()
        for process_spec in process_specs(self.spec, self._addresses, self.redis_url, os.environ):
            self._processes[process_spec.name] = ServiceProcess(process_spec)
        turns = asyncio.Semaphore(self.spec.starting_workers)

        async def in_turn(process: ServiceProcess) -> None:
            async with turns:
                await self._bring_up(process)

        try:
            async with asyncio.TaskGroup() as group:
                for name, process in self._processes.items():
                    group.create_task(in_turn(process) if name.startswith("worker-") else self._bring_up(process))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        await self.wait_for_replicas(self.spec.num_workers, timeout_s=30.0)
        write_run_file(
            self.spec.data_dir,
            RunInfo(
                pid=os.getpid(),
                admission=self._addresses.admission,
                router=self._addresses.router,
                planner=self._addresses.planner,
                worker=self._addresses.worker,
                redis_url=self.redis_url,
            ),
        )

    def _start_redis(self) -> None:
        began = time.monotonic()
        self._emit("redis", ServiceState.STARTING, "", began)
        self._redis = EmbeddedRedis(self.spec.data_dir / "redis", port=redis_port(self.spec))
        self.redis_url = self._redis.start()
        self._emit("redis", ServiceState.READY, self.redis_url, began)

    async def _bring_up(self, process: ServiceProcess) -> None:
        began = time.monotonic()
        self._emit(process.spec.name, ServiceState.STARTING, process.spec.address, began)
        await process.start()
        await process.wait_healthy(self.spec.start_timeout_s)
        self._emit(process.spec.name, ServiceState.READY, process.spec.address, began)

    async def _stop(self, grace_s: float) -> None:
        """Stop role after role, front door first, so that each can still finish its work with the next."""
        try:
            for role in _STOP_ORDER:
                members = [p for name, p in self._processes.items() if name.startswith(f"{role}-") and p.running]
                await asyncio.gather(*(self._stop_one(process, grace_s) for process in members))
            if self._redis is not None:
                began = time.monotonic()
                self._redis.stop()
                self._emit("redis", ServiceState.STOPPED, self.redis_url, began)
        finally:
            for process in self._processes.values():
                with contextlib.suppress(asyncio.CancelledError):
                    await process.kill()
            if self._redis is not None:
                self._redis.stop()  # does nothing the second time
            remove_run_file(self.spec.data_dir)
            self._lock.__exit__(None, None, None)

    async def _stop_one(self, process: ServiceProcess, grace_s: float) -> None:
        began = time.monotonic()
        self._emit(process.spec.name, ServiceState.STOPPING, process.spec.address, began)
        await process.stop(grace_s)
        self._emit(process.spec.name, ServiceState.STOPPED, process.spec.address, began)

    def _emit(self, name: str, state: ServiceState, address: str, began_s: float) -> None:
        if self._on_event is not None:
            self._on_event(ServiceEvent(name, state, address, time.monotonic() - began_s))
