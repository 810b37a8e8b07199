"""What the planner knows about one replica: its last reported state, plus promises not yet seen in it.

Theory of operation
-------------------
A worker's states are numbered. A full one replaces what was known; a delta applies only on top of the one before it, so
that a gap leaves the ledger as it was and asks for a snapshot. A promise starts as a *reservation* that holds its place
for two seconds, is *committed* once the request is in its queue, and ends when the engine reports the request (from
then on the state carries it), when it is released, or when its own first-token deadline is long past.
"""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, replace
from enum import Enum, auto

from protos import types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.columns import DecoderColumns, columns_of
from services.core.perf_model import PerfModel
from services.core.speculation import Drafts
from services.core.view import Decoder, Prefill, ReplicaView
from services.planner.history import VerdictHistory
from services.planner.slip import TransitEstimate
from services.planner.state import Capacity, EngineEntry, StateUpdate

__all__ = ["Applied", "Ledger", "Reservation"]

Key = tuple[str, int]

_MAX_COAST_S = 0.5
_UNSEEN_S = 5.0


class Applied(Enum):
    """What became of a state."""

    TAKEN = auto()
    GAP = auto()  # out of order: the ledger is unchanged and wants a snapshot


@dataclass(frozen=True, slots=True)
class Reservation:
    """A promised or pending request that the engine has not reported yet. `expires_s`: monotonic seconds.

    `promotes`: the request is in the engine already, without a promise; a directive is on its way.
    `tried`: it is late if its way takes as long as most did lately.
    """

    attempt: int
    prefill: Prefill
    verdict: types_pb2.Verdict
    expires_s: float
    committed: bool = False
    promotes: bool = False
    tried: bool = False


