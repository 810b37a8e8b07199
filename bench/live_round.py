"""One round: every job sent at its own time, whatever became of those before it (open loop), and what its client saw.

A session is closed loop inside: its next call starts when the one before has ended and its gap has passed.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from bench.live_jobs import Conversations
from bench.live_targets import Target
from bench.machine import MachineShare, machine_share
from bench.scenario_jobs import Job
from bench.simulator_call import LiveCall

__all__ = ["Round", "Seen", "run_round"]


@dataclass(slots=True)
class Seen:
    """Progress of a round, for a display."""

    jobs: int
    seconds: float
    sent: int = 0
    ended: int = 0
    promised: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Round:
    """What came of it. `late_s`: how long after its time each job was sent, which is the generator's own fault."""

    calls: list[LiveCall]
    late_s: list[float]
    seconds: float
    share: MachineShare

    @property
    def output_tokens(self) -> int:
        """Tokens that reached clients."""
        return sum(len(call.token_s) for call in self.calls)


async def run_round(
    target: Target,
    jobs: Sequence[Job],
    prompts: Conversations,
    name: str,
    *,
    seconds: float,
    grace_s: float,
    on_change: Callable[[Seen], None],
) -> Round:
    """Send all jobs, wait until they have ended or `grace_s` after the last deadline; what runs then is cancelled."""
    runner = _Runner(target, prompts, name, Seen(len(jobs), seconds), on_change)
    with machine_share() as share:
        tasks = [asyncio.create_task(runner.job(job)) for job in jobs]
        last_s = max(_last_deadline_s(job) for job in jobs)
        _, running = await asyncio.wait(tasks, timeout=last_s + grace_s)
        for task in running:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return Round(runner.calls, runner.late_s, runner.now_s, share())


class _Runner:
    def __init__(
        self, target: Target, prompts: Conversations, name: str, seen: Seen, on_change: Callable[[Seen], None]
    ) -> None:
        self.calls: list[LiveCall] = []
        self.late_s: list[float] = []
        self._target = target
        self._prompts = prompts
        self._name = name
        self._seen = seen
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._began_s = self._loop.time()

    @property
    def now_s(self) -> float:
        """Seconds since the round began."""
        return self._loop.time() - self._began_s

    async def job(self, job: Job) -> None:
        """Send a job's calls, one after the other."""
        await asyncio.sleep(max(0.0, job.arrival_s - self.now_s))
        self.late_s.append(self.now_s - job.arrival_s)
        for index, call in enumerate(job.calls):
            if index:
                await asyncio.sleep(call.gap_s)
            prompt = self._prompts.prompt(job, call)
            output = await self._call(LiveCall(f"{self._name}-{job.number}-{index}", job, index, self.now_s), prompt)
            if output is None:
                break
            self._prompts.answered(job, prompt, output)
        self._seen.ended += 1
        self._on_change(self._seen)

    async def _call(self, call: LiveCall, prompt: tuple[int, ...]) -> list[int] | None:
        """The output; None where the call did not come to its end."""
        self.calls.append(call)
        self._seen.sent += 1
        output: list[int] = []
        call.arrival_s = self.now_s
        was_promised = False
        async with aclosing(self._target.send(call, prompt, call.key)) as chunks:  # type: ignore[type-var]
            async for ids in chunks:
                call.token_s.extend([self.now_s] * len(ids))
                output.extend(ids)
                self._seen.tokens += len(ids)
                if call.promised_s is not None and not was_promised:
                    was_promised = True
                    self._seen.promised += 1
                self._on_change(self._seen)
        call.finished = len(output) == call.call.output_tokens
        return output if call.finished else None


def _last_deadline_s(job: Job) -> float:
    """When the job would end if every token came exactly in time."""
    decode_s = sum(stage.tokens * stage.tpot_s for call in job.calls for stage in call.stages)
    return job.arrival_s + decode_s + sum(call.ttft_s + call.gap_s for call in job.calls)
