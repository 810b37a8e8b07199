"""The forecast in steps against counting every block at every step."""

import numpy as np
from core_instances import Instance, instances
from hypothesis import HealthCheck, given, settings

from services.core.columns import columns_of
from services.core.memory import forecast
from services.core.perf_model import BatchShape
from services.core.problem import problem_of
from services.core.simulate import IN_TIME, simulate


def blocks(tokens: int, size: int) -> int:
    return -(-tokens // size)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(instances(late=False))
def test_peak_and_excess_equal_a_count_of_every_step(instance: Instance) -> None:
    items = sorted([*instance.view.prefills, *instance.candidates], key=lambda p: p.deadline_s)
    problem = problem_of(instance.view, columns_of(instance.view.decoders), items, instance.settings, 0.0)
    standing = np.full(len(items), IN_TIME, np.int64)
    outcome = simulate(problem, standing, 0.1, np.inf)
    began, joined = np.maximum(outcome.began, 0), np.maximum(outcome.joined, 1)
    ahead = forecast(problem, standing, began, joined)

    peak, excess = 0, -np.inf
    last = int(max([d.remaining_tokens for d in instance.view.decoders], default=0) + joined.max() + 90)
    for k in range(last):
        used, decoding, context, paces = 0, 0, 0, []
        for decoder in instance.view.decoders:
            if k < decoder.remaining_tokens:
                used += blocks(decoder.context_tokens + k + 1, 16)
                decoding, context = decoding + 1, context + decoder.context_tokens + k
                paces.append(problem.tiers.tpot[decoder.tier])
        for item, start, join in zip(items, began, joined, strict=True):
            if join <= k < join + item.output_tokens - 1:
                used += blocks(item.prompt_tokens + k - join + 1, 16)
                decoding, context = decoding + 1, context + item.prompt_tokens + k - join
                paces.append(problem.tiers.tpot[item.tier])
            elif (start <= k or item.computed_tokens) and k < join:
                used += blocks(item.prompt_tokens, 16)
        peak = max(peak, used)
        if decoding and k >= joined.max():
            shape = BatchShape(decoding, context, decoding)
            excess = max(excess, instance.view.model.seconds(shape) - min(paces))
    assert ahead.peak_blocks == peak
    assert (ahead.excess_s == excess) or abs(ahead.excess_s - excess) < 1e-9
