"""vLLM's scheduler, steered: it and `scheduler_drafts.py` alone touch the internals of vLLM's scheduling.

`SloScheduler` is what `scheduler_cls` names. It is vLLM's own scheduler with a hook in front: before every step the
hook forms the batch, and this file says it to vLLM without replacing a line of it:

- a request's share of a step is limited where vLLM rounds it (`_reserve_prefill_lookahead`, asked for every running and
  every waiting request); 0 skips the request for this step, and it stays in `running`;
- the waiting queue holds only what the batch admits, in its order, while vLLM looks at it; the rest is put back;
- `running` is ordered promises first, so that a failed allocation preempts best effort (vLLM takes the last);
- best effort is preempted before the step where promised work would find too few KV blocks or seats, because a step
  in which vLLM itself preempts admits nothing;
- `max_num_scheduled_tokens` is the size of the batch;
- a decoder verifies as many of its draft tokens as its tier may: it is given a new, shorter list.

Steps without a promise in sight are vLLM's own.
"""

import time
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import FCFSRequestQueue
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from services.worker.engine_process import end_with_parent, leave_quickly
from services.worker.hook import Hook
from services.worker.hook_ageing import Ageing
from services.worker.hook_config import HookConfig, from_additional_config, model_of
from services.worker.hook_report import Reporter
from services.worker.hook_request import TrackedRequest
from services.worker.hook_steering import Pool, Progress, Steering
from services.worker.link import Directive, ExpectPromises, HookEnd, Promote, Reforecast, SetCap, SetModel
from services.worker.request_terms import from_extra_args
from services.worker.scheduler_drafts import DraftLimits
from services.worker.version_guard import check_vllm

__all__ = ["AsyncSloScheduler", "SloScheduler", "SyncSloScheduler"]

_PREFIX_LOOKUPS = 8
_request_id = attrgetter("request_id")


