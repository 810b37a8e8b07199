"""The bundled traces load as published, and windows and load factors keep what makes them real."""

import gzip
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.workload import (
    Lengths,
    TraceRow,
    WorkloadError,
    load_lengths,
    load_sessions,
    load_trace,
    scale_load,
    window,
    with_lengths,
)

ROWS = st.lists(
    st.builds(
        TraceRow,
        arrival_s=st.floats(0, 1e5),
        prompt_tokens=st.integers(1, 10_000),
        output_tokens=st.integers(1, 10_000),
        application=st.sampled_from(["chatbot", "coder"]),
    ),
    max_size=50,
).map(lambda rows: sorted(rows, key=lambda row: row.arrival_s))


def _write(directory: Path, name: str, text: str) -> None:
    with gzip.open(directory / f"{name}.csv.gz", "wt", encoding="utf-8") as file:
        file.write(text)


@pytest.mark.parametrize(
    ("name", "rows", "prompt_mean", "output_mean", "duration_s"),
    [
        ("azure2023_conv", 19366, 1155, 211, 3502),
        ("azure2023_code", 8819, 2048, 28, 3436),
        ("azure2023_mixed_conv_code", 27763, 1436, 153, 3424),
        ("servegen_r1_realised_h10", 46710, 1100, 2964, 3600),
    ],
)
def test_traces_have_the_published_statistics(
    name: str, rows: int, prompt_mean: int, output_mean: int, duration_s: int
) -> None:
    trace = load_trace(name)
    assert len(trace) == rows
    assert round(sum(row.prompt_tokens for row in trace) / rows) == pytest.approx(prompt_mean, abs=1)
    assert round(sum(row.output_tokens for row in trace) / rows) == pytest.approx(output_mean, abs=1)
    assert trace[-1].arrival_s == pytest.approx(duration_s, abs=1)
    assert all(earlier.arrival_s <= later.arrival_s for earlier, later in pairwise(trace))


@pytest.mark.parametrize(
    ("name", "rows", "prompt_mean", "output_mean"),
    [
        ("arxiv_summarization_lengths", 21193, 2582, 297),
        ("s1k_reasoning_lengths", 750, 118, 5067),
        ("humaneval_lengths", 164, 131, 54),
    ],
)
def test_length_files_have_the_published_statistics(name: str, rows: int, prompt_mean: int, output_mean: int) -> None:
    lengths = load_lengths(name)
    assert len(lengths) == rows
    assert sum(length.prompt_tokens for length in lengths) / rows == pytest.approx(prompt_mean, abs=1)
    assert sum(length.output_tokens for length in lengths) / rows == pytest.approx(output_mean, abs=1)


def test_the_mixed_trace_names_an_application_per_row() -> None:
    applications = [row.application for row in load_trace("azure2023_mixed_conv_code")]
    assert set(applications) == {"chatbot", "coder"}
    assert applications[:3] == ["coder", "chatbot", "coder"]


def test_reasoning_rows_split_their_output_into_thinking_and_answer() -> None:
    first = load_lengths("s1k_reasoning_lengths")[0]
    assert first == Lengths(prompt_tokens=123, output_tokens=7551, thinking_tokens=5965)
    reasoner = load_trace("servegen_r1_realised_h10")[0]
    assert (reasoner.application, reasoner.thinking_tokens) == ("reasoner", 332)
    assert load_trace("azure2023_conv")[0].thinking_tokens == 0


def test_sessions_are_ordered_model_calls_of_one_conversation() -> None:
    sessions = load_sessions("taubench_airline_stages")
    assert (len(sessions), sum(map(len, sessions))) == (140, 1789)
    for session in sessions:
        assert [call.stage for call in session] == list(range(len(session)))
        assert len({call.session for call in session}) == 1
    assert sum(call.calls_tool is True for session in sessions for call in session) == 870
    assert all(call.start_s is None for session in sessions for call in session)


def test_recorded_gaps_of_agent_sessions_are_kept() -> None:
    sessions = load_sessions("lmcache_agent_miniswe_stages")
    assert (len(sessions), sum(map(len, sessions))) == (20, 402)
    starts_s = [call.start_s for call in sessions[0][:3]]
    assert starts_s == [0.0, 2.333984, 3.680717]
    assert sessions[0][0].calls_tool is None


