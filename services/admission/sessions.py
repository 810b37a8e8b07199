"""The requests of this process, and who is reading them.

A session without a reader runs on for its `resume_grace_s`, then it is abandoned; an ended one is kept for its
`keep_s`, then dropped. Either way it is settled exactly once.
"""

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from services.admission.accounts import Accounts
from services.admission.delivery import DeliveryLag
from services.admission.reader import Reader
from services.admission.session import Session
from services.common.clock import Clock

__all__ = ["Sessions"]


class Sessions:
    """Sessions by request id. `on_abandoned` is called with a live session that nobody waits for any more."""

    def __init__(
        self, accounts: Accounts, clock: Clock, lag: DeliveryLag, on_abandoned: Callable[[Session], None]
    ) -> None:
        self._accounts = accounts
        self._clock = clock
        self._lag = lag
        self._on_abandoned = on_abandoned
        self._by_id: dict[str, Session] = {}
        self._readers: dict[str, Reader] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def add(self, session: Session) -> None:
        """A request lives here from now on."""
        self._by_id[session.request_id] = session
        self._accounts.opened()

    def get(self, request_id: str) -> Session | None:
        """The session of a request, ended ones included while they are kept."""
        return self._by_id.get(request_id)

    def live(self) -> list[Session]:
        """Sessions that have not ended."""
        return [session for session in self._by_id.values() if not session.state.ended]

    def read(self) -> list[Session]:
        """Sessions that have a reader."""
        return [self._by_id[request_id] for request_id in self._readers if request_id in self._by_id]

    @contextmanager
    def call(self) -> Iterator[None]:
        """A client's call, from its first to its last message: a drain waits for it."""
        self._calls += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._calls -= 1
            if not self._calls:
                self._idle.set()

    def attach(self, session: Session, from_token: int = 0) -> Reader:
        """A reader from `from_token` on; the one before it ends."""
        self._stop_timer(session)
        reader = Reader(session, self._clock, from_token, self._sent)
        self._readers[session.request_id] = reader
        return reader

    def _sent(self, session: Session, sent_us: int, last: bool) -> None:
        """A reader has sent a request's first or last tokens."""
        if not session.emitted_us:
            return
        lag_us = sent_us - session.emitted_us
        if session.first_lag_us is None:
            session.first_lag_us = lag_us
            self._lag.first_token(session.replica_id, lag_us / 1e6)
        elif last:
            self._lag.last_token(session.first_lag_us / 1e6, lag_us / 1e6)

    def detach(self, session: Session, reader: Reader) -> None:
        """A reader's stream is over, for whatever reason. Harmless when repeated."""
        if self._readers.get(session.request_id) is not reader:
            return
        del self._readers[session.request_id]
        session.watcher = None
        if session.state.ended:
            if reader.finished or session.error is not None:
                self._settle(session)
            self._later(session, session.facts.keep_s, self.drop)
        else:
            self._later(session, self._patience_s(session), self._abandon)

    def drop(self, session: Session) -> None:
        """Forget a session."""
        self._settle(session)
        self._stop_timer(session)
        self._by_id.pop(session.request_id, None)

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no client is being served; False where that took too long."""
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Stop the timers."""
        for session in tuple(self._by_id.values()):
            self.drop(session)

    def _abandon(self, session: Session) -> None:
        if session.state.ended:  # it ended while nobody read it: `finished` may still be asked for
            self._later(session, session.facts.keep_s, self.drop)
        else:
            self._on_abandoned(session)

    def _patience_s(self, session: Session) -> float:
        """How long it runs on without a reader: its grace, but not past its client's deadline.

        A client ends its call at its own deadline, which on its way here looks like a lost stream shortly before ours.
        """
        deadline_us = session.facts.queued.client_deadline_us
        left_s = (deadline_us - self._clock.now_us()) / 1e6 if deadline_us else math.inf
        return min(session.facts.resume_grace_s, left_s)

    def _settle(self, session: Session) -> None:
        if session.settled:
            return
        session.settled = True
        self._accounts.settled(session)
        session.close_trace()

    def _later(self, session: Session, delay_s: float, act: Callable[[Session], None]) -> None:
        self._stop_timer(session)
        if delay_s <= 0:
            act(session)
            return
        loop = asyncio.get_running_loop()
        self._timers[session.request_id] = loop.call_later(delay_s, act, session)

    def _stop_timer(self, session: Session) -> None:
        timer = self._timers.pop(session.request_id, None)
        if timer is not None:
            timer.cancel()
