"""The hook in vLLM's real scheduler under whatever order of events Hypothesis comes up with.

Requests of every kind arrive, are aborted at any moment and promoted, memory and seats are short, the clock jumps.
After every event the hook's books must agree with vLLM's; in the end every request that was not aborted has exactly its
own tokens, and nothing is left behind. The clock is the modelled device's, so an example is thousands of real steps
without any waiting.
"""

from contextlib import ExitStack

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from services.core.slo import BEST_EFFORT, StageKind, VerdictMode
from services.worker.hash_tokens import HashTokens
from services.worker.link import Promote, SetCap
from services.worker.request_terms import StageTerms
from tests.services.worker.driven_scheduler import VOCABULARY, DrivenScheduler, Sent, driven
from tests.services.worker.hook_books import check_books, check_empty

SHARED = [5 + i % 900 for i in range(700)]  # prompts begin with a part of it, so that the prefix cache takes part
KINDS = ("tight", "loose", "none", "early", "late", "firm")
MOST_STEPS = 10_000  # far more than any load here needs: beyond it somebody starves


class HookMachine(RuleBasedStateMachine):
    """One replica; `depth` batches in flight."""

    depth = 1

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self.replica: DrivenScheduler
        self.total_blocks = 0
        self.aborted: set[str] = set()

    @initialize(
        blocks=st.sampled_from([70, 140, 400]),
        seats=st.sampled_from([3, 12, 64]),
        batch_tokens=st.sampled_from([96, 512, 8192]),
        prefix_caching=st.booleans(),
        drafts=st.sampled_from([0, 0, 3, 9]),
        hold=st.booleans(),
    )
    def start(self, blocks: int, seats: int, batch_tokens: int, prefix_caching: bool, drafts: int, hold: bool) -> None:
        self.replica = self._stack.enter_context(
            driven(
                depth=self.depth,
                kv_blocks=blocks,
                max_num_seqs=seats,
                max_batch_tokens=batch_tokens,
                prefix_caching=prefix_caching,
                speculation_tokens=drafts,
                hold_first_token=hold,
                max_model_len=1024,
            )
        )
        self.total_blocks = self.replica.free_blocks

    @rule(
        kind=st.sampled_from(KINDS),
        shared=st.sampled_from([0, 0, 16, 250, 640]),
        own=st.integers(1, 300),
        output=st.integers(1, 80),
        ttft_s=st.sampled_from([0.05, 0.3, 1.0, 5.0]),
        think=st.integers(0, 20),
        count=st.integers(1, 6),
    )
    def arrive(self, kind: str, shared: int, own: int, output: int, ttft_s: float, think: int, count: int) -> None:
        for _ in range(count):
            self._send(kind, shared, own, output, ttft_s, think)

    def _send(self, kind: str, shared: int, own: int, output: int, ttft_s: float, think: int) -> None:
        number = len(self.replica.sent)
        prompt = SHARED[:shared] + [3 + (number * 37 + i * 11) % 4000 for i in range(own)]
        tier = "tight" if kind == "tight" else ("loose" if kind != "none" else BEST_EFFORT)
        stages = None
        if 0 < think < output:
            stages = (
                StageTerms(StageKind.THINK.value, tier, 0.04, think, None),
                StageTerms(StageKind.ANSWER.value, tier, 0.12, output - think, None),
            )
        self.replica.send(
            f"r{number}",
            prompt,
            output,
            ttft_s=ttft_s,
            tpot_s=0.05 if tier == "tight" else 0.1,
            tier=tier,
            promised=kind in ("tight", "loose"),
            pending=VerdictMode(kind) if kind in ("early", "late", "firm") else None,
            stages=stages,
        )

    @rule(count=st.integers(1, 25))
    def run_steps(self, count: int) -> None:
        for _ in range(count):
            self.replica.step()

    @precondition(lambda self: self._alive())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self._alive()))
        self.aborted.add(victim)
        self.replica.abort(victim)

    @precondition(lambda self: self._alive())
    @rule(data=st.data(), tier=st.sampled_from(["tight", "loose", BEST_EFFORT]))
    def promote(self, data: st.DataObject, tier: str) -> None:
        chosen = data.draw(st.sampled_from(self._alive()))
        self.replica.scheduler._obey(Promote(chosen, tier), self.replica.now_s)

    @rule(seconds=st.sampled_from([None, 0.02, 0.3]))
    def cap(self, seconds: float | None) -> None:
        self.replica.scheduler._obey(SetCap(seconds), self.replica.now_s)

    @rule(seconds=st.sampled_from([0.2, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.replica.now_s += seconds

    @invariant()
    def books_agree(self) -> None:
        check_books(self.replica)

    @invariant()
    def outputs_are_exact_so_far(self) -> None:
        for name, sent in self.replica.sent.items():
            assert sent.tokens == expected_tokens(sent)[: len(sent.tokens)], name

    def teardown(self) -> None:
        with self._stack:
            if self.total_blocks == 0:
                return
            self.replica.run(most=MOST_STEPS)
            for name, sent in self.replica.sent.items():
                assert sent.finish or name in self.aborted, f"{name} starved"
                if name not in self.aborted:
                    assert sent.tokens == expected_tokens(sent), name
            check_empty(self.replica, self.total_blocks)

    def _alive(self) -> list[str]:
        return [name for name, sent in self.replica.sent.items() if not sent.finish and name not in self.aborted]


class TwoInFlight(HookMachine):
    """Asynchronous scheduling."""

    depth = 2


def expected_tokens(sent: Sent) -> list[int]:
    prompt = sent.request.num_prompt_tokens
    return HashTokens(VOCABULARY, (0, 1, 2)).continuation(sent.terms.digest, prompt, sent.request.max_tokens)


ENDURANCE = settings(max_examples=20, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck))
TestOneBatchInFlight = HookMachine.TestCase
TestOneBatchInFlight.settings = ENDURANCE
TestTwoBatchesInFlight = TwoInFlight.TestCase
TestTwoBatchesInFlight.settings = ENDURANCE
