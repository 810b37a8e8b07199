"""One request's output as a worker keeps it: every token id once, and how far it was sent."""

from array import array
from dataclasses import dataclass

from protos import types_pb2, worker_pb2

__all__ = ["Output", "OutputEnd"]


@dataclass(frozen=True, slots=True)
class OutputEnd:
    """How an output ended; `error` is for FINISH_REASON_ERROR."""

    reason: types_pb2.FinishReason.ValueType
    error: str = ""


@dataclass(slots=True, eq=False)
class Output:
    """The output of one attempt, the tokens of earlier attempts included."""

    request_id: str
    attempt: int
    admission_id: str
    ids: "array[int]"  # the whole output, earlier attempts included
    cursor: int  # ids before it were sent
    orphan_grace_s: float
    attached_at_s: float  # to its admission process
    emitted_us: int = 0
    scheduled_us: int = 0
    verdict: types_pb2.Verdict | None = None  # the last one given here
    verdict_sent: bool = False
    end: OutputEnd | None = None
    ended_at_s: float = 0.0
    delivered: bool = False  # the chunk with the end was handed to a subscription

    def chunk(self) -> worker_pb2.TokenChunk:
        """What its channel has not sent yet; moves the cursor."""
        chunk = worker_pb2.TokenChunk(
            request_id=self.request_id,
            attempt=self.attempt,
            offset=self.cursor,
            token_ids=self.ids[self.cursor :],
            emitted_at_us=self.emitted_us,
            scheduled_at_us=self.scheduled_us,
        )
        self.cursor = len(self.ids)
        self.scheduled_us = 0
        if self.verdict is not None and not self.verdict_sent:
            chunk.verdict.CopyFrom(self.verdict)
            self.verdict_sent = True
        if self.end is not None:
            chunk.finish_reason = self.end.reason
            chunk.error = self.end.error
            self.delivered = True
        return chunk
