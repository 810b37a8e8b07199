"""Sends the demo's requests open loop, each at its own time, and records what comes back."""

import asyncio
from collections.abc import Callable, Sequence

from bench.demo_outcome import Outcome, Progress
from bench.prompts import PromptMaker
from services.client import Event, Finished, SlosClient, Tokens, Verdict, VerdictChanged
from services.common.errors import Reason, SloServeError

__all__ = ["send_all"]

_TEMPERATURE = 0.7


async def send_all(
    address: str, outcomes: Sequence[Outcome], prompts: PromptMaker, on_change: Callable[[], None]
) -> None:
    """Send every request at its `at_s` from now, return when all have ended. Prompts are made before the clock runs."""
    texts = [prompts.text(outcome.request.prompt_tokens, outcome.request.seed) for outcome in outcomes]
    began_s = asyncio.get_running_loop().time()
    async with SlosClient(address) as client, asyncio.TaskGroup() as group:
        for outcome, text in zip(outcomes, texts, strict=True):
            group.create_task(_send(client, outcome, text, began_s + outcome.request.at_s, on_change))


async def _send(client: SlosClient, outcome: Outcome, text: str, at_s: float, on_change: Callable[[], None]) -> None:
    await asyncio.sleep(max(0.0, at_s - asyncio.get_running_loop().time()))
    outcome.progress = Progress.SENT
    on_change()
    tokens = outcome.request.output_tokens
    try:
        async for event in client.generate(
            text,
            application=outcome.request.application,
            # As many tokens as the trace recorded, whatever this model would have said.
            max_tokens=tokens,
            min_tokens=tokens,
            ignore_eos=True,
            temperature=_TEMPERATURE,
        ):
            _note(outcome, event)
            on_change()
    except SloServeError as error:
        outcome.progress = Progress.REJECTED if error.reason is Reason.NO_CAPACITY else Progress.FAILED
        outcome.error = f"{error.reason.value}: {error.text}"
    if outcome.finished is None and not outcome.error:
        outcome.progress, outcome.error = Progress.FAILED, "the stream ended without a last message"
    on_change()


def _note(outcome: Outcome, event: Event) -> None:
    match event:
        case Verdict():
            outcome.verdict = event
        case Tokens():
            outcome.progress = Progress.STREAMING
            outcome.num_tokens += len(event.ids)
        case VerdictChanged():
            outcome.verdict = event.verdict
        case Finished():
            outcome.finished = event
            ended_well = event.reason in ("STOP", "LENGTH")
            outcome.progress = Progress.ANSWERED if ended_well else Progress.FAILED
            if not ended_well:
                outcome.error = f"ended with {event.reason}"
