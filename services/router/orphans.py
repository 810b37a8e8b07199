"""Requests whose worker is gone and whose admission process is gone too: nobody but the router is left to see to them.

One router at a time looks through the queues. A request that its client may still come back for is placed again; one
without such a grace is cancelled, as if its client had gone. Lost requests of a live admission process are its own to
rescue, because it alone has the tokens: only what it has forgotten is cancelled here in the end.
"""

import asyncio
import logging

from protos import router_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.common.orphans import ExpiringLock, Orphan, OrphanFinder
from services.common.request_store import RequestStore
from services.router.rescue import Rescuer

__all__ = ["Orphanage"]

_log = logging.getLogger(__name__)

_ROUND_S = 1.0
_RETURN_S = 3.0  # without a lease an admission process counts as gone only after this long: Redis may just be back
_UNSEEN_S = 15.0  # longer than a walk through all queues: what is not seen for so long is no orphan any more


class Orphanage:
    """One task, `run`. `forgotten_s`: after that long a lost request of a live admission process is cancelled."""

    def __init__(
        self,
        *,
        finder: OrphanFinder,
        lock: ExpiringLock,
        store: RequestStore,
        rescuer: Rescuer,
        clock: Clock,
        forgotten_s: float,
    ) -> None:
        self._finder = finder
        self._lock = lock
        self._store = store
        self._rescuer = rescuer
        self._clock = clock
        self._forgotten_s = forgotten_s
        self._since_s: dict[tuple[str, int], float] = {}  # by request and attempt; attempt 0: of whose client is gone
        self._seen_s: dict[tuple[str, int], float] = {}

    async def run(self) -> None:
        """Look after orphans until cancelled."""
        while True:
            await asyncio.sleep(_ROUND_S)
            try:
                if await self._lock.hold():
                    await self.round()
            except SloServeError as error:
                _log.info("orphans are not looked for: %s", error)

    async def round(self) -> None:
        """Look once, and act. Raises SloServeError while Redis is away."""
        now_s = self._clock.now_s()
        for orphan in await self._finder.round():
            key = (orphan.request_id, orphan.attempt if orphan.heard else 0)
            waited_s = now_s - self._since_s.setdefault(key, now_s)
            self._seen_s[key] = now_s
            await self._act(orphan, waited_s)
        for key, seen_s in list(self._seen_s.items()):
            if now_s - seen_s > _UNSEEN_S:
                del self._seen_s[key], self._since_s[key]

    async def _act(self, orphan: Orphan, waited_s: float) -> None:
        if orphan.heard:
            if orphan.lost and waited_s >= self._forgotten_s:
                await self._cancel(orphan, "its worker is gone and its admission process has forgotten it")
        elif waited_s >= _RETURN_S + orphan.grace_s:
            await self._cancel(orphan, "its admission process is gone")
        elif orphan.lost and waited_s >= _RETURN_S:
            await self._place_again(orphan)

    async def _cancel(self, orphan: Orphan, why: str) -> None:
        _log.warning("request %s is cancelled: %s", orphan.request_id, why)
        await self._store.cancel(orphan.request_id)

    async def _place_again(self, orphan: Orphan) -> None:
        reason = "its worker and its admission process are gone"
        try:
            placed = await self._rescuer.replace(
                router_pb2.ReplaceRequest(request_id=orphan.request_id, attempt=orphan.attempt, reason=reason)
            )
        except SloServeError as error:
            if error.reason is Reason.BROKER_UNAVAILABLE:
                raise
            _log.warning("request %s cannot be placed again yet: %s", orphan.request_id, error)
        else:
            _log.warning("request %s runs on as attempt %d: %s", orphan.request_id, placed.attempt, reason)
