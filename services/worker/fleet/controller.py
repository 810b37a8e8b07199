"""Keeps a fleet at the size it should have: look, decide, start or retire, once a second."""

import asyncio
import logging
import os
from collections.abc import Iterable

from services.common.errors import SloServeError
from services.core.scaling import ScalingPolicy, ScalingState, decide_scale
from services.worker.fleet.ray_replicas import RayReplicas
from services.worker.fleet.signals import Look, Signals

__all__ = ["Controller"]

_log = logging.getLogger(__name__)

_SAY_AGAIN = 30  # looks between two complaints that there is no room


class Controller:
    """One loop, `run`; `retire_all` at the end."""

    def __init__(
        self, replicas: RayReplicas, signals: Signals, policy: ScalingPolicy, *, first: int, max_starting: int
    ) -> None:
        self._replicas = replicas
        self._signals = signals
        self._policy = policy
        self._max_starting = max_starting
        self._state = ScalingState(first)
        self._retirements: set[asyncio.Task[None]] = set()
        self._looks = 0

    async def run(self, every_s: float, stop: asyncio.Event) -> None:
        """Look and act until told to stop."""
        while not stop.is_set():
            try:
                await self.step()
            except SloServeError as error:  # a fleet that cannot be seen keeps its size
                _log.warning("the fleet is not looked after: %s", error)
            try:
                await asyncio.wait_for(stop.wait(), every_s)
            except TimeoutError:
                continue

    async def step(self) -> None:
        """One look at the fleet, and what follows from it."""
        look = await self._signals.look(self._replicas.present)
        before = self._state
        self._state = decide_scale(before, look.sample, self._policy)
        if self._state.desired != before.desired:
            _say(
                f"{before.desired} -> {self._state.desired} replicas: {100 * before.decline_rate:.0f} % declined, "
                f"{before.idle:.1f} idle"
            )
        self._grow(look)
        self._shrink(look)
        self._complain()

    async def retire_all(self) -> None:
        """Drain every replica."""
        for replica_id in self._replicas.present:
            self._retire(replica_id)
        await asyncio.gather(*self._retirements)

    def _grow(self, look: Look) -> None:
        starting = sum(not look.ready(replica_id) for replica_id in self._replicas.present)
        missing = self._state.desired - len(self._replicas.present)
        for _ in range(min(missing, self._max_starting - starting)):
            _say(f"starting {self._replicas.start(os.environ)}")

    def _shrink(self, look: Look) -> None:
        surplus = len(self._replicas.present) - self._state.desired
        for replica_id in self._victims(look)[: max(0, surplus)]:
            self._retire(replica_id)

    def _victims(self, look: Look) -> list[str]:
        """Replicas in the order to retire: those that do not serve yet, then the least busy, the youngest first."""

        def busy(replica_id: str) -> tuple[bool, int, int]:
            lease = look.replicas.get(replica_id)
            if lease is None:
                return (False, 0, 0)
            return (look.ready(replica_id), lease.running + lease.waiting, -lease.started_us)

        return sorted(self._replicas.present, key=busy)

    def _retire(self, replica_id: str) -> None:
        _say(f"draining {replica_id}")
        task = asyncio.create_task(self._replicas.retire(replica_id), name=f"retire {replica_id}")
        self._retirements.add(task)
        task.add_done_callback(lambda done: self._retired(replica_id, done))

    def _retired(self, replica_id: str, task: "asyncio.Task[None]") -> None:
        self._retirements.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("replica %s is not retired", replica_id, exc_info=error)
        else:
            _say(f"ended {replica_id}")

    def _complain(self) -> None:
        self._looks += 1
        if self._looks % _SAY_AGAIN == 0:
            for replica_id in _sorted(self._replicas.unplaced()):
                _log.warning("replica %s waits for a node with room for it", replica_id)


def _sorted(replica_ids: Iterable[str]) -> list[str]:
    return sorted(replica_ids)


def _say(text: str) -> None:
    print(f"fleet: {text}", flush=True)
