"""Names in Redis. They are documented in docs/redis.md, stable, and readable with redis-cli."""

__all__ = [
    "ADMISSION_PREFIX",
    "BEST_EFFORT_QUEUE",
    "DEAD_LETTERS",
    "GROUP",
    "ORPHAN_LOCK",
    "PLACEMENTS",
    "QUEUE_INDEX",
    "REPLICA_INDEX",
    "REPLICA_PREFIX",
    "admission_key",
    "owner_name",
    "queue_key",
    "replica_key",
    "request_key",
]

GROUP = "workers"
"""The consumer group of every queue."""

BEST_EFFORT_QUEUE = "slos:q:best-effort"
"""The shared queue of requests without a promise."""

DEAD_LETTERS = "slos:dead"
"""Stream of entries whose delivery failed too often."""

PLACEMENTS = "slos:placements"
"""Running totals over all routers: `offered`, and `declined` for want of capacity."""
QUEUE_INDEX = "slos:queues"
"""Set of the names of all queues that hold, or lately held, entries."""

ORPHAN_LOCK = "slos:lock:orphans"
"""Held, with an expiry, by the one router that looks for requests nobody cares for."""

ADMISSION_PREFIX = "slos:admission:"
"""Keys with a lease, one per live admission process."""

REPLICA_INDEX = "slos:replicas"
"""Set of replica ids; a member without a live `replica_key` is gone."""

REPLICA_PREFIX = "slos:replica:"


def queue_key(replica_id: str, tier: str) -> str:
    """Stream of the requests promised at `tier` on one replica."""
    return f"slos:q:{replica_id}:{tier}"


def request_key(request_id: str) -> str:
    """Hash that is the truth about one request."""
    return f"slos:req:{request_id}"


def replica_key(replica_id: str) -> str:
    """Hash with a lease that describes one replica."""
    return f"{REPLICA_PREFIX}{replica_id}"


def admission_key(admission_id: str) -> str:
    """Key with a lease that says an admission process is alive."""
    return f"{ADMISSION_PREFIX}{admission_id}"


def owner_name(replica_id: str, started_us: int) -> str:
    """Who runs a request: one worker process, told apart from earlier ones of the same replica by its start time."""
    return f"{replica_id}/{started_us}"