def test_a_window_starts_at_zero_and_leaves_out_its_end() -> None:
    rows = [TraceRow(arrival_s, 10, 5, "chatbot") for arrival_s in (0.0, 10.0, 15.0, 20.0)]
    assert [row.arrival_s for row in window(rows, 10, 20)] == [0.0, 5.0]


def test_adjacent_windows_share_no_request_and_lose_none() -> None:
    trace = load_trace("azure2023_code")
    halves = [window(trace, 0, 1786), window(trace, 1786, 4000)]
    assert len(halves[0]) > 0
    assert len(halves[1]) > 0
    assert len(halves[0]) + len(halves[1]) == len(trace)


@pytest.mark.parametrize(("start_s", "end_s"), [(10, 10), (20, 10), (-1, 10), (float("nan"), 10)])
def test_a_window_without_extent_is_refused(start_s: float, end_s: float) -> None:
    with pytest.raises(WorkloadError, match="window"):
        window([], start_s, end_s)


@given(rows=ROWS, factor=st.floats(0.01, 100))
def test_scaling_changes_the_rate_and_nothing_else(rows: list[TraceRow], factor: float) -> None:
    scaled = scale_load(rows, factor)
    assert [row.arrival_s * factor for row in scaled] == pytest.approx([row.arrival_s for row in rows])
    assert [(row.prompt_tokens, row.output_tokens, row.application) for row in scaled] == [
        (row.prompt_tokens, row.output_tokens, row.application) for row in rows
    ]


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_senseless_load_factor_is_refused(factor: float) -> None:
    with pytest.raises(WorkloadError, match="factor"):
        scale_load([], factor)


def test_borrowed_lengths_keep_the_arrivals_and_use_every_length_once_before_any_twice() -> None:
    rows = [TraceRow(float(second), 1, 1, "chatbot") for second in range(5)]
    lengths = [Lengths(100, 10), Lengths(200, 20, thinking_tokens=15), Lengths(300, 30)]
    paired = with_lengths(rows, lengths, "summarizer", seed=3)
    assert [row.arrival_s for row in paired] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert {row.application for row in paired} == {"summarizer"}
    assert sorted(row.prompt_tokens for row in paired[:3]) == [100, 200, 300]
    assert {row.prompt_tokens: row.thinking_tokens for row in paired[:3]} == {100: 0, 200: 15, 300: 0}
    assert paired == with_lengths(rows, lengths, "summarizer", seed=3)


def test_borrowing_from_nothing_is_refused() -> None:
    with pytest.raises(WorkloadError, match="no lengths"):
        with_lengths([TraceRow(0, 1, 1, "chatbot")], [], "summarizer", seed=0)


def test_an_unknown_trace_is_refused_and_the_known_ones_are_named() -> None:
    with pytest.raises(WorkloadError, match=r"no trace 'nonesuch'.*azure2023_conv"):
        load_trace("nonesuch")


def test_lengths_without_arrivals_are_no_trace() -> None:
    with pytest.raises(WorkloadError, match="arrival_s is missing"):
        load_trace("humaneval_lengths")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("-1,5,5", "arrival_s"),
        ("nan,5,5", "arrival_s"),
        ("soon,5,5", "arrival_s"),
        ("0,many,5", "prompt_tokens"),
        ("0,5,-5", "output_tokens"),
        ("0,5", "output_tokens is missing"),
    ],
)
def test_a_bad_value_is_refused_with_its_column(tmp_path: Path, line: str, complaint: str) -> None:
    _write(tmp_path, "broken", f"arrival_s,prompt_tokens,output_tokens\n{line}\n")
    with pytest.raises(WorkloadError, match=f"broken: .*{complaint}"):
        load_trace("broken", tmp_path)


def test_an_unknown_app_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, "mixed", "arrival_s,app,prompt_tokens,output_tokens\n0,mail,5,5\n")
    with pytest.raises(WorkloadError, match="unknown app 'mail'"):
        load_trace("mixed", tmp_path)
