"""What the hook believes, held against what vLLM's scheduler knows."""

from tests.services.worker.driven_scheduler import DrivenScheduler

__all__ = ["check_books", "check_empty"]


def check_books(replica: DrivenScheduler) -> None:
    """Between two steps: every request is in exactly one of the hook's places, with the counts vLLM has."""
    scheduler = replica.scheduler
    hook = scheduler._hook
    tracked = scheduler._tracked
    assert tracked.keys() == scheduler.requests.keys()
    running = {request.request_id: request for request in scheduler.running}
    assert hook.table.key_set == set(hook.table.keys)
    assert hook.table.key_set | hook.prefilling.keys() == running.keys()
    assert not hook.table.key_set & hook.prefilling.keys()
    assert hook._promised == sum(request.promised for request in tracked.values())
    assert hook.pending._requests.keys() == {key for key, request in tracked.items() if request.pending}
    assert hook.pending.set_aside <= hook.pending._requests.keys()
    assert not any(request.promised and request.pending for request in tracked.values())
    assert hook._staged.keys() <= tracked.keys()
    assert all(key in tracked and tracked[key].promised and key not in running for key in hook.pauses.keys)
    assert scheduler._limits == {}
    assert scheduler.max_num_scheduled_tokens == scheduler._token_limit
    for row, key in enumerate(hook.table.keys):
        request = running[key]
        drafts_in_flight = replica.drafts_in_flight(key)
        in_flight = request.num_output_placeholders - drafts_in_flight
        assert hook.table.ints("context")[row] == request.num_computed_tokens - drafts_in_flight, key
        assert hook.table.ints("outputs")[row] == request.num_output_tokens + in_flight, key
    for key, prefilling in hook.prefilling.items():
        assert prefilling.computed_tokens == running[key].num_computed_tokens, key


def check_empty(replica: DrivenScheduler, total_blocks: int) -> None:
    """Nothing runs any more, so nothing is left anywhere."""
    scheduler = replica.scheduler
    hook = scheduler._hook
    assert replica.free_blocks == total_blocks
    assert not scheduler.requests
    assert not scheduler._tracked
    assert not scheduler._by_request_id
    assert len(hook.table) == 0
    assert not hook.prefilling
    assert len(hook.pending) == 0
    assert not hook.pending.set_aside
    assert not hook.pending._decisions
    assert not hook.pauses
    assert hook._promised == 0
    assert hook._staged == {}
    assert hook._steps == []
    assert not hook.timer._in_flight
    assert hook.waiting_count == 0
