"""What a request has generated: ids, their text, and where its stages ended. A pure function of the ids.

Two processes that are given the same ids hold the same transcript, whatever the chunks, so any of them can replay it
from any token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from services.admission.detokenize import Detokenizer
from services.admission.stop import StopMatcher
from services.core.slo import StageSlo
from services.core.stages import StageEnd, StageTracker

__all__ = ["Cut", "OutputRules", "Transcript"]


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What decides text and end of an output besides the engine.

    Stop strings count only in text after the first `min_tokens` tokens. `last_stage_limit`: see ValidRequest.
    """

    stages: tuple[StageSlo, ...]
    prompt_tail: tuple[int, ...]
    silent_ids: frozenset[int]
    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    last_stage_limit: int | None = None


@dataclass(frozen=True, slots=True)
class Cut:
    """The output ends here although the engine would go on: a stop string, or the last stage's own limit."""

    by_stop_string: bool


class Transcript:
    """One request's output so far. `texts[i]` is the text that `ids[i]` released."""

    __slots__ = ("_detokenizer", "_rules", "_stop", "_tracker", "closed", "ids", "texts")

    def __init__(self, rules: OutputRules, decode: Callable[[Sequence[int]], str]) -> None:
        self._rules = rules
        self._detokenizer = Detokenizer(decode, rules.silent_ids, rules.prompt_tail)
        self._stop = StopMatcher(rules.stops)
        self._tracker = StageTracker(rules.stages)
        self.ids: list[int] = []
        self.texts: list[str] = []
        self.closed = False

    def push(self, token_ids: Sequence[int]) -> tuple[list[StageEnd], Cut | None]:
        """Add the next ids; the stages they ended, and whether the output is cut (ids behind the cut are dropped)."""
        ends: list[StageEnd] = []
        for token_id in token_ids:
            if self.closed:
                break
            text = self._detokenizer.push(token_id)
            hit = False
            if len(self.ids) >= self._rules.min_tokens:
                text, hit = self._stop.push(text)
            self.ids.append(token_id)
            self.texts.append(text)
            ends += self._tracker.advance((token_id,))
            if hit or self._last_stage_is_full():
                cut = Cut(by_stop_string=hit)
                self._close(flush=not hit)
                return ends, cut
        return ends, None

    def close(self) -> None:
        """No more ids come: whatever text was held back belongs to the last token."""
        if not self.closed:
            self._close(flush=True)

    def last_stage_end(self) -> StageEnd | None:
        """The end of the stage the output ended in; None where that stage never got a token."""
        if self._tracker.stage_output_tokens == 0:
            return None
        return self._tracker.finish()

    def text(self, start: int, end: int) -> str:
        """Text of the tokens from `start` up to but not including `end`."""
        return "".join(self.texts[start:end])

    def _last_stage_is_full(self) -> bool:
        limit = self._rules.last_stage_limit
        if limit is None or self._tracker.stage_index < len(self._rules.stages) - 1:
            return False
        return self._tracker.stage_output_tokens >= limit

    def _close(self, *, flush: bool) -> None:
        self.closed = True
        if flush and self.texts:
            held = self._detokenizer.flush()
            safe, hit = self._stop.push(held)
            self.texts[-1] += safe + ("" if hit else self._stop.flush())
