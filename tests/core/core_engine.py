"""An exact engine for tests: runs what `form_batch` says and lets it take exactly the modelled time.

Where the settings give acceptance rates, decoders verify drafts and yield what is expected of them: a step that yields
2.4 tokens brings two or three, and is due with the 2.4th.
"""

from dataclasses import replace

from services.core.batch import BatchPlan, form_batch
from services.core.perf_model import BatchShape, attended
from services.core.speculation import expected_tokens
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView


class Engine:
    """State of a replica between batches. `late` lists every token of a tier that came after its deadline."""

    def __init__(self, view: ReplicaView, settings: PlanSettings) -> None:
        self.settings, self.model = settings, view.model
        self.now_s = view.start_s
        self.total_blocks, self.block_size, self.max_num_seqs = view.total_blocks, view.block_size, view.max_num_seqs
        self.decoders = {d.id: d for d in view.decoders}
        self.prefills = {p.id: p for p in view.prefills}
        self.parts: dict[str, float] = {}  # of the next token, by request
        self.late: list[str] = []
        self.batches: list[BatchPlan] = []

    def view(self) -> ReplicaView:
        contexts = [d.context_tokens for d in self.decoders.values()]
        contexts += [p.computed_tokens for p in self.prefills.values()]
        used = sum(-(-context // self.block_size) for context in contexts)
        assert used <= self.total_blocks
        return ReplicaView(
            self.now_s,
            self.model,
            tuple(self.decoders.values()),
            tuple(self.prefills.values()),
            self.total_blocks - used,
            self.total_blocks,
            self.block_size,
            self.max_num_seqs,
        )

    def step(self) -> BatchPlan:
        """Form one batch and run it."""
        plan = form_batch(self.view(), self.settings)
        settings = replace(self.settings, verify_tokens=plan.verify_tokens)
        chunks = {c.id: c.tokens for c in (*plan.prefill, *plan.best_effort_prefill)}
        decoding = [self.decoders[i] for i in (*plan.decode_ids, *plan.best_effort_decode_ids)]
        context = sum(d.context_tokens for d in decoding) + sum(self.prefills[i].computed_tokens for i in chunks)
        verify = {d.id: settings.verify(d.tier) for d in decoding}
        tokens = sum(verify.values()) + sum(chunks.values())
        draft_steps = max(verify.values(), default=1) - 1
        pairs = sum(attended(self.prefills[i].computed_tokens, count) for i, count in chunks.items())
        shape = BatchShape(tokens, context, len(decoding) + len(chunks), draft_steps, pairs)
        self.now_s += self.model.seconds(shape)
        for decoder in decoding:
            self._tokens(decoder, expected_tokens(verify[decoder.id], settings.acceptance_rate(decoder.tier)))
        for prefill_id, count in chunks.items():
            self._computed(self.prefills[prefill_id], count)
        self.batches.append(plan)
        return plan

    def _tokens(self, decoder: Decoder, expected: float) -> None:
        expected = min(expected + self.parts.get(decoder.id, 0.0), decoder.remaining_tokens)
        count = int(expected + 1e-9)
        self.parts[decoder.id] = expected - count
        due_s = decoder.next_deadline_s + (expected - 1) * decoder.tpot_s
        if decoder.tier >= 0 and self.now_s > due_s + 1e-9:
            self.late.append(f"{decoder.id} token {self.now_s - due_s:.6f} s late, {decoder.remaining_tokens} left")
        if decoder.remaining_tokens <= count:
            del self.decoders[decoder.id]
            return
        self.decoders[decoder.id] = replace(
            decoder,
            next_deadline_s=decoder.next_deadline_s + count * decoder.tpot_s,
            context_tokens=decoder.context_tokens + count,
            remaining_tokens=decoder.remaining_tokens - count,
        )

    def _computed(self, prefill: Prefill, count: int) -> None:
        computed = prefill.computed_tokens + count
        if computed < prefill.prompt_tokens:
            self.prefills[prefill.id] = replace(prefill, computed_tokens=computed, started=True)
            return
        del self.prefills[prefill.id]
        if prefill.tier >= 0 and prefill.promised and self.now_s > prefill.deadline_s + 1e-9:
            self.late.append(f"{prefill.id} first token {self.now_s - prefill.deadline_s:.6f} s late")
        if prefill.output_tokens > 1:
            first_s = max(self.now_s, prefill.deadline_s) if self.settings.hold_first_token else self.now_s
            self.decoders[prefill.id] = Decoder(
                prefill.id,
                prefill.tier,
                first_s + prefill.tpot_s - prefill.in_hand_s,
                prefill.tpot_s,
                prefill.prompt_tokens,
                prefill.output_tokens - 1,
                prefill.promised,
            )