class SloScheduler(Scheduler):  # type: ignore[misc]
    """Steers the vLLM scheduler it is mixed into; constructing it picks the one the configuration asks for."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "SloScheduler":
        """The asynchronous scheduler where vLLM runs ahead of the device, else the synchronous one."""
        if cls is not SloScheduler:
            return object.__new__(cls)
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        chosen = AsyncSloScheduler if vllm_config.scheduler_config.async_scheduling else SyncSloScheduler
        return object.__new__(chosen)

    def __init__(self, *args: Any, clock: Callable[[], float] = time.monotonic, **kwargs: Any) -> None:
        check_vllm()
        end_with_parent()
        super().__init__(*args, **kwargs)
        if not isinstance(self.waiting, FCFSRequestQueue):
            raise ValueError("the hook orders the waiting queue itself: scheduling_policy must be fcfs")
        config: HookConfig = from_additional_config(self.vllm_config.additional_config)
        self._clock = clock
        self._token_limit = int(self.scheduler_config.max_num_batched_tokens)
        self._total_blocks = self._free_block_count()
        self._hook = Hook(
            config.plan_settings(self._token_limit),
            model_of(config.model) if config.model is not None else None,
            config.lapse_s,
            self.max_num_active_reqs,
            clock(),
            config.policy,
            config.early_prompt_tokens,
            config.attainment_floor,
            1 + self.num_spec_tokens,
            config.pausing,
        )
        self._tracked: dict[str, TrackedRequest] = {}
        self._by_request_id: dict[str, TrackedRequest] = {}
        self._ageing = Ageing(config.patience_s)
        self._numbers = 0
        self._limits: dict[str, int] = {}
        self._last_budget = 0
        self._drafts = DraftLimits(self.num_spec_tokens, self._tracked, self._hook.tier_of)
        self._stalled = False  # the last batch could not be executed: the next step is vLLM's own, rather than idle
        self._link = HookEnd(config.address)
        self._reporter = Reporter(self._link, self._hook, config.report_interval_s)
        self._hook.warm_up()
        self._reporter.flush(clock(), 0, self._pool(), (), self._token_limit)

    # What vLLM calls

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        """Form the batch, let vLLM schedule it, book it."""
        begin_s = self._clock()
        for directive in self._link.directives():
            self._obey(directive, begin_s)
        steering = self._steer(begin_s)
        hidden = self._arrange(steering)
        planned_s = self._clock()
        try:
            output = super().schedule(throttle_prefills)
        finally:
            self._limits = {}
            self.max_num_scheduled_tokens = self._token_limit
            self.waiting.extend(hidden)
        booked_s = self._clock()
        self._book(output, begin_s)
        idle = not output.total_num_scheduled_tokens
        self._stalled = idle and steering.plan is not None and bool(self.running or self.waiting)
        self._reporter.hook_took(self._clock() - booked_s + planned_s - begin_s)
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Book the end of the oldest step, let vLLM take its output, and report."""
        self._hook.completed(self._clock())
        verified = self._drafts.verified(scheduler_output, model_runner_output) if self.num_spec_tokens else ()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        begin_s = self._clock()
        if verified:
            self._hook.verified(verified)
        self._hook.waiting_count = len(self.waiting)
        self._hook.observed(begin_s)
        self._reporter.flush(begin_s, self.current_step, self._pool(), self._waiting(), self._last_budget)
        return outputs

    def add_request(self, request: Request) -> None:
        """Follow a request from its arrival."""
        super().add_request(request)
        if request.request_id in self._tracked:  # the next input of a streaming session
            return
        self._numbers += 1
        extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
        terms = from_extra_args(extra_args, request.request_id, request.max_tokens)
        tracked = TrackedRequest(
            request.request_id,
            self._numbers,
            terms,
            request.prompt_token_ids or (),
            request.output_token_ids,
            request.max_tokens,
        )
        self._tracked[request.request_id] = self._by_request_id[terms.request_id] = tracked
        self._hook.waiting_count = len(self.waiting)
        self._hook.arrived(tracked, self._clock())
        if self.cache_config.enable_prefix_caching and tracked.on_tier:
            self._keep_prefix(request)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> Any:
        """vLLM lets a request go: finished or aborted."""
        tracked = self._tracked.pop(request.request_id, None)
        if tracked is not None:
            if self._by_request_id.get(tracked.terms.request_id) is tracked:
                del self._by_request_id[tracked.terms.request_id]
            finished = request.status in (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)
            self._hook.removed(tracked, self._clock() if finished else None)
            self._ageing.ended(tracked)
        return super()._free_request(request, delay_free_blocks)

    def _preempt_request(self, request: Request, timestamp: float, drop_stale_output: bool = False) -> None:
        """vLLM takes a running request's blocks."""
        super()._preempt_request(request, timestamp, drop_stale_output)
        tracked = self._tracked[request.request_id]
        self._hook.preempted(tracked)
        tracked.total_tokens = request.num_tokens

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """vLLM rounds a request's share of the step; the batch's limit applies on top."""
        tokens = num_new_tokens
        if self.num_prefill_lookahead:
            tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        limit = self._limits.get(request.request_id)
        if limit is None or tokens <= limit:
            return tokens
        if limit and request.num_tokens - num_computed_tokens == 1:
            return tokens  # its last prompt token, which vLLM has filled up to the size of a speculating decoder
        return limit

    def shutdown(self) -> None:
        """Close the link."""
        super().shutdown()
        self._link.close()
        leave_quickly()

    # Steering

    def _obey(self, directive: Directive, now_s: float) -> None:
        match directive:
            case Promote(request_id, tier):
                tracked = self._by_request_id.get(request_id)
                if tracked is not None:
                    self._hook.promote(tracked, tier, now_s)
            case Reforecast(request_id, output_tokens):
                tracked = self._by_request_id.get(request_id)
                if tracked is not None:
                    self._hook.reforecast(tracked, output_tokens)
            case SetCap(seconds):
                self._hook.set_cap(seconds)
            case ExpectPromises():
                self._hook.expect_promises(now_s)
            case SetModel(model):
                self._hook.timer.set_model(model_of(model))

    def _steer(self, now_s: float) -> Steering:
        hook = self._hook
        if self._stalled or not hook.planning(now_s):
            self._stalled = False
            return Steering(budget=hook.probe_budget, verify=None if hook.probe_budget is None else ())
        waiting, pool = list(self._waiting()), self._pool()
        hook.take_up(now_s, waiting, pool)
        waiting = looked_up = hook.considered(waiting)
        if self.cache_config.enable_prefix_caching:
            looked_up = waiting[:_PREFIX_LOOKUPS]
            self._look_up_prefixes(looked_up)
        hook.demote_lost(now_s, looked_up, pool)
        self._ageing.step(hook, now_s, waiting, pool)
        waiting = hook.reconsider(now_s, waiting, pool)
        if hook.crowded(waiting, pool):
            self._make_room(now_s, waiting)
            pool = self._pool()
        waiting = [tracked for tracked in waiting if tracked.key in self._tracked and not tracked.started]
        return hook.steer(now_s, waiting, pool)

    def _arrange(self, steering: Steering) -> list[Request]:
        """Say the batch to vLLM; the waiting requests to put back afterwards."""
        self._limits = steering.limits
        self._last_budget = steering.budget if steering.budget is not None else self._token_limit
        self.max_num_scheduled_tokens = min(self._token_limit, self._last_budget)
        if self._hook.reorder:
            self._hook.reorder = False
            self._order_running()
        if self.num_spec_tokens:
            more = self._drafts.allow(steering, self.running)
            self.max_num_scheduled_tokens = min(self._token_limit, self.max_num_scheduled_tokens + more)
        if steering.admit is None:
            return []
        admitted = set(steering.admit)
        hidden = [request for request in self.waiting if request.request_id not in admitted]
        self.waiting.clear()
        self.waiting.extend(self.requests[key] for key in steering.admit)
        return hidden

    def _order_running(self) -> None:
        """Promised decoders, promised prefills by deadline, best effort; otherwise as they are."""
        decoders: list[Request] = []
        prefills: list[Request] = []
        best_effort: list[Request] = []
        for request in self.running:
            tracked = self._tracked[request.request_id]
            if tracked.on_tier:
                (decoders if tracked.decoding else prefills).append(request)
            else:
                best_effort.append(request)
        prefills.sort(key=lambda request: self._tracked[request.request_id].due_s)
        self.running[:] = decoders + prefills + best_effort

    def _look_up_prefixes(self, waiting: list[TrackedRequest]) -> None:
        """Tokens the prefix cache would give waiting requests, so that they are planned at their real size."""
        for tracked in waiting:
            request = self.requests[tracked.key]
            if request.num_computed_tokens == 0:
                blocks, tracked.computed_tokens, _ = self.kv_cache_manager.get_computed_blocks(request)
                tracked.shared_blocks = sum(block.ref_cnt > 0 for block in blocks.blocks[0])

    def _keep_prefix(self, request: Request) -> None:
        """Make what the prefix cache would give a request the last to be evicted: it was promised, or is planned, so.

        A session that comes back after a while is first in line for eviction just then.
        """
        blocks, _, _ = self.kv_cache_manager.get_computed_blocks(request)
        for group in blocks.blocks:
            self.kv_cache_manager.block_pool.touch(group)
            self.kv_cache_manager.block_pool.free_blocks(reversed(group))

    def _make_room(self, now_s: float, waiting: list[TrackedRequest]) -> None:
        """Preempt best effort, latest first, where promised work of the next batch lacks blocks or seats.

        Where that is not enough, pause promised decoders, those that are furthest ahead first.
        """
        victims = [self.requests[tracked.key] for tracked in reversed(self._hook.pausable(now_s))]
        victims += [request for request in self.running if not self._tracked[request.request_id].on_tier]
        if not victims:
            return
        shortage = self._hook.shortage(now_s, waiting, self._pool(), self._held_blocks(victims))
        if shortage is None:
            return
        blocks = self._free_block_count() + shortage.blocks
        seats = len(self.running) - shortage.seats
        while victims and (self._free_block_count() < blocks or len(self.running) > seats):
            victim = victims.pop()
            if not self._request_blocks_can_be_freed(victim):
                continue
            self.running.remove(victim)
            self._preempt_request(victim, time.monotonic(), drop_stale_output=self.requires_kv_delivery)
            tracked = self._tracked[victim.request_id]
            if tracked.promised:
                self._hook.paused(tracked)

    def _book(self, output: SchedulerOutput, now_s: float) -> None:
        scheduled = output.num_scheduled_tokens
        moved = []
        decoding = self._hook.table.key_set
        if not scheduled.keys() <= decoding:
            for key in [key for key in scheduled if key not in decoding]:
                request = self.requests[key]
                known = request.num_tokens
                computed = min(request.num_computed_tokens, known)
                moved.append(Progress(self._tracked[key], scheduled[key], computed, known))
        self._hook.waiting_count = len(self.waiting)
        drafts = output.scheduled_spec_decode_tokens.values()
        self._hook.scheduled(now_s, moved, scheduled, max(map(len, drafts), default=0))
        self._reporter.flush(now_s, self.current_step, self._pool(), self._waiting(), self._last_budget)

    # Looking at vLLM

    def _waiting(self) -> Iterable[TrackedRequest]:
        return map(self._tracked.__getitem__, map(_request_id, self.waiting))

    def _free_block_count(self) -> int:
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks()
        return free

    def _held_blocks(self, requests: list[Request]) -> int:
        """Blocks that preempting `requests` would free at most."""
        return sum(-(-request.num_computed_tokens // self.block_size) for request in requests)

    def _pool(self) -> Pool:
        seats = self.max_num_active_reqs
        return Pool(self._free_block_count(), self._total_blocks, self.block_size, seats - len(self.running), seats)


class SyncSloScheduler(SloScheduler):
    """The hook over vLLM's scheduler with one batch in flight."""


class AsyncSloScheduler(SloScheduler, AsyncScheduler):  # type: ignore[misc]
    """The hook over vLLM's asynchronous scheduler."""
