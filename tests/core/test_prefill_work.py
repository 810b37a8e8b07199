"""What a prefill chunk costs, and the largest that fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.perf_model import BatchShape, PerfModel, Segment, attended
from services.core.prefill_work import chunk_within, work

MODEL = PerfModel((Segment(4e-5, k_ctx=1e-7, k_req=2e-5, b=5e-3), Segment(1e-5, b=2e-2)), attention=1.3e-3)


@given(st.integers(0, 20_000), st.lists(st.integers(1, 2000), min_size=1, max_size=6))
def test_the_work_of_a_prompt_does_not_depend_on_how_it_is_cut(before: int, chunks: list[int]) -> None:
    whole, position, parts = work(1e-3, before, sum(chunks)), before, 0.0
    for chunk in chunks:
        parts += work(1e-3, position, chunk)
        position += chunk
    assert parts == pytest.approx(whole)


@given(st.integers(0, 20_000), st.integers(1, 2000))
def test_work_sums_what_each_token_costs(before: int, tokens: int) -> None:
    summed = sum(1 + 1e-3 * (p + 0.5) for p in range(before, before + tokens))
    assert work(1e-3, before, tokens) == pytest.approx(summed)
    assert work(0.0, before, tokens) == tokens


@given(
    st.sampled_from([MODEL, PerfModel(MODEL.segments)]),
    st.floats(0.001, 0.5),
    st.integers(0, 300),
    st.integers(0, 20_000),
)
def test_a_chunk_is_the_largest_that_fits(model: PerfModel, limit_s: float, used: int, before: int) -> None:
    def seconds(tokens: int) -> float:
        return model.seconds(BatchShape(used + tokens, before, 9, 0, attended(before, tokens)))

    found = chunk_within(model.coef, model.attention, limit_s, float(used), float(before), 9, 0, before)
    if found > 0:
        assert seconds(found) <= limit_s + 1e-12
    assert seconds(max(0, found) + 1) > limit_s - 1e-12


def test_a_long_prompt_costs_more_in_its_later_half() -> None:
    first_s, whole_s = MODEL.zero_load_prefill_s(1500), MODEL.zero_load_prefill_s(3000)
    assert whole_s - first_s > 1.8 * first_s
    plain = PerfModel(MODEL.segments)
    assert plain.zero_load_prefill_s(3000) < 2 * plain.zero_load_prefill_s(1500)
