import pytest

from protos import types_pb2
from services.common.clock import Clock
from services.common.errors import Reason, SloServeError
from services.core.lengths import LengthForecaster
from services.worker.engine_api import Submission
from services.worker.output import OutputEnd
from services.worker.submission import submission_of
from tests.services.worker.scripted_engine import INFO

CLOCK = Clock(lambda: 100.0, lambda: 1_000_000.0)
NOW_US = 1_000_000_000_000


def a_request(**changes: object) -> types_pb2.QueuedRequest:
    fields: dict[str, object] = {
        "request_id": "r",
        "attempt": 1,
        "application": "chatbot",
        "prompt_token_ids": [1, 2, 3],
        "sampling": types_pb2.Sampling(max_tokens=10),
        "stages": [types_pb2.Stage(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=500, tpot_ms=50, max_tokens=9, tier="t")],
        "arrival_us": NOW_US - 1_000_000,
        "ttft_deadline_us": NOW_US + 500_000,
        "promised": True,
    }
    return types_pb2.QueuedRequest(**(fields | changes))  # type: ignore[arg-type]


def convert(request: types_pb2.QueuedRequest) -> Submission | OutputEnd:
    return submission_of(request, INFO, LengthForecaster(), CLOCK)


def submitted(request: types_pb2.QueuedRequest) -> Submission:
    submission = convert(request)
    assert isinstance(submission, Submission)
    return submission


def test_times_become_monotonic_seconds_of_this_host() -> None:
    submission = submitted(a_request(first_token_us=NOW_US))
    assert submission.arrival_s == pytest.approx(99.0)
    assert submission.ttft_deadline_s == pytest.approx(100.5)
    assert submission.first_token_s == pytest.approx(100.0)
    assert submitted(a_request()).first_token_s is None


def test_sampling_that_the_client_left_out_stays_the_models_choice() -> None:
    sampling = submitted(a_request()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed) == (None, None, None, None)
    explicit = types_pb2.Sampling(max_tokens=10, temperature=0.0, top_k=0, ignore_eos=True)
    sampling = submitted(a_request(sampling=explicit)).sampling
    assert (sampling.temperature, sampling.top_k, sampling.ignore_eos) == (0.0, 0, True)


def test_delivered_tokens_join_the_prompt_and_count_against_the_limits() -> None:
    sampling = types_pb2.Sampling(max_tokens=10, min_tokens=6)
    submission = submitted(a_request(sampling=sampling, delivered_token_ids=[7, 8, 9, 10]))
    assert submission.token_ids == (1, 2, 3, 7, 8, 9, 10)
    assert (submission.sampling.max_tokens, submission.sampling.min_tokens) == (6, 2)
    assert submission.delivered_tokens == 4


def test_max_tokens_never_leaves_the_models_context() -> None:
    submission = submitted(a_request(prompt_token_ids=[1] * 250))
    assert submission.sampling.max_tokens == 6
    unlimited = submitted(a_request(prompt_token_ids=[1] * 250, sampling=types_pb2.Sampling()))
    assert unlimited.sampling.max_tokens == 6


def test_an_attempt_that_lost_only_its_end_ends_without_the_engine() -> None:
    full = convert(a_request(delivered_token_ids=list(range(10, 20))))
    assert full == OutputEnd(types_pb2.FINISH_REASON_LENGTH)
    stopped = convert(a_request(delivered_token_ids=[7, INFO.eos_token_ids[0]]))
    assert stopped == OutputEnd(types_pb2.FINISH_REASON_STOP)
    by_stop_id = convert(a_request(delivered_token_ids=[7, 99], stop_token_ids=[99]))
    assert by_stop_id == OutputEnd(types_pb2.FINISH_REASON_STOP)
    ignoring = a_request(
        delivered_token_ids=[7, INFO.eos_token_ids[0]], sampling=types_pb2.Sampling(max_tokens=10, ignore_eos=True)
    )
    assert isinstance(convert(ignoring), Submission)


def test_a_passed_client_deadline_names_by_how_much() -> None:
    end = convert(a_request(client_deadline_us=NOW_US - 250_000))
    assert isinstance(end, OutputEnd)
    assert "250 ms before" in end.error
    assert isinstance(convert(a_request(client_deadline_us=NOW_US + 1)), Submission)


def test_a_prompt_as_long_as_the_context_is_refused_with_the_numbers() -> None:
    end = convert(a_request(prompt_token_ids=[1] * INFO.max_model_len))
    assert isinstance(end, OutputEnd)
    assert "256 tokens" in end.error
    assert "context of 256" in end.error


def test_an_entry_without_stages_is_invalid() -> None:
    with pytest.raises(SloServeError) as invalid:
        convert(a_request(stages=[]))
    assert invalid.value.reason is Reason.STATE_INVALID
