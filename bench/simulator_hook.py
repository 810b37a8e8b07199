"""Our scheduler without a worker around it: the simulator is both ends of its link.

Directives are posted directly, nothing is reported, and the planner's view is read from the hook's own books, which
are what a report would carry.
"""

from collections.abc import Collection
from typing import Any

from services.core.view import Prefill, ReplicaView
from services.worker.hook_report import Reporter
from services.worker.link import Directive, HookEnd, ReportMessage
from services.worker.scheduler import AsyncSloScheduler, SloScheduler, SyncSloScheduler

__all__ = ["AsyncSimulatedHook", "SimulatedHook", "SyncSimulatedHook"]


class _OpenEnd(HookEnd):
    """The engine's end of a link that leads nowhere; directives are put into it by hand."""

    def __init__(self) -> None:
        self.posted: list[Directive] = []

    def directives(self) -> list[Directive]:
        posted, self.posted = self.posted, []
        return posted

    def report(self, message: ReportMessage) -> None:
        """Nobody reads it."""

    def close(self) -> None:
        """Nothing to close."""


class _NoReports(Reporter):
    """Forgets what would be reported, except what was decided."""

    def __init__(self, *construction: Any) -> None:
        super().__init__(*construction)
        self.decided: list[tuple[str, bool]] = []

    def flush(self, *_: Any) -> None:
        self.decided.extend((found.request.key, found.admitted) for found in self._hook.pending.take_decided())
        self._hook.changed.clear()
        self._hook.gone.clear()
        self._hook.demoted.clear()
        self._hook.hold.take_released()
        self._hook.timer.take_observed()


class SimulatedHook(SloScheduler):
    """The hook as the simulator drives it."""

    def __init__(self, **construction: Any) -> None:
        super().__init__(**construction)
        self._link.close()
        self._open_end = _OpenEnd()
        self._link = self._open_end
        self._silent = self._reporter = _NoReports(self._link, self._hook, 0.0)

    def post(self, directive: Directive) -> None:
        """A directive for the next step."""
        self._open_end.posted.append(directive)

    def tier_index(self, name: str) -> int:
        """The index views use for a tier."""
        return self._hook._tiers.index(name)

    def view(self, now_s: float, asked_keys: Collection[str] = ()) -> ReplicaView:
        """The replica as the planner sees it, less the requests asked about; requests have their keys as ids."""
        waiting = [tracked for tracked in self._waiting() if tracked.key not in asked_keys]
        view = self._hook._view(now_s, waiting, self._pool(), [*self._hook.prefilling.values()])
        if asked_keys:
            view = view.with_prefills([prefill for prefill in view.prefills if prefill.id not in asked_keys])
        return view

    def take_decided(self) -> list[tuple[str, bool]]:
        """Requests that the hook has decided since the last call, and whether each was promised."""
        taken, self._silent.decided = self._silent.decided, []
        return taken

    def free_blocks_after_waiting(self) -> int:
        """Blocks left once all that was added has its prompt in KV."""
        waiting = sum(-(-tracked.total_tokens // int(self.block_size)) for tracked in self._waiting())
        return self._free_block_count() - waiting

    def queued_prefill_tokens(self) -> int:
        """Prompt tokens on tiers that are not computed yet."""
        tracked = [*self._hook.prefilling.values(), *self._waiting()]
        return sum(request.total_tokens - request.computed_tokens for request in tracked if request.on_tier)

    def unpromised(self) -> list[tuple[Prefill, int]]:
        """Best effort that waits for its first token, each with the tier it asked for."""
        tracked = [*self._hook.prefilling.values(), *self._waiting()]
        return [
            (request.prefill(-1), self.tier_index(request.tier_names[0]))
            for request in tracked
            if not request.on_tier and request.anchor_s is None
        ]


class SyncSimulatedHook(SimulatedHook, SyncSloScheduler):
    """With one batch in flight."""


class AsyncSimulatedHook(SimulatedHook, AsyncSloScheduler):
    """With two."""
