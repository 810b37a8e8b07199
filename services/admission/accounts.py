"""Turns ended requests into metrics: what was offered, promised, delivered and met, as clients saw it."""

from protos import types_pb2
from services.admission.lifecycle import State
from services.admission.session import Session
from services.common.clock import Clock
from services.common.errors import SloServeError
from services.common.instruments import AdmissionInstruments, gen_ai_attributes

__all__ = ["Accounts"]

_VERDICTS = {
    types_pb2.VERDICT_KIND_PENDING: "pending",
    types_pb2.VERDICT_KIND_ADMITTED: "admitted",
    types_pb2.VERDICT_KIND_BEST_EFFORT: "best_effort",
}


class Accounts:
    """Records each request once when it arrives and once when it ends."""

    def __init__(self, instruments: AdmissionInstruments, clock: Clock, model: str) -> None:
        self._instruments = instruments
        self._clock = clock
        self._gen_ai = gen_ai_attributes(model)

    def offered(self, application: str) -> None:
        """A valid request arrived."""
        self._instruments.offered.add(1, {"slos_serve.application": application})

    def refused(self, application: str, error: SloServeError) -> None:
        """A call ended with an error before it was placed."""
        attributes = {"slos_serve.application": application, "error.type": error.reason.value}
        self._instruments.errors.add(1, attributes)

    def opened(self) -> None:
        """A request lives in this process."""
        self._instruments.live.add(1)

    def settled(self, session: Session) -> None:
        """A request of this process ended: delivered, given up, or failed."""
        i, queued = self._instruments, session.facts.queued
        application = {"slos_serve.application": queued.application}
        gen_ai = {**self._gen_ai, **application}
        i.live.add(-1)
        failed = {"error.type": session.error.reason.value} if session.error else {}
        seconds = (self._clock.now_us() - queued.arrival_us) / 1e6
        i.request_duration_s.record(seconds, {**gen_ai, **failed})
        i.prompt_tokens.add(len(queued.prompt_token_ids), application)
        i.output_tokens.add(session.clock.delivered, application)
        if session.error:
            i.errors.add(1, {**application, **failed})
        kind = session.verdict.kind if session.verdict else types_pb2.VERDICT_KIND_UNSPECIFIED
        i.requests.add(
            1,
            {
                **application,
                "slos_serve.verdict": _VERDICTS.get(kind, "none"),
                "slos_serve.outcome": session.state.value if session.state.ended else "given_up",
                "slos_serve.met": session.met,
            },
        )
        self._stages(session, gen_ai)
        if session.promised and session.state is not State.CANCELLED:
            outcome = "kept" if session.met else "broken"
            i.promises.add(1, {**application, "slos_serve.outcome": outcome})

    def _stages(self, session: Session, gen_ai: dict[str, str]) -> None:
        i = self._instruments
        for index, report in enumerate(session.clock.reports()):
            if not report.output_tokens:
                continue
            stage = {"slos_serve.stage": types_pb2.StageKind.Name(report.kind).removeprefix("STAGE_KIND_")}
            if index == 0:
                i.time_to_first_token_s.record(report.ttft_ms / 1000, gen_ai)
            if report.output_tokens > 1:
                i.time_per_output_token_s.record(report.tpot_ms / 1000, {**gen_ai, **stage})
            application = {"slos_serve.application": gen_ai["slos_serve.application"]}
            i.stages.add(1, {**application, **stage, "slos_serve.met": report.met})
