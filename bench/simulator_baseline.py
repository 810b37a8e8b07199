"""The front of systems without admission: every call goes to the least loaded replica at once."""

from collections.abc import Sequence

from bench.simulator_call import LiveCall
from bench.simulator_replica import Replica

__all__ = ["BaselineFront"]


class BaselineFront:
    """Adds calls to the replica with the fewest unfinished ones; refuses where its waiting queue is `bound` long."""

    def __init__(self, replicas: Sequence[Replica], bound: int | None = None) -> None:
        self.replicas = replicas
        self._bound = bound

    def arrived(self, call: LiveCall, now_s: float) -> None:
        """Add it, or refuse it."""
        replica = min(self.replicas, key=lambda r: len(r.calls))
        if self._bound is not None and len(replica.scheduler.waiting) >= self._bound:
            call.refused = True
            return
        replica.add(call, forecast_tokens=call.call.output_tokens, promised=False, now_s=now_s)

    def before_batch(self, replica: Replica, now_s: float) -> None:
        """vLLM decides alone."""

    def after_batch(self, replica: Replica, now_s: float) -> None:
        """Nothing was promised."""

    def may_have_work(self, replica: Replica) -> bool:
        """Nothing is kept back."""
        return False

    def finished(self, call: LiveCall, now_s: float) -> None:
        """Nothing is learned."""