class Ledger:
    """State and promises of one replica. Times are read from `clock`; every method leaves it consistent."""

    def __init__(self, replica_id: str, clock: Clock, *, reservation_s: float = 2.0) -> None:
        self.replica_id = replica_id
        self._clock = clock
        self._reservation_s = reservation_s
        self._entries: dict[str, EngineEntry] = {}
        self._columns: DecoderColumns | None = None
        self._capacity: Capacity | None = None
        self._perf_model: PerfModel | None = None
        self._drafts = Drafts()
        self._seq: int | None = None  # of the current connection; None until its first full state
        self._broken_at_s: float | None = None
        self._reservations: dict[str, Reservation] = {}
        self.history = VerdictHistory()
        self.transit = TransitEstimate()

    # --- state ---

    def connect(self) -> None:
        """A new stream: it starts with a full state. What was known stays until then."""
        self._seq = None

    def disconnect(self) -> None:
        """The stream broke: nothing is promised until it is back."""
        self._seq = None
        self._broken_at_s = self._clock.now_s()

    @property
    def broken_for_s(self) -> float:
        """Seconds since the stream broke; 0 while it stands."""
        return 0.0 if self._broken_at_s is None else self._clock.now_s() - self._broken_at_s

    def apply(self, update: StateUpdate) -> Applied:
        """Take a state. A stale number raises `SloServeError` (STATE_INVALID); a gap changes nothing."""
        if self._seq is not None and update.seq <= self._seq:
            raise SloServeError(
                Reason.STATE_INVALID,
                f"state {update.seq} of replica {self.replica_id} is stale: {self._seq} was taken already",
            )
        if not update.full and (self._seq is None or update.seq != self._seq + 1):
            return Applied.GAP
        before = self._entries
        kept = {} if update.full else {i: e for i, e in before.items() if i not in update.removed_ids}
        self._entries = kept | update.entries
        self._columns = None
        self._seq = update.seq
        self._capacity = update.capacity
        self._broken_at_s = None
        if update.perf_model is not None:
            self._perf_model = update.perf_model
        if update.drafts is not None:
            self._drafts = update.drafts
        self._settle(update, before)
        return Applied.TAKEN

    def _settle(self, update: StateUpdate, before: dict[str, EngineEntry]) -> None:
        """End the reservations of requests that the engine has reported, or has finished with."""
        self._expire()
        for request_id, held in list(self._reservations.items()):
            entry = self._entries.get(request_id)
            if entry is not None:
                waits_for_tier = held.promotes and entry.planned.tier < 0
                seen = entry.attempt >= held.attempt and not waits_for_tier
            else:
                older = before.get(request_id)
                seen = request_id in update.removed_ids and (older is None or older.attempt >= held.attempt)
            if seen:
                del self._reservations[request_id]
        for request_id in update.entries.keys() - before.keys():
            said = self.history.seen(request_id, update.capacity.observed_s)
            entry = update.entries[request_id]
            # Best effort waits in a queue first, which is no way.
            sent = said is not None and said.taken and said.attempt == entry.attempt
            transit_s = entry.accepted_s - said.decided_s if said is not None and sent else math.nan
            if math.isfinite(transit_s):
                self.transit.observe(self._clock.now_s(), transit_s)
        for request_id, entry in update.entries.items():
            self.history.decided(request_id, entry.attempt, promised=entry.planned.promised, tier=entry.planned.tier)

    @property
    def ready(self) -> bool:
        """True once a state is known and its stream stands."""
        return self._capacity is not None and self._broken_at_s is None

    @property
    def why_not_ready(self) -> str:
        """One sentence for people on why nothing can be promised."""
        if self._broken_at_s is not None:
            return f"the state stream of replica {self.replica_id} broke {self.broken_for_s:.1f} s ago"
        return f"replica {self.replica_id} has not reported its state yet"

    @property
    def perf_model(self) -> PerfModel | None:
        """The replica's performance model; None before the first state."""
        return self._perf_model

    @property
    def drafts(self) -> Drafts:
        """What the engine drafts, and the acceptance rates it has seen."""
        return self._drafts

    @property
    def max_batch_tokens(self) -> int:
        """Tokens the engine puts into one batch at most; 0 where it has not said."""
        return 0 if self._capacity is None else self._capacity.max_batch_tokens

    @property
    def batches_in_flight(self) -> int:
        """Batches that may be under way when a request arrives."""
        return 1 if self._capacity is None else self._capacity.batches_in_flight

    @property
    def engine_free_s(self) -> float:
        """When the batches that the engine has reported end, monotonic seconds; -inf where there are none."""
        return -math.inf if self._capacity is None else self._capacity.engine_free_s

    @property
    def running(self) -> int:
        """Requests in the engine."""
        return len(self._entries)

    @property
    def entries(self) -> dict[str, EngineEntry]:
        """Requests in the engine, by id. Read only."""
        return self._entries

    # --- promises ---

    def reserve(
        self,
        attempt: int,
        prefill: Prefill,
        verdict: types_pb2.Verdict,
        *,
        promised: bool = True,
        promotes: bool = False,
        tried: bool = False,
    ) -> int:
        """Hold a place, for a promise or for a pending request; returns until when, in Unix microseconds."""
        expires_s = self._clock.now_s() + self._reservation_s
        held = replace(prefill, promised=promised)
        self._reservations[prefill.id] = Reservation(attempt, held, verdict, expires_s, promotes=promotes, tried=tried)
        return self._clock.to_unix_us(expires_s)

    def reservation(self, key: Key) -> Reservation | None:
        """The live promise of this attempt, if the engine has not taken it over yet."""
        self._expire()
        found = self._reservations.get(key[0])
        return found if found is not None and found.attempt == key[1] else None

    @property
    def tries(self) -> int:
        """Requests on their way that are late if that takes as long as it mostly did lately; see `Promises`."""
        return sum(held.tried for held in self._reservations.values())

    @property
    def undecided(self) -> int:
        """Requests on their way that the engine is to decide about."""
        return sum(not held.prefill.promised for held in self._reservations.values())

    def holds(self, key: Key) -> bool:
        """True where this attempt is promised: reserved, committed, or in the engine on a tier."""
        entry = self._entries.get(key[0])
        in_engine = entry is not None and entry.attempt == key[1] and entry.planned.promised
        reserved = self.reservation(key)
        return in_engine or (reserved is not None and reserved.prefill.promised)

    def attempt(self, request_id: str) -> int:
        """The latest attempt known of a request; 0 for none."""
        known = (self._reservations.get(request_id), self._entries.get(request_id), self.history.get(request_id))
        return max((found.attempt for found in known if found is not None), default=0)

    def commit(self, key: Key) -> bool:
        """Keep a reservation until the engine reports the request; False if it had run out."""
        found = self.reservation(key)
        if found is None:
            return self.holds(key)
        now_s = self._clock.now_s()
        until_s = max(found.prefill.deadline_s, now_s) + _UNSEEN_S
        self._reservations[key[0]] = replace(found, committed=True, expires_s=until_s)
        return True

    def release(self, key: Key) -> bool:
        """Free a promise. True where the engine has the request already, so that the worker must be told."""
        found = self._reservations.get(key[0])
        if found is not None and found.attempt == key[1]:
            del self._reservations[key[0]]
        entry = self._entries.get(key[0])
        return entry is not None and entry.attempt == key[1]

    def _expire(self) -> None:
        now_s = self._clock.now_s()
        gone = [request_id for request_id, held in self._reservations.items() if held.expires_s <= now_s]
        for request_id in gone:
            del self._reservations[request_id]
            self.history.lapsed(request_id)

    # --- the core's view ---

    def view(self, asked_ids: frozenset[str] = frozenset()) -> ReplicaView:
        """The replica as the core plans it, now, less the requests that are asked about.

        Where the engine still holds a request under an id that is reserved or asked about (an older attempt, or one to
        be promoted), only the newer claim is planned; the blocks it holds count as held by others.
        Raises `SloServeError` (REPLICA_UNKNOWN) before the first state.
        """
        if self._capacity is None or self._perf_model is None:
            raise SloServeError(Reason.REPLICA_UNKNOWN, self.why_not_ready)
        self._expire()
        now_s = self._clock.now_s()
        seen = self._capacity
        newer_ids = (self._reservations.keys() | asked_ids) & self._entries.keys()
        reserved = (held.prefill for held in self._reservations.values() if held.prefill.id not in asked_ids)
        return ReplicaView(
            now_s=now_s,
            model=self._perf_model,
            decoders=self._decoders(newer_ids, now_s - max(seen.observed_s, seen.engine_free_s)),
            prefills=(*self._engine_prefills(newer_ids), *reserved),
            free_blocks=seen.free_blocks,
            total_blocks=seen.total_blocks,
            block_size=seen.block_size,
            max_num_seqs=seen.max_num_seqs,
            engine_free_at_s=seen.engine_free_s if seen.engine_free_s > now_s else -math.inf,
        )

    def applications(self, asked_ids: Set[str] = frozenset()) -> Iterator[tuple[int, str]]:
        """Tier and application of every request in `view(asked_ids)`; tier -1 is best effort."""
        self._expire()
        for request_id, entry in self._entries.items():
            if request_id not in asked_ids and request_id not in self._reservations:
                yield entry.planned.tier, entry.application
        for request_id, held in self._reservations.items():
            if request_id not in asked_ids:
                yield held.prefill.tier, held.prefill.application

    def _decoders(self, newer_ids: Set[str], since_s: float) -> Sequence[Decoder]:
        """Decoders as they will be when the next batch starts.

        Reports count the tokens in flight, so that they describe the moment the engine is free. From then on decoders
        go on: each is taken to keep the slack it had (it gains some where batches are shorter than its TPOT). A replica
        that has gone quiet is not given more than half a second of that.
        """
        if self._columns is None:
            self._columns = columns_of(self._engine_decoders(frozenset()))
        columns = columns_of(self._engine_decoders(newer_ids)) if newer_ids else self._columns
        coast_s = min(max(0.0, since_s), _MAX_COAST_S)
        return replace(columns, next_deadline_s=columns.next_deadline_s + coast_s)

    def _engine_decoders(self, newer_ids: Set[str]) -> list[Decoder]:
        entries = self._entries.items()
        return [e.planned for name, e in entries if isinstance(e.planned, Decoder) and name not in newer_ids]

    def _engine_prefills(self, newer_ids: Set[str]) -> list[Prefill]:
        entries = self._entries.items()
        return [e.planned for name, e in entries if isinstance(e.planned, Prefill) and name not in newer_ids]
