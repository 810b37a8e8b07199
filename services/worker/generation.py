"""One attempt of a request from the engine's first step to its recorded end."""

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from protos import planner_pb2, types_pb2
from services.common.clock import Clock
from services.common.errors import SloServeError
from services.common.request_record import RequestState
from services.core.constraint import FITS
from services.core.slo import Tier
from services.worker.claims import Claimed, Claims
from services.worker.decision_verdict import decision_verdict
from services.worker.engine_api import Engine, EngineEnd, EngineOutput, RequestDecision, Submission
from services.worker.first_token_hold import FirstTokenHold
from services.worker.outbox import Outbox
from services.worker.output import OutputEnd
from services.worker.stage_spans import StageSpans
from services.worker.stage_times import StageTime, StageTimes

__all__ = ["Generation", "GenerationParts"]

_log = logging.getLogger(__name__)

_DECISION_S = 1.0  # a first token that is out waits at most so long for the hook's word on a pending request
_ENGINE_LOST_GRACE_S = 0.5  # an engine that dies fails its requests a moment before it is known to be dead


@dataclass(frozen=True, slots=True)
class GenerationParts:
    """What every generation of a worker uses. `engine_lost` is set once the engine will produce nothing any more."""

    engine: Engine
    claims: Claims
    outbox: Outbox
    clock: Clock
    replica_id: str
    tiers: Sequence[Tier]
    engine_lost: asyncio.Event
    on_finished: Callable[[planner_pb2.FinishedLength, EngineEnd], None]
    on_scheduled: Callable[[str, float], None]  # tier, seconds since the entry was appended
    reforecast: Callable[[str, int, int, int], int]  # application, prompt, most and produced tokens: the new forecast
    hold_first_token: bool = False


class _Leave(StrEnum):
    """Why it ends before the engine says so."""

    CANCEL = "cancel"
    STOP_STRING = "stop"
    ABANDON = "abandon"  # somebody else holds the request: leave without a word
    HAND_BACK = "hand back"


