"""One request in this process: its facts, its output so far, and what its client has to be told.

A session is a log, not a queue: tokens and markers (stage ends, changed verdicts) stay in order, and a reader walks
them at its own pace from any token. Resuming, re-attaching and a slow client are therefore the same thing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from protos import router_pb2, types_pb2, worker_pb2
from services.admission.bell import Bell
from services.admission.lifecycle import Signal, State, next_state
from services.admission.request_trace import RequestTrace
from services.admission.stage_clock import StageClock
from services.admission.transcript import OutputRules, Transcript
from services.common.errors import Reason, SloServeError
from services.core.stages import StageEnd

__all__ = ["Intake", "Marker", "Session", "SessionFacts", "VerdictNews"]


_RETRY_MS = 1000.0  # where the plan does not say when there would be room


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What does not change while a request lives. `keep_s`: how long its output is kept after its end."""

    queued: types_pb2.QueuedRequest
    rules: OutputRules
    on_infeasible: types_pb2.OnInfeasible.ValueType
    resume_grace_s: float
    keep_s: float


@dataclass(frozen=True, slots=True)
class VerdictNews:
    """The verdict changed; `decision` where it is the answer to a PENDING one."""

    verdict: types_pb2.Verdict
    reason: str
    decision: bool


@dataclass(frozen=True, slots=True)
class Marker:
    """Something to tell the client once it has the first `at_token` output tokens."""

    at_token: int
    news: StageEnd | VerdictNews


class Intake(Enum):
    """What a chunk asks of whoever received it."""

    TAKEN = auto()
    IGNORED = auto()  # stale, repeated, or for an ended request
    GAP = auto()  # tokens before it are missing: attach again
    CUT = auto()  # the output ended here although the engine goes on: cancel it there
    DECLINED = auto()  # its client takes no best effort: cancel it there


