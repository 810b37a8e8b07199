"""Messages as workers and routers send them, with defaults that make a valid, idle replica."""

from typing import Any

from protos import planner_pb2, types_pb2

__all__ = ["a_candidate", "a_request", "a_state"]

PERF_MODEL = types_pb2.PerfModel(segments=[types_pb2.PerfSegment(k_tok=7e-5, b=0.02)], margin_s=0.001, r2=0.99)


def a_state(now_us: int, seq: int = 1, **fields: Any) -> planner_pb2.ReplicaState:
    """A full state of an idle replica with 1000 blocks."""
    values: dict[str, Any] = {
        "replica_id": "gpu-0",
        "full": True,
        "free_blocks": 1000,
        "total_blocks": 1000,
        "block_size": 16,
        "max_num_seqs": 64,
        "max_model_len": 4096,
        "observed_at_us": now_us,
        "perf_model": PERF_MODEL,
        **fields,
    }
    if not values["full"] and "perf_model" not in fields:
        del values["perf_model"]
    return planner_pb2.ReplicaState(seq=seq, **values)


def a_request(now_us: int, request_id: str, **fields: Any) -> planner_pb2.EngineRequest:
    """A promised request that decodes on the loose tier."""
    values: dict[str, Any] = {
        "attempt": 1,
        "tier": "loose",
        "promised": True,
        "started": True,
        "prompt_tokens": 101,
        "computed_tokens": 100,
        "output_tokens": 3,
        "forecast_tokens": 50,
        "ttft_deadline_us": now_us - 100_000,
        "next_deadline_us": now_us + 100_000,
        "tpot_ms": 100.0,
        "application": "chatbot",
        "max_tokens": 128,
        **fields,
    }
    return planner_pb2.EngineRequest(request_id=request_id, **values)


def a_candidate(now_us: int, request_id: str, /, *, ttft_ms: float = 1000.0, **fields: Any) -> planner_pb2.Candidate:
    """A chat request that arrives now."""
    values: dict[str, Any] = {
        "request_id": request_id,
        "attempt": 1,
        "application": "chatbot",
        "prompt_tokens": 200,
        "max_tokens": 64,
        "arrival_us": now_us,
        "ttft_deadline_us": now_us + round(ttft_ms * 1000),
        "stages": [
            types_pb2.Stage(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=ttft_ms, tpot_ms=100, max_tokens=64, tier="loose")
        ],
        **fields,
    }
    return planner_pb2.Candidate(**values)
