"""One client's walk through a session's log, as the events of its stream."""

from collections.abc import AsyncIterator, Callable

from protos import admission_pb2, types_pb2
from services.admission.bell import Bell
from services.admission.session import Marker, Session, VerdictNews
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.stages import StageEnd

__all__ = ["Reader"]


class Reader:
    """Reads a session from output token `from_token` on. A session has one reader: the newest.

    `on_sent` hears when the request's first and its last tokens are sent: Unix microseconds, and whether the last ones.
    """

    def __init__(
        self, session: Session, clock: Clock, from_token: int, on_sent: Callable[[Session, int, bool], None]
    ) -> None:
        self._session = session
        self._clock = clock
        self._on_sent = on_sent
        self._token = from_token
        self._marker = sum(1 for marker in session.markers if marker.at_token < from_token)
        self._bell = Bell()
        before, session.watcher = session.watcher, self._bell
        if before is not None:
            before.ring()  # the reader before this one ends
        self.finished = False

    @property
    def current(self) -> bool:
        """False once another reader has taken over."""
        return self._session.watcher is self._bell

    async def events(self) -> AsyncIterator[admission_pb2.GenerateEvent]:
        """Verdict first, `finished` last; raises the request's error, or CANCELLED where another reader took over."""
        while self._session.first_verdict is None:
            self._check()
            await self._wait()
        yield self._event(verdict=self._verdict_in_force())
        while True:
            self._check()
            event = self._next()
            if event is not None:
                yield event
            elif self._session.error is not None:
                raise self._session.error
            elif self._session.state.ended:
                yield self._event(finished=self._summary())
                self.finished = True
                return
            else:
                await self._wait()

    def _check(self) -> None:
        if not self.current:
            raise SloServeError(Reason.REQUEST_CANCELLED, "another stream of this request took over")

    async def _wait(self) -> None:
        if self._session.error is not None:
            raise self._session.error
        await self._bell.wait()

    def _next(self) -> admission_pb2.GenerateEvent | None:
        markers = self._session.markers
        marker = markers[self._marker] if self._marker < len(markers) else None
        if marker is not None and marker.at_token <= self._token:
            self._marker += 1
            return self._marker_event(marker)
        transcript = self._session.transcript
        end = len(transcript.ids) if marker is None else marker.at_token
        if end <= self._token:
            return None
        start, self._token = self._token, end
        if start == 0:
            self._session.trace.first_token()
        event = admission_pb2.GenerateEvent(request_id=self._session.request_id)
        tokens = event.tokens  # filled in place: a message of its own would be copied into the event
        tokens.text, tokens.offset = transcript.text(start, end), start
        tokens.ids.extend(transcript.ids[start:end])
        now_us = self._clock.now_us()
        clock, last = self._session.clock, self._session.state.ended and end == len(transcript.ids)
        if clock.delivered == 0 or (last and clock.delivered < end):
            self._on_sent(self._session, now_us, last)
        clock.tokens_sent(end, now_us)
        return event

    def _marker_event(self, marker: Marker) -> admission_pb2.GenerateEvent:
        news = marker.news
        if isinstance(news, StageEnd):
            report = self._session.clock.report(news.stage_index)
            return self._event(stage_end=admission_pb2.StageEnd(stage_index=news.stage_index, report=report))
        if news.decision:
            return self._event(verdict=news.verdict)
        return self._event(verdict_changed=admission_pb2.VerdictChanged(verdict=news.verdict, reason=news.reason))

    def _verdict_in_force(self) -> types_pb2.Verdict:
        passed = [m.news.verdict for m in self._session.markers[: self._marker] if isinstance(m.news, VerdictNews)]
        verdict = passed[-1] if passed else self._session.first_verdict
        assert verdict is not None, "a reader waits for the verdict"
        return verdict

    def _summary(self) -> admission_pb2.Finished:
        session = self._session
        return admission_pb2.Finished(
            reason=session.finish_reason,
            prompt_tokens=len(session.facts.queued.prompt_token_ids),
            output_tokens=len(session.transcript.ids),
            stages=session.clock.reports(),
            met=session.met,
            promised=session.promised,
            replica_id=session.replica_id,
            trace_id=session.trace.trace_id,
            attempts=session.attempt,
        )

    def _event(self, **kind: object) -> admission_pb2.GenerateEvent:
        return admission_pb2.GenerateEvent(request_id=self._session.request_id, **kind)  # type: ignore[arg-type]
