"""One model call on its way through a simulation, and what is recorded of it."""

from dataclasses import dataclass, field

from bench.scenario_jobs import Call, Job

__all__ = ["LiveCall"]


@dataclass(slots=True, eq=False)
class LiveCall:
    """A call of a job. `token_s` is when each output token came out, seconds of virtual time.

    `promised_s` is when it was promised (None: never), `refused` says that it was turned away on arrival.
    """

    key: str
    job: Job
    index: int
    arrival_s: float
    token_s: list[float] = field(default_factory=list)
    promised_s: float | None = None
    refused: bool = False
    finished: bool = False

    @property
    def call(self) -> Call:
        """What was asked for."""
        return self.job.calls[self.index]

    @property
    def deadline_s(self) -> float:
        """When the first token is due."""
        return self.arrival_s + self.call.ttft_s

    @property
    def last_deadline_s(self) -> float:
        """When the last token is due if every token comes exactly in time."""
        stages = self.call.stages
        return self.deadline_s + sum(stage.tokens * stage.tpot_s for stage in stages) - stages[0].tpot_s
