"""Taking many calls off gRPC's hands at a time.

grpc.aio asks its core for the next call of a method only when it has the one before, and every such round costs four or
five turns of the event loop. A process that sends to a thousand streams has turns of several milliseconds, so that it
would take 20 to 70 calls per second whatever it has time for. Here several rounds per method run side by side; each
call goes the way that grpc.aio's own loop sends it.

There is no public way to do so: these are the functions of one release, checked against its source. With any other
release only grpc.aio's own loop accepts, which is right and slow.
"""

import asyncio
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from grpc._cython import cygrpc as _cygrpc  # type: ignore[attr-defined]  # compiled, and private

__all__ = ["CHECKED_RELEASE", "Acceptors", "release_is_checked"]

_log = logging.getLogger(__name__)

CHECKED_RELEASE = "1.85"
_AT_ONCE = 32
_AT_ONCE_CROWDED = 256

cygrpc: Any = _cygrpc


def release_is_checked() -> bool:
    """Whether the functions used here are known to be those of the installed grpcio."""
    return str(grpc.__version__).startswith(f"{CHECKED_RELEASE}.")


class Acceptors:
    """Accepts the calls of one server, beside the server's own loop.

    Make it before servicers are added, `start()` it once the server has started, and await `ended()` after its stop.
    `crowded` are the methods (`/package.Service/Method`) that thousands may call at once.
    """

    def __init__(
        self,
        server: grpc.aio.Server,
        interceptors: Sequence[grpc.aio.ServerInterceptor],
        crowded: Collection[str] = (),
    ) -> None:
        self._crowded = frozenset(crowded)
        self._interceptors = tuple(interceptors)
        self._handlers: dict[str, Any] = {}
        self._accepting: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[None]] = set()
        inner: Any = server
        self._core: Any = inner._server if release_is_checked() else None
        register = inner.add_registered_method_handlers

        def note(service: str, handlers: Mapping[str, Any]) -> None:
            self._handlers |= {f"/{service}/{method}": handler for method, handler in handlers.items()}
            register(service, handlers)

        inner.add_registered_method_handlers = note

    def start(self) -> None:
        """Accept calls until the server stops."""
        if self._core is None:
            _log.warning("grpcio %s is not %s: calls are accepted one by one", grpc.__version__, CHECKED_RELEASE)
            return
        resolver = cygrpc._MethodResolver([], self._handlers)
        for method in self._handlers:
            for _ in range(_AT_ONCE_CROWDED if method in self._crowded else _AT_ONCE):
                task = asyncio.create_task(self._accept(method, resolver), name=f"accept {method}")
                self._accepting.add(task)
                task.add_done_callback(self._over)

    async def ended(self, timeout_s: float) -> None:
        """Return when nothing is accepted any more; the core lets go of them once its server is told to stop.

        They are never cancelled: the core would write the next call where none is expected any more. Where calls that
        will not end keep the core from it, they are left behind after `timeout_s` seconds.
        """
        if self._accepting:
            await asyncio.wait(tuple(self._accepting), timeout=timeout_s)

    async def _accept(self, method: str, resolver: Any) -> None:
        loop = asyncio.get_running_loop()
        name = method.encode()
        while self._core.is_running():
            try:
                state = await self._core._request_registered_call(name)
            except cygrpc._RequestCallError:  # this call failed, or the server stops
                continue
            call = cygrpc._handle_rpc(method, resolver, self._interceptors, state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(call, state, loop, method))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    def _over(self, task: "asyncio.Task[None]") -> None:
        self._accepting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s ended, fewer calls are accepted at a time", task.get_name(), exc_info=error)
