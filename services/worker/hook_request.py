"""One request as the scheduler hook follows it: where it is, which stage it is in, when its next token is due."""

from collections.abc import Callable, Sequence

import msgspec

from services.core.slo import BEST_EFFORT
from services.core.stages import StageTracker
from services.core.view import BEST_EFFORT_TIER, Prefill
from services.worker.request_terms import RequestTerms

__all__ = ["TierNames", "TrackedRequest"]

_GRAIN_S = 1e-6  # of times on the wire: a difference below it is no miss


class TierNames:
    """Indices of tier names in the order they were first seen; best effort is always -1."""

    def __init__(self) -> None:
        self._indices: dict[str, int] = {BEST_EFFORT: BEST_EFFORT_TIER}

    def index(self, name: str) -> int:
        """The index of a tier, new names included."""
        return self._indices.setdefault(name, len(self._indices) - 1)

    def name(self, index: int) -> str:
        """The tier of an index that was given out."""
        return next(name for name, known in self._indices.items() if known == index)


class TrackedRequest:
    """A request between arrival and end.

    `key` is the engine's own id, `number` the hook's. `tokens` counts the tokens of the current stage that were
    produced or are in flight; the next one is due at `anchor_s + tokens * tpot_s`, less what is kept in hand. The
    anchor is the real time of the first token of the first stage; for later stages, one TPOT after the last token of
    the stage before.
    """

    __slots__ = (
        "_planned",
        "aged",
        "anchor_s",
        "before",
        "computed_tokens",
        "decoding",
        "forecast_tokens",
        "key",
        "max_tokens",
        "missed",
        "number",
        "offered",
        "on_tier",
        "outputs",
        "pending",
        "produced",
        "promised",
        "prompt_tokens",
        "scheduled_at_s",
        "seen",
        "shared_blocks",
        "stage_began",
        "started",
        "terms",
        "tier_names",
        "tokens",
        "total_tokens",
        "tracker",
    )

    def __init__(
        self,
        key: str,
        number: int,
        terms: RequestTerms,
        prompt_ids: Sequence[int],
        produced: Sequence[int],
        max_tokens: int,
    ) -> None:
        self.key = key
        self.number = number
        self.terms = terms
        self.produced = produced  # the engine's own list of output ids, growing
        self.max_tokens = max_tokens
        self.promised = terms.promised
        self.pending = terms.pending and not terms.promised and terms.first_token_s is None
        self.on_tier = self.promised or self.pending  # it is planned on its tier
        self.offered = self.on_tier  # its outcome counts, once
        self.aged = False  # best effort that is planned like a promise, its client not being told
        self.missed = False  # something of its SLO, already
        self.forecast_tokens = terms.forecast_tokens
        self.tier_names = [stage.tier for stage in terms.stages]
        self.tracker = StageTracker([stage.slo() for stage in terms.stages])
        self.prompt_tokens = len(prompt_ids)
        self.total_tokens = self.prompt_tokens  # that must be in KV before the next token: prompt and outputs so far
        self.computed_tokens = 0  # in KV, or expected there from the prefix cache
        self.shared_blocks = 0  # of the prefix cache that running requests hold already
        self.outputs = 0  # output tokens of this attempt, produced or in flight
        self.seen = 0
        self.tokens = 0
        self.anchor_s: float | None = None
        self.scheduled_at_s: float | None = None
        self.started = False
        self.decoding = False
        self._planned: Prefill | None = None
        if terms.delivered_tokens and terms.first_token_s is not None:
            self._replay(prompt_ids[-terms.delivered_tokens :], terms.first_token_s)
            self.missed = terms.first_token_s > terms.ttft_deadline_s
        self.before = self.tracker.output_tokens  # by earlier attempts
        self.stage_began = self.before - self.tracker.stage_output_tokens  # outputs before the current stage

    def _replay(self, delivered: Sequence[int], first_token_s: float) -> None:
        """Take up an earlier attempt's progress, as if each of its later stages had run exactly at its TPOT."""
        self.anchor_s = first_token_s
        before = 0
        for end in self.tracker.advance(delivered):
            tokens = end.at_output_token - before
            self._enter_stage(self.anchor_s + (tokens - 1) * self._tpot_of(end.stage_index), end.stage_index + 1)
            before = end.at_output_token
        self.tokens = self.tracker.stage_output_tokens

    @property
    def multi_stage(self) -> bool:
        """Whether a stage boundary is still ahead."""
        return self.tracker.stage_index < len(self.terms.stages) - 1

    @property
    def tpot_s(self) -> float:
        """Time per output token of the current stage."""
        return self._tpot_of(self.tracker.stage_index)

    @property
    def tier_name(self) -> str:
        """Tier of the current stage; best effort for a request that was decided to have no promise."""
        return self.tier_names[self.tracker.stage_index] if self.on_tier else BEST_EFFORT

    @property
    def due_s(self) -> float:
        """When the next token is due; the first-token deadline before there is one."""
        if self.anchor_s is None:
            return self.terms.ttft_deadline_s
        return self.anchor_s + self.tokens * self.tpot_s - self.in_hand_s

    @property
    def in_hand_s(self) -> float:
        """What is kept of decode deadlines: how much longer a last token may take to its client than the first did."""
        return self.terms.delivery_spread_s

    @property
    def forecast_left(self) -> int:
        """Output tokens still expected: once the forecast is outlived, as many as there were, within `max_tokens`."""
        left = self.forecast_tokens - self.outputs
        return max(1, min(left if left > 0 else self.outputs, self.max_tokens - self.outputs))

    def promote(self, tier: str) -> None:
        """From now on the request has a promise; stages that had no tier of their own get `tier`."""
        self.promised, self.pending, self.on_tier = True, False, True
        self.tier_names = [tier if name == BEST_EFFORT else name for name in self.tier_names]
        self._planned = None

    def relax(self, due_s: float, tpot_s: float) -> None:
        """From now on its next token is due at `due_s`, later ones at its own pace or `tpot_s`, the slower of both."""
        self.aged = True
        stages = tuple(msgspec.structs.replace(stage, tpot_s=max(stage.tpot_s, tpot_s)) for stage in self.terms.stages)
        self.terms = msgspec.structs.replace(self.terms, stages=stages, ttft_deadline_s=due_s)
        if self.anchor_s is not None:
            self.anchor_s = due_s - self.tokens * self.tpot_s + self.in_hand_s
        self._planned = None

    def reforecast(self, output_tokens: int) -> None:
        """From now on it is expected to produce `output_tokens` in all."""
        self.forecast_tokens = output_tokens
        self._planned = None

    def demote(self) -> None:
        """From now on the request is best effort."""
        self.promised = self.pending = self.on_tier = self.aged = False
        self._planned = None

    def first_token(self, at_s: float) -> None:
        """The first token of the first stage is out."""
        if self.anchor_s is None:
            self.anchor_s = at_s
            self.missed = at_s > self.terms.ttft_deadline_s

    def stage_ended(self, at_s: float) -> bool:
        """Read the output ids that are new at `at_s`; True if they ended a stage."""
        count = len(self.produced)
        if count == self.seen:
            return False
        ends = self.tracker.advance(self.produced[self.seen : count])
        self.seen = count
        for end in ends:
            self.missed = self.missed or not self._in_time(end.at_output_token, end.stage_index, at_s)
            self.stage_began = end.at_output_token
        return bool(ends)

    def met(self, at_s: float) -> bool:
        """Whether everything of its SLO was met, its last token being out at `at_s`."""
        if self.anchor_s is None or self.missed:
            return False
        return self._in_time(self.before + len(self.produced), self.tracker.stage_index, at_s)

    def _in_time(self, output_token: int, stage_index: int, at_s: float) -> bool:
        """Whether that output token, the last one of a stage, kept the stage's mean time per token."""
        assert self.anchor_s is not None
        due_s = self.anchor_s + (output_token - self.stage_began - 1) * self._tpot_of(stage_index)
        return at_s <= due_s + _GRAIN_S

    def enter_stage(self, at_s: float) -> None:
        """A stage ended at `at_s`; the tokens in flight belong to the one that follows. Counts must be current."""
        self._enter_stage(at_s, self.tracker.stage_index)
        self.tokens = self.tracker.stage_output_tokens + self.outputs - self.seen

    def planned(self, weight: int, tier_of: Callable[["TrackedRequest"], int]) -> Prefill:
        """`prefill` on the tier that the request has now: made anew only once something has changed."""
        last = self._planned
        if (
            last is not None
            and last.computed_tokens == self.computed_tokens
            and last.prompt_tokens == self.total_tokens
            and last.started == self.started
            and last.weight == weight
        ):
            return last
        self._planned = self.prefill(tier_of(self), weight)
        return self._planned

    def prefill(self, tier: int, weight: int = 1) -> Prefill:
        """The request as the core's batch former sees it before its (next) first token."""
        return Prefill(
            id=self.key,
            tier=tier,
            deadline_s=self.due_s,
            tpot_s=self.tpot_s,
            prompt_tokens=self.total_tokens,
            computed_tokens=self.computed_tokens,
            output_tokens=self.forecast_left,
            promised=self.promised,
            started=self.started,
            application=self.terms.application,
            weight=weight,
            arrival_s=self.terms.arrival_s,
            in_hand_s=self.in_hand_s,
        )

    def _tpot_of(self, stage_index: int) -> float:
        return self.terms.stages[stage_index].tpot_s

    def _enter_stage(self, last_token_s: float, stage_index: int) -> None:
        self.anchor_s = last_token_s + self._tpot_of(stage_index)
        self.tokens = 0
        self._planned = None
