"""Stop strings in streamed text: the text ends before the first one that completes.

Text that may still turn out to be the beginning of a stop string is held back until the next piece decides, so the
pieces in which text arrives cannot change what comes out.
"""

from collections.abc import Sequence

__all__ = ["StopMatcher"]


class StopMatcher:
    """Looks for any of `stops` (none of them empty) in text that arrives in pieces."""

    __slots__ = ("_held", "_reach", "_stops")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._reach = max((len(stop) for stop in stops), default=1) - 1
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Text that is safe to show, and whether a stop string completed (what follows it is dropped)."""
        if not self._stops:
            return text, False
        window = self._held + text
        # The one that completes first wins, as it would if the text came character by character.
        found = [(start + len(stop), start) for stop in self._stops if (start := window.find(stop)) >= 0]
        if found:
            self._held = ""
            return window[: min(found)[1]], True
        keep = self._possible_start(window)
        self._held = window[keep:]
        return window[:keep], False

    def flush(self) -> str:
        """What is still held back, now that no more text comes."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, window: str) -> int:
        for start in range(max(0, len(window) - self._reach), len(window)):
            if any(stop.startswith(window[start:]) for stop in self._stops):
                return start
        return len(window)
