"""How many requests were offered to the fleet and how many it declined, as running totals in Redis.

`slos:placements` is what a fleet scales by: all routers add to it, once a second each, so that no placement waits for
it. Only want of capacity counts as declined: a request that would be late on an idle replica, or that met no planner,
is no reason for another replica.
"""

import asyncio
import logging
from collections import Counter

from redis.asyncio import Redis
from redis.exceptions import RedisError

from protos import types_pb2
from services.common.broker import command
from services.common.errors import Reason, SloServeError
from services.common.keys import PLACEMENTS

__all__ = ["Tally"]

_log = logging.getLogger(__name__)

_EVERY_S = 1.0
_CAPACITY = (
    types_pb2.CONSTRAINT_KIND_UNSPECIFIED,
    types_pb2.CONSTRAINT_KIND_KV_BLOCKS,
    types_pb2.CONSTRAINT_KIND_PREFILL_BUDGET,
    types_pb2.CONSTRAINT_KIND_TPOT,
    types_pb2.CONSTRAINT_KIND_MAX_SEQS,
)


class Tally:
    """Counts placements; `run` writes them."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis
        self._counts: Counter[str] = Counter()

    def placed(self, verdict: types_pb2.Verdict) -> None:
        """A request was placed, with or without a promise."""
        declined = verdict.kind == types_pb2.VERDICT_KIND_BEST_EFFORT
        self._count(declined and verdict.constraint.kind in _CAPACITY)

    def refused(self, error: SloServeError) -> None:
        """A request got no place."""
        kinds = {detail.constraint.kind for detail in error.details if isinstance(detail, types_pb2.Verdict)}
        self._count(error.reason is Reason.NO_CAPACITY and kinds <= set(_CAPACITY))

    async def run(self) -> None:
        """Write what was counted, until cancelled."""
        while True:
            await asyncio.sleep(_EVERY_S)
            await self.write()

    async def write(self) -> None:
        """Add to the totals; what Redis does not take now is added the next time."""
        counts, self._counts = self._counts, Counter()
        try:
            for name in list(counts):
                await command(self._redis, "HINCRBY", PLACEMENTS, name, counts[name])
                del counts[name]
        except (RedisError, OSError, SloServeError) as error:
            _log.debug("placements are not counted yet: %s", error)
            self._counts.update(counts)

    def _count(self, declined: bool) -> None:
        self._counts["offered"] += 1
        if declined:
            self._counts["declined"] += 1
