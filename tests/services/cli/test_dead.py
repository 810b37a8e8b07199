"""Dead letters as `slosctl dead` reads them and sends them again."""

from redis.asyncio import Redis

from protos import types_pb2
from services.cli.dead import letter_options
from services.client import Stage, request_to_wire
from services.common import keys
from services.common.dead_letters import read_dead_letters, remove_dead_letter
from services.common.request_store import RequestStore


def queued(request_id: str, **fields: object) -> types_pb2.QueuedRequest:
    return types_pb2.QueuedRequest(
        request_id=request_id,
        attempt=1,
        tenant="acme",
        prompt_token_ids=[5, 6],
        sampling=types_pb2.Sampling(max_tokens=9, temperature=0.5, stop=["END"], ignore_eos=True),
        **{"application": "chatbot", **fields},
    )


async def test_letters_are_read_with_their_request_and_removed_one_by_one(redis: Redis, unique: str) -> None:
    store = RequestStore(redis)
    request = queued(unique)
    where = await store.enqueue(request, keys.BEST_EFFORT_QUEUE + unique, verdict="best_effort")
    assert await store.bury(unique, stream=where.stream, entry_id=where.entry_id, reason="it kills", deliveries=3)
    await redis.xadd(keys.DEAD_LETTERS, {"id": f"{unique}-x", "reason": "malformed: no body"})
    mine = [letter for letter in await read_dead_letters(redis) if letter.request_id.startswith(unique)]
    first, malformed = mine
    assert (first.request, first.reason, first.deliveries, first.tenant) == (request, "it kills", 3, "acme")
    assert (malformed.request, malformed.deliveries) == (None, 0)
    assert await remove_dead_letter(redis, first.letter_id)
    assert not await remove_dead_letter(redis, first.letter_id)
    left = {letter.letter_id for letter in await read_dead_letters(redis)}
    assert malformed.letter_id in left and first.letter_id not in left


def test_what_is_asked_for_again_is_what_the_client_asked_for() -> None:
    again = request_to_wire([5, 6], **letter_options(queued("r")))
    assert again.application == "chatbot"
    assert not again.stages
    assert again.sampling == queued("r").sampling


def test_stages_of_its_own_are_asked_for_as_they_were_resolved() -> None:
    stages = [types_pb2.Stage(kind=types_pb2.STAGE_KIND_ANSWER, ttft_ms=800, tpot_ms=60, max_tokens=9, tier="tight")]
    options = letter_options(queued("r", application="custom", stages=stages))
    assert options.get("stages") == (Stage(kind="ANSWER", ttft_ms=800, tpot_ms=60, max_tokens=9),)
    assert "application" not in options