class Generation:
    """One running attempt. `run` drives it; everything else is told to it meanwhile."""

    def __init__(self, claimed: Claimed, submission: Submission, parts: GenerationParts) -> None:
        self.claimed = claimed
        self._submission = submission
        self._parts = parts
        self._times = StageTimes(submission.stages, claimed.request.delivered_token_ids, submission.first_token_s)
        self._spans = StageSpans(claimed, parts.replica_id, parts.clock)
        self._new_ids: list[int] = []
        self._produced = 0  # by the engine: as many as `_new_ids` and what is held
        self._promised = submission.promised
        self._forecast_tokens = submission.forecast_tokens
        self._hold: FirstTokenHold | None = None
        if parts.hold_first_token and submission.first_token_s is None:
            self._hold = FirstTokenHold(submission.ttft_deadline_s, parts.clock, self._take)
        self._undecided = claimed.request.pending and not submission.promised
        self._decision = asyncio.Event()
        self._scheduled = False
        self._leave: _Leave | None = None
        self._notes: set[asyncio.Task[None]] = set()

    @property
    def started(self) -> bool:
        """True once its prefill has begun."""
        return self._scheduled or bool(self._new_ids)

    @property
    def promised(self) -> bool:
        """True where a promise was made about it."""
        return self._promised

    async def run(self) -> None:
        """Generate to the end, whichever it is, and record it."""
        self._parts.outbox.open_for(self.claimed.request)
        if self._undecided and not self._submission.pending:
            self._decide_without_hook("it was handed to the shared queue before it was decided")
        end, error = await self._generate()
        if self._hold is not None:
            self._hold.cancel()
        if self._mute and end is not EngineEnd.ERROR:
            end = EngineEnd.ABORTED  # it may have ended by itself just then, with tokens nobody was sent
        if self._leave is _Leave.ABANDON or (end is EngineEnd.ERROR and await self._engine_is_lost()):
            self._parts.outbox.discard(self.claimed.request_id, self.claimed.attempt)
            self._close_spans(self._last_stage(), "left to another attempt")
        elif self._leave is _Leave.HAND_BACK and end is EngineEnd.ABORTED:
            await self._hand_back()
        else:
            await self._finish(end, error)
        await asyncio.gather(*self._notes)

    async def cancel(self, reason: str) -> None:
        """End it for its client; its KV blocks are free within one engine step. "stop" is a matched stop string."""
        await self._abort(_Leave.STOP_STRING if reason == "stop" else _Leave.CANCEL)

    async def abandon(self) -> None:
        """Abort without recording anything: the request is another attempt's, or will be placed again."""
        await self._abort(_Leave.ABANDON)

    async def hand_back(self) -> None:
        """Abort and put the request into the shared best-effort queue."""
        await self._abort(_Leave.HAND_BACK)

    def scheduled(self, at_s: float) -> None:
        """The scheduler says when its prefill began."""
        if not self._scheduled:
            self._scheduled = True
            self._spans.scheduled(at_s)
            scheduled_us = self._parts.clock.to_unix_us(at_s)
            self._parts.outbox.scheduled(self.claimed.request_id, self.claimed.attempt, scheduled_us=scheduled_us)
            self._parts.on_scheduled(self.claimed.request.tier, (scheduled_us - self.claimed.queued_us) / 1e6)

    def promote(self, tier: str, verdict: types_pb2.Verdict) -> None:
        """Promise it from now on."""
        self._promised = True
        self._settled()
        self._parts.engine.promote(self.claimed.request_id, tier)
        self._parts.outbox.verdict(self.claimed.request_id, self.claimed.attempt, verdict)
        self._note(self._parts.claims.promoted(self.claimed, tier, started=bool(self._new_ids)))

    def decided(self, decision: RequestDecision) -> None:
        """The scheduler's verdict on it, where it was pending."""
        if not self._undecided or decision.attempt != self.claimed.attempt:
            return
        self._promised = decision.admitted
        if not decision.admitted:
            self.released()
        request, now_us = self.claimed.request, self._parts.clock.now_us()
        verdict = decision_verdict(
            decision, request, replica_id=self._parts.replica_id, tiers=self._parts.tiers, now_us=now_us
        )
        self._parts.outbox.verdict(self.claimed.request_id, self.claimed.attempt, verdict)
        started = bool(self._new_ids)
        claims = self._parts.claims
        if decision.admitted:
            self._note(claims.promoted(self.claimed, request.tier, started=started))
        else:
            self._note(claims.demoted(self.claimed, started=started))
        self._settled()

    def demoted(self, decision: RequestDecision) -> None:
        """The scheduler moved it to best effort: its promise cannot be kept any more, for the reason given.

        It stays a promise in the records, and so an audited miss.
        """
        if decision.attempt != self.claimed.attempt:
            return
        self._settled()
        self.released()
        verdict = decision_verdict(
            decision,
            self.claimed.request,
            replica_id=self._parts.replica_id,
            tiers=self._parts.tiers,
            now_us=self._parts.clock.now_us(),
        )
        self._parts.outbox.verdict(self.claimed.request_id, self.claimed.attempt, verdict)
        self._note(self._parts.claims.demoted(self.claimed, started=bool(self._new_ids)))

    def released(self) -> None:
        """The scheduler has no use for the time that its first token could still be held."""
        if self._hold is not None:
            self._hold.release()

    @property
    def _mute(self) -> bool:
        return self._leave not in (None, _Leave.HAND_BACK)

    async def _generate(self) -> tuple[EngineEnd, str]:
        if self._leave is not None:
            return EngineEnd.ABORTED, ""
        try:
            async for output in self._parts.engine.generate(self._submission):
                if self._undecided and output.token_ids:
                    await self._until_decided()
                self._reforecast(output)
                if self._hold is None or self._mute or not self._promised or not self._hold.keep(output):
                    self._take(output)
                if output.end is not None:
                    return output.end, output.error
        except Exception as error:  # whatever an engine raises, its client is answered
            _log.exception("request %s failed in the engine", self.claimed.request_id)
            return EngineEnd.ERROR, f"{type(error).__name__}: {error}"
        return EngineEnd.ABORTED, ""

    def _reforecast(self, output: EngineOutput) -> None:
        """Tell the scheduler a new length where this output outlives the forecast."""
        self._produced += len(output.token_ids)
        if self._produced < self._forecast_tokens or output.end is not None:
            return
        most, before = self._submission.sampling.max_tokens, self._submission.delivered_tokens
        prompt_tokens = len(self.claimed.request.prompt_token_ids)
        found = self._parts.reforecast(
            self._submission.application, prompt_tokens, most + before, self._produced + before
        )
        self._forecast_tokens = found - before
        if self._produced < most:
            self._parts.engine.reforecast(self.claimed.request_id, self._forecast_tokens)

    async def _until_decided(self) -> None:
        """A verdict comes no later than the first token, although the two leave the engine on different ways."""
        try:
            await asyncio.wait_for(self._decision.wait(), _DECISION_S)
        except TimeoutError:
            _log.warning("request %s has a token but no verdict of the scheduler", self.claimed.request_id)
            self._decide_without_hook("its first token came before a verdict")

    def _decide_without_hook(self, why: str) -> None:
        request_id, attempt = self.claimed.request_id, self.claimed.attempt
        _log.info("request %s is best effort: %s", request_id, why)
        self.decided(RequestDecision(request_id, attempt, False, math.nan, math.nan, FITS))

    def _settled(self) -> None:
        self._undecided = False
        self._decision.set()

    def _take(self, output: EngineOutput) -> None:
        if not output.token_ids or self._mute:
            return
        first = not self._new_ids
        self._new_ids.extend(output.token_ids)
        emitted_us = self._parts.clock.to_unix_us(output.emitted_at_s)
        self._parts.outbox.publish(
            self.claimed.request_id, self.claimed.attempt, output.token_ids, emitted_us=emitted_us
        )
        if output.end is not None and output.end is not EngineEnd.ERROR:  # leave in one chunk with the last token
            self._parts.outbox.finish(self.claimed.request_id, self.claimed.attempt, self._output_end(output.end, ""))
        ended = self._times.advance(output.token_ids, output.emitted_at_s)
        if first:
            self._spans.first_token(output.emitted_at_s)
            self._note(self._parts.claims.running(self.claimed, emitted_us))
        for stage in ended:
            self._spans.stage(stage)

    def _output_end(self, end: EngineEnd, error: str) -> OutputEnd:
        if end is EngineEnd.ERROR:
            return OutputEnd(types_pb2.FINISH_REASON_ERROR, error or "the engine failed")
        if end is EngineEnd.LENGTH:
            return OutputEnd(types_pb2.FINISH_REASON_LENGTH)
        if end is EngineEnd.STOP or self._leave is _Leave.STOP_STRING:
            return OutputEnd(types_pb2.FINISH_REASON_STOP)
        return OutputEnd(types_pb2.FINISH_REASON_CANCELLED)

    async def _finish(self, end: EngineEnd, error: str) -> None:
        output_end = self._output_end(end, error)
        self._parts.outbox.finish(self.claimed.request_id, self.claimed.attempt, output_end)
        state = {
            types_pb2.FINISH_REASON_ERROR: RequestState.FAILED,
            types_pb2.FINISH_REASON_CANCELLED: RequestState.CANCELLED,
        }.get(output_end.reason, RequestState.FINISHED)
        failed = state is not RequestState.FINISHED
        last = self._last_stage()
        length = self._length("failed" if failed else self._times.missed(self._submission.ttft_deadline_s))
        self._parts.on_finished(length, end)
        fields: dict[str, object] = {"output_tokens": self._times.output_tokens}
        if output_end.error:
            fields["error"] = output_end.error
        ours = await self._parts.claims.end(self.claimed, state, fields)
        why = None if ours else "superseded by a later attempt"
        self._close_spans(last, (output_end.error or "cancelled") if failed else why)

    async def _hand_back(self) -> None:
        request, first_token_s = self.claimed.request, self._times.first_token_s
        first_token_us = None if first_token_s is None else self._parts.clock.to_unix_us(first_token_s)
        self._parts.outbox.discard(self.claimed.request_id, self.claimed.attempt)
        self._close_spans(self._last_stage(), "handed back")
        output_ids = (*request.delivered_token_ids, *self._new_ids)
        await self._parts.claims.hand_back(self.claimed, output_ids, first_token_us, pending=self._undecided)

    def _last_stage(self) -> StageTime | None:
        return self._times.finish() if self._new_ids else None

    def _close_spans(self, last: StageTime | None, error: str | None) -> None:
        self._spans.finish(self._parts.clock.now_s(), error)
        if last is not None:
            self._spans.stage(last, error)

    def _length(self, missed: str) -> planner_pb2.FinishedLength:
        request = self.claimed.request
        return planner_pb2.FinishedLength(
            request_id=request.request_id,
            application=request.application,
            prompt_tokens=len(request.prompt_token_ids),
            output_tokens=self._times.output_tokens,
            promised=self._promised,
            met=not missed,
            missed=missed,
        )

    async def _abort(self, leave: _Leave) -> None:
        if self._leave is None:
            self._leave = leave
        if not self._parts.engine_lost.is_set():
            await self._parts.engine.abort(self.claimed.request_id)

    async def _engine_is_lost(self) -> bool:
        try:
            await asyncio.wait_for(self._parts.engine_lost.wait(), _ENGINE_LOST_GRACE_S)
        except TimeoutError:
            return False
        return True

    def _note(self, recorded: Coroutine[Any, Any, bool]) -> None:
        """Record progress beside the stream of tokens; where the request is no longer ours, leave it."""

        async def note() -> None:
            try:
                if not await recorded:
                    await self.abandon()
            except SloServeError as error:  # Redis is away: what matters is recorded at the end
                _log.warning("progress of %s is not recorded: %s", self.claimed.request_id, error)

        task = asyncio.create_task(note())
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)