class Session:
    """The state of one live or recently ended request."""

    def __init__(self, facts: SessionFacts, decode: Callable[[Sequence[int]], str], trace: RequestTrace) -> None:
        self.facts = facts
        self.request_id = facts.queued.request_id
        self.trace = trace
        self.transcript = Transcript(facts.rules, decode)
        self.clock = StageClock(facts.rules.stages, facts.queued.arrival_us)
        self.state = State.PLACING
        self.attempt = facts.queued.attempt
        self._given_up = 0  # the attempt whose worker is lost: no more is taken from it
        self.replica_id = ""
        self.first_verdict: types_pb2.Verdict | None = None
        self.verdict: types_pb2.Verdict | None = None
        self.promised = False
        self.hops: Sequence[router_pb2.Hop] = ()
        self.markers: list[Marker] = []
        self.finish_reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_UNSPECIFIED
        self.error: SloServeError | None = None
        self.watcher: Bell | None = None
        self.last_heard_s = 0.0
        self.emitted_us = 0  # end of the newest token's batch, by our clock; 0 until one is here
        self.first_lag_us: int | None = None  # from the end of its batch to the sending of the first token
        self.settled = False

    @property
    def met(self) -> bool:
        """True where the request finished and every stage met its SLO."""
        return self.state is State.FINISHED and all(report.met for report in self.clock.reports())

    def placed(self, response: router_pb2.PlaceResponse) -> None:
        """The request has its place: the verdict is known."""
        if self.verdict is None or response.verdict.kind != types_pb2.VERDICT_KIND_PENDING:
            self._decide(response.verdict)
        self.hops = response.hops
        if self._signal(Signal.PLACED) and self.attempt <= response.attempt:
            self.attempt = response.attempt
            self.replica_id = self.replica_id or response.replica_id
        self._wake()

    def lost(self) -> bool:
        """Its worker is gone; False where that does not matter (any more).

        From here on the output stands still until it has a place again: what the lost worker sends yet would not be
        what the next one continues after.
        """
        if not self._signal(Signal.LOST):
            return False
        self._given_up = self.attempt
        return True

    def replaced(self, response: router_pb2.PlaceResponse, reason: str) -> None:
        """The request has a new place; the client is told."""
        if self._signal(Signal.REPLACED):
            if response.attempt >= self.attempt:
                self.attempt = response.attempt
                self.replica_id = response.replica_id
            self.hops = response.hops
            self._news(response.verdict, reason)
            self._wake()

    def moved(self, attempt: int, replica_id: str) -> None:
        """Somebody else placed it again, or its worker is there after all."""
        self._given_up = 0
        self.attempt = max(self.attempt, attempt)
        self.replica_id = replica_id
        self._signal(Signal.REPLACED)

    def take(self, replica_id: str, chunk: worker_pb2.TokenChunk) -> Intake:
        """Take tokens in; repeated ones are dropped, whatever attempt they come from."""
        have = len(self.transcript.ids)
        if self.state.ended or chunk.attempt < self.attempt or chunk.attempt <= self._given_up:
            return Intake.IGNORED
        if chunk.offset > have:
            return Intake.GAP
        self.attempt = chunk.attempt
        self.replica_id = replica_id
        if chunk.HasField("verdict") and not self._known(chunk.verdict):
            self._news(chunk.verdict, chunk.verdict.constraint.detail)
            if self.state.ended:
                return Intake.DECLINED
        skip = have - chunk.offset
        new = chunk.token_ids[skip:] if skip else chunk.token_ids
        cut = None
        if new:
            if self.state is not State.STREAMING:
                self._signal(Signal.TOKENS)
            ends, cut = self.transcript.push(new)
            for end in ends:
                self._stage_over(end)
        if cut is not None:
            self.end(types_pb2.FINISH_REASON_STOP if cut.by_stop_string else types_pb2.FINISH_REASON_LENGTH)
            return Intake.TAKEN if chunk.finish_reason else Intake.CUT
        if chunk.finish_reason:
            self._end_by_engine(chunk)
        self._wake()
        return Intake.TAKEN

    def end(self, reason: types_pb2.FinishReason.ValueType) -> None:
        """No more tokens come; the client is told `finished` with `reason`."""
        cancelled = reason == types_pb2.FINISH_REASON_CANCELLED
        if not self._signal(Signal.CANCELLED if cancelled else Signal.FINISHED):
            return
        self.finish_reason = reason
        self.transcript.close()
        last = self.transcript.last_stage_end()
        if last is not None and not cancelled:
            self._stage_over(last)
        self._wake()

    def fail(self, error: SloServeError) -> None:
        """The request ends with an error status."""
        if self._signal(Signal.FAILED):
            self.finish_reason = types_pb2.FINISH_REASON_ERROR
            self.error = error
            self._wake()

    def close_trace(self) -> None:
        """End the spans of this request in this process."""
        kind = self.verdict.kind if self.verdict else types_pb2.VERDICT_KIND_UNSPECIFIED
        attributes: dict[str, str | bool | int | float] = {
            "slos_serve.verdict": types_pb2.VerdictKind.Name(kind).removeprefix("VERDICT_KIND_"),
            "slos_serve.outcome": str(self.state),
            "slos_serve.met": self.met,
            "slos_serve.promised": self.promised,
            "slos_serve.replica": self.replica_id,
            "slos_serve.attempts": self.attempt,
            "gen_ai.usage.input_tokens": len(self.facts.queued.prompt_token_ids),
            "gen_ai.usage.output_tokens": len(self.transcript.ids),
        }
        self.trace.end(attributes, self.error.text if self.error else None)

    def _end_by_engine(self, chunk: worker_pb2.TokenChunk) -> None:
        if chunk.finish_reason == types_pb2.FINISH_REASON_ERROR:
            text = f"request {self.request_id} failed on {self.replica_id}: {chunk.error or 'no reason given'}"
            self.fail(SloServeError(Reason.ENGINE_FAILED, text))
        else:
            self.end(chunk.finish_reason)

    def _stage_over(self, end: StageEnd) -> None:
        self.clock.stage_ends(end)
        self.markers.append(Marker(end.at_output_token, end))

    def _decide(self, verdict: types_pb2.Verdict) -> None:
        stage = self.facts.rules.stages[0]
        known = types_pb2.Verdict()
        known.CopyFrom(verdict)
        known.ttft_slo_ms = known.ttft_slo_ms or (stage.ttft_s or 0.0) * 1000
        known.tpot_slo_ms = known.tpot_slo_ms or stage.tpot_s * 1000
        hidden = self._rejects and known.kind == types_pb2.VERDICT_KIND_PENDING
        if self.first_verdict is None and not hidden:
            self.first_verdict = known
        self.verdict = known
        self.promised = self.promised or known.kind == types_pb2.VERDICT_KIND_ADMITTED

    def _known(self, verdict: types_pb2.Verdict) -> bool:
        """Whether it was told before: a worker repeats its last verdict when a broken subscription is back."""
        last = self.verdict
        return last is not None and (last.kind, last.decided_at_us) == (verdict.kind, verdict.decided_at_us)

    def _news(self, verdict: types_pb2.Verdict, reason: str) -> None:
        before = self.verdict.kind if self.verdict is not None else types_pb2.VERDICT_KIND_UNSPECIFIED
        pending = before == types_pb2.VERDICT_KIND_PENDING
        decided = pending or self.verdict is None  # a decision may overtake the placement's answer
        if decided and self._rejects and verdict.kind == types_pb2.VERDICT_KIND_BEST_EFFORT:
            self.verdict = _rejection(verdict)
            self.fail(_declined(self.request_id, self.verdict))
            return
        untold = self.first_verdict is None
        self._decide(verdict)
        assert self.verdict is not None
        if untold:  # its first event says it
            return
        news = VerdictNews(self.verdict, reason, pending and verdict.kind != types_pb2.VERDICT_KIND_PENDING)
        self.markers.append(Marker(len(self.transcript.ids), news))

    @property
    def _rejects(self) -> bool:
        """Whether the client would rather have an error than best effort; it never sees PENDING then."""
        return self.facts.on_infeasible == types_pb2.ON_INFEASIBLE_REJECT

    def _signal(self, signal: Signal) -> bool:
        after = next_state(self.state, signal)
        if after is None:
            return False
        self.state = after
        return True

    def _wake(self) -> None:
        if self.watcher is not None:
            self.watcher.ring()


def _rejection(verdict: types_pb2.Verdict) -> types_pb2.Verdict:
    """What best effort means to a client that takes none."""
    rejected = types_pb2.Verdict()
    rejected.CopyFrom(verdict)
    rejected.kind, rejected.tier = types_pb2.VERDICT_KIND_REJECTED, ""
    rejected.retry_after_ms = verdict.retry_after_ms or _RETRY_MS
    return rejected


def _declined(request_id: str, rejected: types_pb2.Verdict) -> SloServeError:
    """What a client that takes no best effort is told when its pending request cannot be promised."""
    why = f": {rejected.constraint.detail}" if rejected.constraint.detail else ""
    text = (
        f"request {request_id} waited for room on {rejected.replica_id or 'its replica'}, which cannot promise it{why}"
    )
    return SloServeError(
        Reason.NO_CAPACITY,
        text,
        retry_after_ms=rejected.retry_after_ms,
        details=(rejected,),
        metadata={"request_id": request_id},  # to ask Explain about
    )
