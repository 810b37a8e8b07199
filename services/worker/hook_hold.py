"""First tokens held back: which requests' output waits in the worker, and when it may go.

With the hold on, a promised first token that is ready early does not have to leave before its deadline, and decode
deadlines count from when it leaves. That turns what is left of the TTFT into slack for longer batches, which is only of
use while prefills wait: as soon as none does, everything held is released, and a first token that comes when none waits
is not held at all. The worker releases at the deadline by itself, without a word from here.
"""

from services.worker.hook_request import TrackedRequest

__all__ = ["FirstTokenHold"]


class FirstTokenHold:
    """The held requests of one engine."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._held: dict[str, TrackedRequest] = {}
        self.released: list[TrackedRequest] = []

    def __len__(self) -> int:
        return len(self._held)

    def first_token(self, request: TrackedRequest, at_s: float, *, wanted: bool) -> bool:
        """A first token is out of the engine; True if it is held. Its anchor is then its deadline."""
        if not self.enabled or not request.promised or request.aged:
            return False
        if not wanted or request.terms.ttft_deadline_s <= at_s:
            self.released.append(request)
            return False
        request.anchor_s = request.terms.ttft_deadline_s
        self._held[request.key] = request
        return True

    def expected_s(self, request: TrackedRequest, done_s: float) -> float:
        """When the first token of a prefill that ends at `done_s` is expected to leave."""
        return (
            max(done_s, request.terms.ttft_deadline_s)
            if self.enabled and request.promised and not request.aged
            else done_s
        )

    def release(self, now_s: float, *, wanted: bool) -> list[TrackedRequest]:
        """Requests whose decode deadlines count from now on: all that are held, unless the slack is still wanted."""
        due = [request for request in self._held.values() if request.terms.ttft_deadline_s <= now_s]
        for request in due:  # the worker let it go at its deadline, which is its anchor already
            del self._held[request.key]
        if wanted:
            return []
        going = list(self._held.values())
        self._held.clear()
        for request in going:
            request.anchor_s = now_s
        self.released.extend(going)
        return going

    def discard(self, request: TrackedRequest) -> None:
        """It ended, is demoted or preempted for good; what is held of it leaves with its end."""
        self._held.pop(request.key, None)

    def take_released(self) -> tuple[int, ...]:
        """Numbers of the requests released since the last call."""
        numbers = tuple(request.number for request in self.released)
        self.released.clear()
        return numbers
