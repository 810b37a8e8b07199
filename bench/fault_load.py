"""Load whose every answer can be checked: hash tokens say exactly what should have come, offsets what came twice.

Requests go to the emulated engine, open loop. A client that loses its connection resumes, as `services.client` does;
what it got in the end is compared with the tokens its prompt must give.
"""

import asyncio
import hashlib
import random
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.cli.stack_spec import BUNDLED_MODEL
from services.client import Finished, SlosClient, SloServeError, Tokens, Verdict, VerdictChanged
from services.client.requests import OnInfeasible
from services.worker.engine_arguments import special_ids_of
from services.worker.hash_tokens import HashTokens

__all__ = ["Answer", "FaultLoad", "Shape", "tally"]

_VOCAB_SIZE = 4096
_FIRST_ID, _LAST_ID = 20, 3500  # ordinary tokens of the bundled model


@dataclass(frozen=True, slots=True)
class Shape:
    """What the requests of a load look like; lengths are drawn evenly between the bounds."""

    rate_rps: float
    prompt_tokens: tuple[int, int] = (20, 400)
    output_tokens: tuple[int, int] = (20, 160)
    applications: tuple[str, ...] = ("chatbot", "coder", "summarizer")
    on_infeasible: tuple[OnInfeasible, ...] = ("BEST_EFFORT", "BEST_EFFORT", "BEST_EFFORT", "REJECT")
    resume_grace_s: float = 30.0
    timeout_s: float = 120.0


@dataclass(eq=False, slots=True)
class Answer:
    """One request and what its client saw. `error` is empty where all its tokens came."""

    request_id: str
    prompt_ids: tuple[int, ...]
    wanted: int
    began_s: float
    ids: list[int] = field(default_factory=list)
    heard_s: list[float] = field(default_factory=list)  # when tokens came
    verdict: Verdict | None = None
    changes: list[str] = field(default_factory=list)
    finished: Finished | None = None
    error: SloServeError | None = None
    repeated: int = 0
    gaps: int = 0
    done: bool = False

    @property
    def complete(self) -> bool:
        """Every token came, once, and the right one."""
        return self.finished is not None and self.ids == self.expected and not self.repeated and not self.gaps

    @property
    def right_so_far(self) -> bool:
        """What came is the beginning of what should come."""
        return self.ids == self.expected[: len(self.ids)] and not self.repeated and not self.gaps

    @property
    def expected(self) -> list[int]:
        """The tokens that its prompt must give."""
        digest = hashlib.sha256(array("I", self.prompt_ids).tobytes()).hexdigest()
        return _tokens().continuation(digest, len(self.prompt_ids), self.wanted)

    @property
    def longest_pause_s(self) -> float:
        """Longest wait between two messages with tokens."""
        return max((b - a for a, b in zip(self.heard_s, self.heard_s[1:], strict=False)), default=0.0)

    def take(self, tokens: Tokens) -> None:
        """New tokens; those that came before, and those that are missing, are counted."""
        have = len(self.ids)
        self.heard_s.append(time.monotonic())
        if tokens.offset > have:
            self.gaps += tokens.offset - have
        elif tokens.offset < have:
            self.repeated += have - tokens.offset
        self.ids += tokens.ids


def _tokens() -> HashTokens:
    if not _CACHE:
        _CACHE.append(HashTokens(_VOCAB_SIZE, special_ids_of(str(BUNDLED_MODEL))))
    return _CACHE[0]


_CACHE: list[HashTokens] = []


class FaultLoad:
    """Sends requests until stopped; `answers` holds every one. Several front doors are one target: pick the first."""

    def __init__(self, addresses: Sequence[str], shape: Shape, *, name: str, seed: int = 1) -> None:
        self._target = "ipv4:" + ",".join(addresses)
        self._shape = shape
        self._name = name
        self._source = random.Random(seed)
        self._tasks: set[asyncio.Task[None]] = set()
        self.answers: list[Answer] = []

    async def run(self, seconds: float) -> None:
        """Send for that long, then wait for every answer."""
        async with SlosClient(self._target) as client:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s:
                self.send(client)
                await asyncio.sleep(self._source.expovariate(self._shape.rate_rps))
            await asyncio.gather(*self._tasks)

    def send(self, client: SlosClient, *, wanted: int | None = None, prompt_tokens: int | None = None) -> Answer:
        """Begin one request, of drawn length unless said."""
        shape, source = self._shape, self._source
        count = prompt_tokens or source.randint(*shape.prompt_tokens)
        ids = tuple(source.randint(_FIRST_ID, _LAST_ID) for _ in range(count))
        wanted = wanted or source.randint(*shape.output_tokens)
        answer = Answer(f"{self._name}-{len(self.answers)}", ids, wanted, time.monotonic())
        self.answers.append(answer)
        application, policy = source.choice(shape.applications), source.choice(shape.on_infeasible)
        task = asyncio.create_task(self._one(client, answer, application, policy), name=answer.request_id)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return answer

    async def _one(self, client: SlosClient, answer: Answer, application: str, policy: OnInfeasible) -> None:
        try:
            async for event in client.generate(
                answer.prompt_ids,
                application=application,
                request_id=answer.request_id,
                max_tokens=answer.wanted,
                ignore_eos=True,
                temperature=0.0,
                on_infeasible=policy,
                resume_grace_s=self._shape.resume_grace_s,
                timeout_s=self._shape.timeout_s,
            ):
                match event:
                    case Tokens():
                        answer.take(event)
                    case Verdict():
                        answer.verdict = event
                    case VerdictChanged():
                        answer.changes.append(event.reason)
                    case Finished():
                        answer.finished = event
        except SloServeError as error:
            answer.error = error
        finally:
            answer.done = True


def tally(answers: Sequence[Answer]) -> dict[str, int]:
    """Requests by how they ended, and the tokens that were lost or came twice."""
    counts = {"requests": len(answers), "complete": 0, "refused": 0, "failed": 0, "unanswered": 0}
    counts |= {"tokens lost": 0, "tokens repeated": 0, "wrong tokens": 0, "tokens": 0, "placed again": 0}
    for answer in answers:
        counts["tokens"] += len(answer.ids)
        counts["tokens lost"] += answer.gaps
        counts["tokens repeated"] += answer.repeated
        counts["wrong tokens"] += not answer.right_so_far
        if answer.complete:
            counts["complete"] += 1
            counts["placed again"] += answer.finished is not None and answer.finished.attempts > 1
        elif answer.error is not None:
            counts["failed" if answer.ids else "refused"] += 1
        else:
            counts["unanswered"] += 1
            counts["tokens lost"] += answer.wanted - len(answer.ids)
    return counts
