"""What Redis says about the queues, as rows. Reads only."""

from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis

from services.common import keys

__all__ = ["QueueRow", "read_queues"]

_PREFIX = "slos:q:"
_BEST_EFFORT = keys.BEST_EFFORT_QUEUE.removeprefix(_PREFIX)


@dataclass(frozen=True, slots=True)
class QueueRow:
    """One stream. `depth` counts entries until they are acknowledged and deleted; `pending` those a worker has taken.

    `oldest_age_s` is the age of the oldest entry, running or waiting; None for an empty queue.
    """

    stream: str
    replica: str
    tier: str
    depth: int
    pending: int
    oldest_age_s: float | None
    consumers: tuple[str, ...]

    @property
    def waiting(self) -> int:
        """Entries nobody has taken yet."""
        return max(0, self.depth - self.pending)


async def read_queues(redis: "Redis") -> list[QueueRow]:
    """Every queue, the tiers of each replica first and the shared best-effort queue last; `slos:dead` after it."""
    names = sorted([key.decode() async for key in redis.scan_iter(match=f"{_PREFIX}*", _type="stream")])
    names.sort(key=lambda name: name == keys.BEST_EFFORT_QUEUE)
    seconds, micros = await redis.time()
    now_s = seconds + micros / 1e6
    rows = [await _row(redis, name, now_s) for name in names]
    if await redis.exists(keys.DEAD_LETTERS):
        rows.append(await _row(redis, keys.DEAD_LETTERS, now_s))
    return rows


def _replica_and_tier(stream: str) -> tuple[str, str]:
    if stream == keys.DEAD_LETTERS:
        return "any", "dead letters"
    rest = stream.removeprefix(_PREFIX)
    if rest == _BEST_EFFORT:
        return "any", rest
    replica, _, tier = rest.rpartition(":")
    return replica, tier


async def _row(redis: "Redis", stream: str, now_s: float) -> QueueRow:
    depth = await redis.xlen(stream)
    first: Any = await redis.xrange(stream, count=1)
    groups: list[dict[str, Any]] = await redis.xinfo_groups(stream)
    group = next((g for g in groups if g["name"] == keys.GROUP.encode()), None)
    members: list[dict[str, Any]] = await redis.xinfo_consumers(stream, keys.GROUP) if group else []
    replica, tier = _replica_and_tier(stream)
    return QueueRow(
        stream=stream,
        replica=replica,
        tier=tier,
        depth=depth,
        pending=int(group["pending"]) if group else 0,
        oldest_age_s=max(0.0, now_s - int(first[0][0].split(b"-")[0]) / 1000) if first else None,
        consumers=tuple(sorted(member["name"].decode() for member in members)),
    )
