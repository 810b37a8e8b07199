"""Why a request is where it is, in sentences for people; each states its numbers. Pure functions."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from protos import admission_pb2, types_pb2
from services.admission.session import Marker, VerdictNews
from services.common.request_record import RequestRecord

__all__ = ["change_sentences", "late_sentences", "record_sentences", "verdict_sentence", "way_sentence"]


def verdict_sentence(verdict: types_pb2.Verdict) -> str:
    """What was decided, and the constraint that decided it."""
    match verdict.kind:
        case types_pb2.VERDICT_KIND_ADMITTED:
            text = f"promised by {verdict.replica_id} at tier {verdict.tier}"
            if not verdict.predicted_ttft_ms:  # predictions are not kept with the request
                return text
            return (
                f"{text}: first token predicted after {verdict.predicted_ttft_ms:.0f} of {verdict.ttft_slo_ms:.0f} ms, "
                f"{verdict.predicted_tpot_ms:.1f} of {verdict.tpot_slo_ms:.0f} ms per token"
            )
        case types_pb2.VERDICT_KIND_PENDING:
            return f"not decided yet: {verdict.replica_id} decides by the start of its prefill"
        case types_pb2.VERDICT_KIND_BEST_EFFORT:
            return f"no promise: {_constraint(verdict)}"
        case types_pb2.VERDICT_KIND_REJECTED:
            return f"rejected: {_constraint(verdict)}; room was expected {verdict.retry_after_ms:.0f} ms later"
    return "no verdict yet: it has not been placed"


def _constraint(verdict: types_pb2.Verdict) -> str:
    asked = f" ({verdict.hops} offers)" if verdict.hops > 1 else ""
    kind = types_pb2.ConstraintKind.Name(verdict.constraint.kind).removeprefix("CONSTRAINT_KIND_")
    named = "the reason is not kept" if not verdict.constraint.kind else kind
    return (verdict.constraint.detail or named) + asked


def change_sentences(markers: Iterable[Marker]) -> list[str]:
    """How the verdict changed while it ran."""
    return [
        f"changed after {marker.at_token} output tokens: {marker.news.reason or verdict_sentence(marker.news.verdict)}"
        for marker in markers
        if isinstance(marker.news, VerdictNews)
    ]


def late_sentences(reports: Sequence[admission_pb2.StageReport], waited_ms: float, *, ended: bool) -> list[str]:
    """What was late, stage by stage, as the client saw it. `waited_ms`: since its arrival."""
    sentences = []
    for index, report in enumerate(reports):
        kind = types_pb2.StageKind.Name(report.kind).removeprefix("STAGE_KIND_")
        name = f"stage {index} ({kind})"
        if report.output_tokens == 0:
            if report.ttft_slo_ms and waited_ms > report.ttft_slo_ms and not ended:
                sentences.append(f"{name}: no token after {waited_ms:.0f} ms, its TTFT was {report.ttft_slo_ms:.0f} ms")
            continue
        if report.ttft_slo_ms and report.ttft_ms > report.ttft_slo_ms:
            sentences.append(
                f"{name}: first token after {report.ttft_ms:.0f} ms, {report.ttft_ms - report.ttft_slo_ms:.0f} ms "
                f"later than its TTFT of {report.ttft_slo_ms:.0f} ms"
            )
        if report.tpot_ms > report.tpot_slo_ms:
            sentences.append(
                f"{name}: {report.tpot_ms:.1f} ms per token over {report.output_tokens} tokens"
                f"{'' if ended else ' so far'}, its TPOT is {report.tpot_slo_ms:.1f} ms"
            )
    return sentences


def way_sentence(record: RequestRecord) -> str | None:
    """Where the time before the first token went; None where the record cannot tell."""
    times = [record.times_us.get(name, 0) for name in ("arrival_us", "queued_us", "claimed_us", "first_token_us")]
    if record.attempt != 1 or 0 in times:  # of a later attempt only the last way is known
        return None
    placing, queued, engine = ((after - before) / 1000 for before, after in pairwise(times))
    return (
        f"of the time to its first token {placing:.0f} ms went into placing it, {queued:.0f} ms into its queue, "
        f"{engine:.0f} ms into the engine"
    )


def record_sentences(record: RequestRecord, verdict: types_pb2.Verdict) -> list[str]:
    """What Redis tells about a request that another process served, or whose session is gone."""
    times = record.times_us
    arrival_us, first_us, deadline_us = (
        times.get(f"{name}_us", 0) for name in ("arrival", "first_token", "ttft_deadline")
    )
    sentences = []
    if first_us and deadline_us:
        late_ms = (first_us - deadline_us) / 1000
        when = f"{late_ms:.0f} ms after" if late_ms > 0 else f"{-late_ms:.0f} ms before"
        sentences.append(
            f"its first token left {record.replica_id} {(first_us - arrival_us) / 1000:.0f} ms after its arrival, "
            f"{when} its deadline"
        )
        way = way_sentence(record)
        if late_ms > 0 and way:
            sentences.append(way)
    tokens = int(record.fields.get("output_tokens", "0"))
    if first_us and tokens > 1 and times.get("ended_us"):
        pace_ms = (times["ended_us"] - first_us) / 1000 / (tokens - 1)
        slo = f", the SLO of its first stage is {verdict.tpot_slo_ms:.0f} ms" if verdict.tpot_slo_ms else ""
        sentences.append(f"{tokens} tokens at {pace_ms:.1f} ms per token{slo}")
    if record.fields.get("error"):
        sentences.append(f"it failed: {record.fields['error']}")
    return sentences
