"""The fleet as Redis knows it: one hash with a lease per replica, written by its worker alone.

Fields are flat text named as in the `Replica` message; the performance model is JSON. A replica whose lease is not
renewed in time is gone.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from google.protobuf import json_format
from redis.asyncio import Redis
from redis.exceptions import RedisError

from protos import router_pb2, types_pb2
from services.common import keys
from services.common.broker import broker_errors
from services.common.errors import SloServeError
from services.common.kept import KeptTasks
from services.common.lua_scripts import load_script

__all__ = ["FleetChange", "ReplicaRegistry", "ReplicaWatcher"]

_log = logging.getLogger(__name__)

_TASK = "replica watcher"

_TEXT = ("replica_id", "address", "model", "engine", "planner")
_NUMBERS = (
    *("total_blocks", "block_size", "max_num_seqs", "max_model_len", "started_us"),
    *("running", "waiting", "free_blocks", "idle_ms", "declined"),
)
_STATUS_PREFIX = "REPLICA_STATUS_"


def _to_fields(replica: router_pb2.Replica) -> dict[str, str]:
    fields = {name: str(getattr(replica, name)) for name in (*_TEXT, *_NUMBERS)}
    fields["status"] = router_pb2.ReplicaStatus.Name(replica.status).removeprefix(_STATUS_PREFIX)
    fields["roles"] = ",".join(replica.roles)
    fields["perf_model"] = json_format.MessageToJson(replica.perf_model, preserving_proto_field_name=True, indent=None)
    return fields


def _from_fields(fields: Mapping[str, str]) -> router_pb2.Replica:
    """The message of a hash's fields; raises ValueError or KeyError where the hash is not ours."""
    replica = router_pb2.Replica(
        status=router_pb2.ReplicaStatus.Value(_STATUS_PREFIX + fields["status"]),
        roles=[role for role in fields["roles"].split(",") if role],
        perf_model=_perf_model(fields["perf_model"]),
    )
    for name in _TEXT:
        setattr(replica, name, fields[name])
    for name in _NUMBERS:
        setattr(replica, name, int(fields[name]))
    return replica


@lru_cache(maxsize=1024)
def _perf_model(text: str) -> types_pb2.PerfModel:
    """The message of its JSON. Leases are read four times a second and a fitted model hardly ever changes.

    To be copied, never changed.
    """
    return json_format.Parse(text, types_pb2.PerfModel())


def _flat(fields: Mapping[str, object]) -> list[str]:
    return [part for name, value in fields.items() for part in (name, str(value))]


class ReplicaRegistry:
    """How a worker keeps its lease, and how others cut it short.

    `started_us` tells a worker's process from earlier ones of the same replica.
    All methods raise SloServeError BROKER_UNAVAILABLE while Redis is away.
    """

    def __init__(self, redis: Redis) -> None:
        self._publish = load_script(redis, "publish")
        self._renew = load_script(redis, "renew")
        self._remove = load_script(redis, "remove")
        self._doubt = load_script(redis, "doubt")

    async def publish(self, replica: router_pb2.Replica, lease_s: float) -> None:
        """Describe the replica anew and start its lease; an earlier process of the same id loses its own."""
        with broker_errors():
            await self._publish(
                [keys.replica_key(replica.replica_id), keys.REPLICA_INDEX],
                [replica.replica_id, round(lease_s * 1000), *_flat(_to_fields(replica))],
            )

    async def renew(self, replica_id: str, started_us: int, lease_s: float, **changed: object) -> bool:
        """Prolong the lease and store what changed (`running`, `waiting`, `free_blocks`, `idle_ms`, `declined`).

        False: the lease ran out or is another process's. Whoever hears that aborts whatever it runs that Redis gives to
        somebody else, then publishes again.
        """
        with broker_errors():
            return bool(
                await self._renew(
                    [keys.replica_key(replica_id), keys.REPLICA_INDEX],
                    [replica_id, started_us, round(lease_s * 1000), *_flat(changed)],
                )
            )

    async def doubt(self, replica_id: str, started_us: int, left_s: float) -> None:
        """Leave a worker that was not reached only `left_s` to renew its lease."""
        with broker_errors():
            await self._doubt([keys.replica_key(replica_id)], [started_us, round(left_s * 1000)])

    async def remove(self, replica_id: str, started_us: int) -> None:
        """Give the lease up."""
        with broker_errors():
            await self._remove([keys.replica_key(replica_id), keys.REPLICA_INDEX], [replica_id, started_us])


