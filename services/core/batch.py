"""Batch formation: which token goes into the next engine step.

The next batch may last until the earliest decoder deadline (minus the margin) and never longer than the cap; its size
is the model's inverse at that duration. Every decoder on a tier is in it; the rest goes to prefill in deadline order,
then to best effort. A decoder is skipped only where a prefill deadline would otherwise be missed. The first batch of
the simulated plan (`services.core.simulate`) *is* the batch formed here: admission and execution cannot disagree.
"""

from collections.abc import Sequence

import numpy as np

from services.core import simulate as sim
from services.core.batch_plan import BatchLimit, BatchPlan, Chunk
from services.core.columns import DecoderColumns, columns_of, decoder_blocks, tiers_of
from services.core.drafts import late_decoders, with_draft_lengths, without_drafts
from services.core.feasibility import behind, settle
from services.core.filling import Filling
from services.core.memory import memory_lasts
from services.core.problem import Problem, problem_of, with_lengths, with_spend
from services.core.skipping import rows_to_skip, without_rows
from services.core.view import SERVING_ORDER, PlanSettings, Prefill, ReplicaView

__all__ = ["BatchLimit", "BatchPlan", "Chunk", "form_batch"]

_NOTHING_MISSED = (True, 0, True)


def form_batch(view: ReplicaView, settings: PlanSettings) -> BatchPlan:
    """The next batch of a replica. Prefills with a tier are all served; whom to admit is `admission.decide`'s job.

    Draft lengths are chosen here too where the settings give acceptance rates only. Where drafts would miss something
    that plain decoding keeps, or need memory that it does not, the batch goes without.
    """
    columns = columns_of(view.decoders)
    queue = sorted([p for p in view.prefills if p.tier >= 0], key=SERVING_ORDER)
    settings = with_draft_lengths(settings, view.model, columns, queue)
    drafting = max(settings.verify_tokens, default=1) > 1
    if not queue:  # nothing to simulate: the decoders, and best effort in what they leave
        settings = _safest(view, columns, settings) if drafting else settings
        return Filling(view, settings, columns, tiers_of(columns, queue, settings)).fill_without_prefill()
    problem = problem_of(view, columns, queue, settings, 0.0)
    outcome, cap_s = _first_feasible(problem, columns, settings)
    if drafting:
        rank = _rank(view, columns, problem, outcome)
        if rank < _NOTHING_MISSED:
            plain = without_drafts(settings)
            trial = with_lengths(problem, columns, plain)
            found, longest_s = _first_feasible(trial, columns, plain)
            if _rank(view, columns, trial, found) > rank:
                settings, problem, outcome, cap_s = plain, trial, found, longest_s
    if outcome.code == sim.MISS_DEADLINE:
        if queue[outcome.row].promised:
            saved = _by_skipping(view, columns, queue, problem, outcome.row, settings)
            if saved is not None:
                return saved
        outcome, cap_s = _late_last(problem, settings)
    return Filling(view, settings, columns, problem.tiers).fill(queue, outcome, cap_s)


def _rank(view: ReplicaView, columns: DecoderColumns, problem: Problem, outcome: sim.Outcome) -> tuple[bool, int, bool]:
    """What makes drafts better than others: every prefill deadline kept, few decoders late, memory that lasts."""
    feasible = outcome.code == sim.FEASIBLE
    everything = np.full(len(problem.queue.tier), sim.IN_TIME, np.int64)
    lasts = not feasible or memory_lasts(problem, everything, outcome.began, outcome.joined)
    return feasible, -late_decoders(problem), lasts and _fits_now(view, columns, problem)


def _fits_now(view: ReplicaView, columns: DecoderColumns, problem: Problem) -> bool:
    """Whether there are blocks for all tokens of the next step, those of drafts that will not be accepted included.

    The forecast counts what requests keep; a rejected draft is written nevertheless.
    """
    return decoder_blocks(columns, problem.tiers.verify, view.block_size) <= view.free_blocks


def _safest(view: ReplicaView, columns: DecoderColumns, settings: PlanSettings) -> PlanSettings:
    """The settings without drafts where fewer decoders are late then, or memory lasts only then."""
    nobody = np.zeros(0, np.int64)
    problem = problem_of(view, columns, (), settings, 0.0)

    def rank(trial: Problem) -> tuple[int, bool]:
        lasts = memory_lasts(trial, nobody, nobody, nobody) and _fits_now(view, columns, trial)
        return -late_decoders(trial), lasts

    found = rank(problem)
    if found == (0, True):
        return settings
    plain = without_drafts(settings)
    return plain if rank(with_lengths(problem, columns, plain)) > found else settings


def _first_feasible(problem: Problem, columns: DecoderColumns, settings: PlanSettings) -> tuple[sim.Outcome, float]:
    """The plan under the first cap that keeps every prefill deadline; with early spending only if none does without.

    If none does at all, the failed plan under the default cap.
    """
    everything = np.full(len(problem.queue.tier), sim.IN_TIME, np.int64)
    failed: sim.Outcome | None = None
    for spend in (0.0, settings.early_spend) if settings.early_spend > 0 else (0.0,):
        trial = problem if spend == 0 else with_spend(problem, columns, spend)
        for cap_s in settings.caps_s:
            outcome = sim.simulate(trial, everything, cap_s, np.inf)
            if outcome.code != sim.MISS_DEADLINE:
                return outcome, cap_s
            failed = failed or outcome
            if not outcome.capped:
                break
    assert failed is not None, "settings have at least one cap"
    return failed, settings.caps_s[0]


def _by_skipping(
    view: ReplicaView,
    columns: DecoderColumns,
    queue: Sequence[Prefill],
    problem: Problem,
    late_row: int,
    settings: PlanSettings,
) -> BatchPlan | None:
    """The batch that saves the first late prefill by leaving out decoders that can wait; None if that is not enough."""
    rows = rows_to_skip(problem, columns, late_row)
    if len(rows) == 0:
        return None
    staying = without_rows(columns, rows)
    trial = problem_of(view, staying, queue, settings, 0.0)
    standing = np.full(len(queue), sim.IN_TIME, np.int64)
    standing[late_row + 1 :] = sim.AFTER
    cap_s = float(problem.queue.deadline[late_row] - problem.start_s)
    outcome = sim.simulate(trial, standing, cap_s, np.inf)
    if outcome.finish_s[late_row] > problem.queue.deadline[late_row] - problem.limits.margin_s + 1e-9:
        return None
    skipped = [columns.ids[row] for row in rows]
    return Filling(view, settings, staying, trial.tiers, skipped).fill(queue, outcome, cap_s)


def _late_last(problem: Problem, settings: PlanSettings) -> tuple[sim.Outcome, float]:
    """The plan under the default cap, with the prefills that are late anyway behind all others."""
    cap_s, rows = settings.caps_s[0], len(problem.queue.tier)
    standing = np.full(rows, sim.IN_TIME, np.int64)
    late_by_s = np.full(rows, np.inf)
    settle(problem, standing, cap_s, late_by_s)
    return sim.simulate(problem, standing, cap_s, behind(standing, late_by_s)), cap_s
