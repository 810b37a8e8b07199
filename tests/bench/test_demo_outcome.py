from bench.demo_outcome import Outcome, Progress, summarise
from bench.demo_workload import DemoRequest
from services.client import Finished, StageReport, Verdict

ADMITTED = Verdict("ADMITTED", "w0", "tight", 0.0, 0.0, 100.0, 50.0, None)
BEST_EFFORT = Verdict("BEST_EFFORT", "", "best-effort", 0.0, 0.0, 100.0, 50.0, None)


def answered(verdict: Verdict, *, ttft_ms: float, met: bool, application: str = "coder") -> Outcome:
    report = StageReport(
        kind="ANSWER",
        ttft_slo_ms=100,
        ttft_ms=ttft_ms,
        tpot_slo_ms=50,
        tpot_ms=10,
        output_tokens=8,
        met=met,
    )
    finished = Finished("LENGTH", 10, 8, (report,), met, verdict is ADMITTED, "w0", "ab" * 16, 1)
    request = DemoRequest(0.0, application, 10, 8, 1)
    return Outcome(request, Progress.ANSWERED, verdict, num_tokens=8, finished=finished)


def lost(progress: Progress, verdict: Verdict | None) -> Outcome:
    return Outcome(DemoRequest(0.0, "coder", 10, 8, 1), progress, verdict, error="gone")


def test_attainment_counts_every_offered_request() -> None:
    (row,) = summarise(
        [
            answered(ADMITTED, ttft_ms=40, met=True),
            answered(BEST_EFFORT, ttft_ms=90, met=True),
            answered(BEST_EFFORT, ttft_ms=900, met=False),
            lost(Progress.REJECTED, None),
        ]
    )
    assert (row.offered, row.admitted, row.best_effort, row.rejected, row.failed) == (4, 1, 2, 1, 0)
    assert row.attained == 2
    assert row.attainment == 0.5


def test_a_promised_request_that_failed_is_a_broken_promise() -> None:
    (row,) = summarise([answered(ADMITTED, ttft_ms=40, met=True), lost(Progress.FAILED, ADMITTED)])
    assert (row.kept, row.promises) == (1, 2)


def test_best_effort_that_happens_to_meet_its_slo_is_no_kept_promise() -> None:
    (row,) = summarise([answered(BEST_EFFORT, ttft_ms=40, met=True)])
    assert (row.kept, row.promises, row.attained) == (0, 0, 1)


def test_quantiles_are_those_of_the_delivered_stages() -> None:
    (row,) = summarise([answered(ADMITTED, ttft_ms=ms, met=True) for ms in (10, 20, 30)])
    assert row.ttft.p50_ms == 20
    assert row.ttft.p99_ms is not None
    assert 29 < row.ttft.p99_ms <= 30


def test_applications_are_kept_apart() -> None:
    rows = summarise([answered(ADMITTED, ttft_ms=1, met=True, application=name) for name in ("coder", "chatbot")])
    assert [(row.application, row.offered) for row in rows] == [("chatbot", 1), ("coder", 1)]
