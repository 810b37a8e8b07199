from collections import Counter

import pytest

from bench.demo_workload import demo_workload


def test_the_demo_sends_a_few_dozen_requests_of_three_applications_within_its_time() -> None:
    workload = demo_workload(30, length_divisor=4, max_prompt_tokens=6000, max_output_tokens=1500)
    counts = Counter(request.application for request in workload.requests)
    assert set(counts) == {"chatbot", "coder", "summarizer"}
    assert 24 <= counts.total() <= 96
    assert all(0 <= request.at_s < 30 for request in workload.requests)
    assert [r.at_s for r in workload.requests] == sorted(r.at_s for r in workload.requests)


def test_the_same_arguments_give_the_same_requests() -> None:
    first, second = (demo_workload(10, length_divisor=2, max_prompt_tokens=900, max_output_tokens=90) for _ in range(2))
    assert first == second


def test_lengths_are_divided_and_cut_but_never_vanish() -> None:
    whole = demo_workload(30, length_divisor=1, max_prompt_tokens=10_000, max_output_tokens=10_000)
    small = demo_workload(30, length_divisor=8, max_prompt_tokens=300, max_output_tokens=20)
    for before, after in zip(whole.requests, small.requests, strict=True):
        assert after.prompt_tokens == min(300, max(16, round(before.prompt_tokens / 8)))
        assert after.output_tokens == min(20, max(4, round(before.output_tokens / 8)))


def test_more_load_sends_more_requests_in_the_same_time_and_says_how_slow_the_record_runs() -> None:
    one, two = (
        demo_workload(30, length_divisor=1, load=load, max_prompt_tokens=9999, max_output_tokens=9999)
        for load in (1.0, 2.0)
    )
    assert len(two.requests) > len(one.requests)
    assert one.stretch == pytest.approx(2 * two.stretch)
