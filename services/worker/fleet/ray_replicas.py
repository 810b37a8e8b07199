"""The replicas as Ray knows them: one named actor in a placement group of its own for each.

On a cluster the actors are detached: they outlive the fleet process, and its successor finds them by their names.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray.util import list_named_actors, placement_group_table, remove_placement_group
from ray.util.placement_group import get_placement_group, placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from services.worker.fleet.actor import WorkerActor
from services.worker.fleet.environment import replica_environment

__all__ = ["RayReplicas"]

_log = logging.getLogger(__name__)

NAMESPACE = "slos-serve"
_LOCAL_HOST = "127.0.0.1"
_OBJECT_STORE_BYTES = 80 << 20  # actors pass no objects: the least that Ray accepts
_DRAIN_EXTRA_S = 30.0


class RayReplicas:
    """Starts and ends actors. Blocking calls of Ray run in threads."""

    def __init__(self, address: str, prefix: str, cpus: float, gpus: float, drain_grace_s: float) -> None:
        self._address = address
        self._prefix = prefix
        self._bundle = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount > 0} or {"CPU": 0.01}
        self._drain_grace_s = drain_grace_s
        self._actors: dict[str, Any] = {}
        self._retiring: set[str] = set()

    def connect(self) -> None:
        """Join the cluster, or start a Ray on this machine; take up the actors an earlier fleet process left."""
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if self._address:
            ray.init(address=self._address, namespace=NAMESPACE)
            self._adopt()
        else:
            os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 would put engines behind everything else
            ray.init(
                namespace=NAMESPACE,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _node_ip_address=_LOCAL_HOST,
            )

    @property
    def present(self) -> frozenset[str]:
        """Ids of the replicas that are wanted: starting, serving or being restarted."""
        return frozenset(self._actors.keys() - self._retiring)

    @property
    def retiring(self) -> frozenset[str]:
        """Ids of the replicas that are being drained."""
        return frozenset(self._retiring)

    def start(self, base: Mapping[str, str]) -> str:
        """Ask Ray for one more replica; its id. It runs as soon as a node has room for it."""
        index = next(i for i in range(len(self._actors) + 1) if f"{self._prefix}-{i}" not in self._actors)
        replica_id = f"{self._prefix}-{index}"
        lifetime = "detached" if self._address else None
        group = placement_group([self._bundle], strategy="STRICT_PACK", name=_name(replica_id), lifetime=lifetime)
        # on a cluster a replica is reached by the address of the node that it lands on
        host = base.get("SLOS_HOST", "") or ("" if self._address else _LOCAL_HOST)
        self._actors[replica_id] = (
            ray.remote(WorkerActor)
            .options(
                name=_name(replica_id),
                namespace=NAMESPACE,
                lifetime=lifetime,
                max_restarts=-1,
                max_concurrency=4,
                num_cpus=self._bundle.get("CPU", 0),
                num_gpus=self._bundle.get("GPU", 0),
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
                runtime_env={"env_vars": replica_environment(replica_id, host, base)},
            )
            .remote()
        )
        return replica_id

    async def retire(self, replica_id: str) -> None:
        """Drain a replica and end its actor for good."""
        self._retiring.add(replica_id)
        actor = self._actors[replica_id]
        try:
            await asyncio.wait_for(_answer(actor.drain.remote()), self._drain_grace_s + _DRAIN_EXTRA_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            _log.warning("replica %s did not drain: %r", replica_id, error)
        await asyncio.to_thread(self._end, replica_id)
        self._retiring.discard(replica_id)

    async def pid(self, replica_id: str) -> int:
        """Process of a replica's actor; waits while it is being restarted. Raises RayError where it is gone."""
        return int(await _answer(self._actors[replica_id].pid.remote()))

    def unplaced(self) -> frozenset[str]:
        """Replicas that no node has room for yet."""
        pending = {row["name"] for row in placement_group_table().values() if row["state"] == "PENDING"}
        return frozenset(replica_id for replica_id in self._actors if _name(replica_id) in pending)

    def disconnect(self) -> None:
        """Leave Ray; a local one ends with everything in it."""
        ray.shutdown()

    def _end(self, replica_id: str) -> None:
        ray.kill(self._actors.pop(replica_id), no_restart=True)
        remove_placement_group(get_placement_group(_name(replica_id)))

    def _adopt(self) -> None:
        for named in list_named_actors():
            replica_id = named.removeprefix(_name(""))
            if named != replica_id and replica_id.startswith(f"{self._prefix}-"):
                self._actors[replica_id] = ray.get_actor(named, namespace=NAMESPACE)
        if self._actors:
            _log.info("taken over: %s", ", ".join(sorted(self._actors)))


def _name(replica_id: str) -> str:
    return f"slos-worker:{replica_id}"


async def _answer(reference: Any) -> Any:
    return await reference