@dataclass(frozen=True, slots=True)
class FleetChange:
    """Replica ids that came, went, or whose description changed. A restarted replica has gone and come."""

    joined: frozenset[str]
    left: frozenset[str]
    changed: frozenset[str]


class ReplicaWatcher:
    """A snapshot of the live replicas, refreshed every `poll_s`.

    While Redis is away the last snapshot stays: replicas do not die with it. `tasks` keeps the watching up.
    Usage: `await start()` (reads once), then `.replicas`; `await stop()` at the end.
    """

    def __init__(
        self,
        redis: Redis,
        on_change: Callable[[FleetChange], None] | None = None,
        *,
        poll_s: float = 0.25,
        tasks: KeptTasks | None = None,
    ) -> None:
        self._list = load_script(redis, "replicas")
        self._on_change = on_change
        self._poll_s = poll_s
        self._replicas: Mapping[str, router_pb2.Replica] = MappingProxyType({})
        self._told: Mapping[str, router_pb2.Replica] = self._replicas  # what `on_change` knows
        self._refresh = asyncio.Lock()
        self._tasks = tasks or KeptTasks()

    @property
    def replicas(self) -> Mapping[str, router_pb2.Replica]:
        """Live replicas by id, as of the last refresh."""
        return self._replicas

    async def start(self) -> None:
        """Read the fleet once and keep watching it."""
        await self.refresh()
        self._tasks.keep(_TASK, self._poll)

    async def stop(self) -> None:
        """Stop watching."""
        await self._tasks.cancel(_TASK)

    async def refresh(self) -> None:
        """Read the fleet now. Raises SloServeError BROKER_UNAVAILABLE.

        A change that `on_change` failed at is told again, with whatever came since.
        """
        async with self._refresh:
            with broker_errors():
                found: list[Any] = await self._list([keys.REPLICA_INDEX], [keys.REPLICA_PREFIX])
            self._replicas = MappingProxyType(_parse(found))
        now = self._replicas
        change = _difference(self._told, now)
        if change is not None and self._on_change is not None:
            self._on_change(change)
        self._told = now

    async def _poll(self) -> None:
        away = False
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self.refresh()
                away = False
            except (SloServeError, RedisError) as error:
                if not away:
                    _log.warning("the fleet cannot be read, keeping the last view: %s", error)
                away = True


def _parse(found: list[Any]) -> dict[str, router_pb2.Replica]:
    replicas = {}
    for raw_id, raw_fields in found:
        parts = [part.decode("utf-8", "replace") for part in raw_fields]
        try:
            replicas[raw_id.decode()] = _from_fields(dict(zip(parts[::2], parts[1::2], strict=True)))
        except (KeyError, ValueError, json_format.Error) as error:
            _log.warning("replica %r has no readable description: %r", raw_id, error)
    return replicas


def _difference(before: Mapping[str, router_pb2.Replica], now: Mapping[str, router_pb2.Replica]) -> FleetChange | None:
    restarted = {name for name in before.keys() & now.keys() if before[name].started_us != now[name].started_us}
    joined = frozenset((now.keys() - before.keys()) | restarted)
    left = frozenset((before.keys() - now.keys()) | restarted)
    changed = frozenset(name for name in before.keys() & now.keys() - restarted if before[name] != now[name])
    return FleetChange(joined, left, changed) if joined or left or changed else None
