"""The replicas this planner has heard from: a ledger and a decider for each."""

from dataclasses import dataclass, field

from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.planner.decide import Decider
from services.planner.ledger import Ledger
from services.planner.promises import Planning, Promises

__all__ = ["Fleet", "PlannedReplica"]


@dataclass(slots=True)
class PlannedReplica:
    """One replica: what is promised, who decides, and which stream may change it (`connection` counts them)."""

    promises: Promises
    decider: Decider
    connection: int = 0
    promoted_at_s: float = field(default=float("-inf"))

    @property
    def ledger(self) -> Ledger:
        """What is known about it."""
        return self.promises.ledger


class Fleet:
    """Ledgers by replica. One whose stream broke is kept for `forget_s` seconds."""

    def __init__(self, clock: Clock, planning: Planning, *, reservation_s: float, forget_s: float) -> None:
        self._clock = clock
        self._planning = planning
        self._reservation_s = reservation_s
        self._forget_s = forget_s
        self._replicas: dict[str, PlannedReplica] = {}

    def connect(self, replica_id: str) -> PlannedReplica:
        """The replica at the start of a new stream of states; the newest stream alone may change its ledger."""
        self._forget()
        replica = self._replicas.get(replica_id)
        if replica is None:
            promises = self._promises(replica_id)
            replica = PlannedReplica(promises, Decider(promises))
            self._replicas[replica_id] = replica
        replica.connection += 1
        replica.ledger.connect()
        return replica

    def find(self, replica_id: str) -> PlannedReplica | None:
        """The replica, if it has been heard from and is not forgotten."""
        self._forget()
        return self._replicas.get(replica_id)

    def get(self, replica_id: str) -> PlannedReplica:
        """The replica; raises `SloServeError` (REPLICA_UNKNOWN) if it was never heard from, or not for long."""
        found = self.find(replica_id)
        if found is None:
            raise SloServeError(Reason.REPLICA_UNKNOWN, f"replica {replica_id!r} does not report to this planner")
        return found

    def stranger(self, replica_id: str) -> Decider:
        """A decider for a replica that was never heard from: it can promise nothing, and nothing is kept."""
        return Decider(self._promises(replica_id))

    def _promises(self, replica_id: str) -> Promises:
        ledger = Ledger(replica_id, self._clock, reservation_s=self._reservation_s)
        return Promises(ledger, self._clock, self._planning)

    def _forget(self) -> None:
        gone = [name for name, replica in self._replicas.items() if replica.ledger.broken_for_s > self._forget_s]
        for name in gone:
            del self._replicas[name]
