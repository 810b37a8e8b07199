"""Sentences with their numbers."""

import pytest

from protos import admission_pb2, types_pb2
from services.admission.reasons import late_sentences, record_sentences, verdict_sentence, way_sentence
from services.common.request_record import RequestRecord, record_from_fields

ANSWER = types_pb2.STAGE_KIND_ANSWER
THINK = types_pb2.STAGE_KIND_THINK


def report(**fields: float) -> admission_pb2.StageReport:
    values = {"kind": ANSWER, "ttft_slo_ms": 500, "tpot_slo_ms": 50, "ttft_ms": 90, "tpot_ms": 20, "output_tokens": 9}
    return admission_pb2.StageReport(**{**values, **fields})


def record(**fields: str) -> RequestRecord:
    return record_from_fields(
        "r", {name.encode(): value.encode() for name, value in {"attempt": "1", **fields}.items()}
    )


@pytest.mark.parametrize(
    ("verdict", "sentence"),
    [
        (types_pb2.Verdict(), "no verdict yet: it has not been placed"),
        (
            types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_PENDING, replica_id="w1"),
            "not decided yet: w1 decides by the start of its prefill",
        ),
        (
            types_pb2.Verdict(
                kind=types_pb2.VERDICT_KIND_ADMITTED,
                replica_id="w1",
                tier="tight",
                predicted_ttft_ms=80,
                ttft_slo_ms=500,
                predicted_tpot_ms=31.25,
                tpot_slo_ms=50,
            ),
            "promised by w1 at tier tight: first token predicted after 80 of 500 ms, 31.2 of 50 ms per token",
        ),
        (
            types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_ADMITTED, replica_id="w1", tier="tight"),
            "promised by w1 at tier tight",
        ),
        (
            types_pb2.Verdict(
                kind=types_pb2.VERDICT_KIND_BEST_EFFORT, constraint=types_pb2.Constraint(detail="KV is short"), hops=3
            ),
            "no promise: KV is short (3 offers)",
        ),
        (types_pb2.Verdict(kind=types_pb2.VERDICT_KIND_BEST_EFFORT), "no promise: the reason is not kept"),
    ],
)
def test_a_verdict_is_one_sentence(verdict: types_pb2.Verdict, sentence: str) -> None:
    assert verdict_sentence(verdict) == sentence


def test_only_what_was_late_is_told_stage_by_stage() -> None:
    reports = [report(kind=THINK, ttft_ms=812, tpot_ms=61.04), report(ttft_slo_ms=0, ttft_ms=0, tpot_ms=50.5)]
    assert late_sentences(reports, 5000, ended=True) == [
        "stage 0 (THINK): first token after 812 ms, 312 ms later than its TTFT of 500 ms",
        "stage 0 (THINK): 61.0 ms per token over 9 tokens, its TPOT is 50.0 ms",
        "stage 1 (ANSWER): 50.5 ms per token over 9 tokens, its TPOT is 50.0 ms",
    ]
    assert late_sentences([report()], 5000, ended=True) == []


def test_a_first_token_that_is_overdue_is_told_while_it_is_awaited() -> None:
    silent = [report(output_tokens=0, ttft_ms=0)]
    assert late_sentences(silent, 499, ended=False) == []
    assert late_sentences(silent, 640, ended=False) == ["stage 0 (ANSWER): no token after 640 ms, its TTFT was 500 ms"]
    assert late_sentences(silent, 640, ended=True) == []


def test_the_way_to_the_first_token_adds_up() -> None:
    times = {"arrival_us": "1000", "queued_us": "5000", "claimed_us": "405000", "first_token_us": "705000"}
    assert way_sentence(record(state="running", **times)) == (
        "of the time to its first token 4 ms went into placing it, 400 ms into its queue, 300 ms into the engine"
    )
    assert way_sentence(record(state="running", **{**times, "attempt": "2"})) is None
    assert way_sentence(record(state="queued", arrival_us="1000", queued_us="5000")) is None


def test_a_record_tells_lateness_pace_and_failure() -> None:
    verdict = types_pb2.Verdict(tpot_slo_ms=50)
    failed = record(
        state="failed",
        replica="w0",
        arrival_us="1000000",
        ttft_deadline_us="1500000",
        first_token_us="1400000",
        ended_us="1700000",
        output_tokens="4",
        error="the engine failed",
    )
    assert record_sentences(failed, verdict) == [
        "its first token left w0 400 ms after its arrival, 100 ms before its deadline",
        "4 tokens at 100.0 ms per token, the SLO of its first stage is 50 ms",
        "it failed: the engine failed",
    ]
    assert record_sentences(record(state="queued", arrival_us="1"), verdict) == []
