"""Reading and removing dead letters: entries whose delivery failed too often, kept for people to look at."""

from dataclasses import dataclass

from redis.asyncio import Redis

from protos import types_pb2
from services.common import keys
from services.common.broker import command
from services.common.stream_entry import MalformedEntryError, decode_entry

__all__ = ["DeadLetter", "read_dead_letters", "remove_dead_letter"]

_PAGE = 100


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One dead letter. `request` is None where the entry never was one."""

    letter_id: str
    request_id: str
    application: str
    tenant: str
    stream: str
    deliveries: int
    buried_us: int
    reason: str
    request: types_pb2.QueuedRequest | None


async def read_dead_letters(redis: Redis) -> list[DeadLetter]:
    """All of them, oldest first. Raises SloServeError while Redis is away."""
    found: list[DeadLetter] = []
    start = "-"
    while True:
        page = await command(redis, "XRANGE", keys.DEAD_LETTERS, start, "+", "COUNT", _PAGE)
        found += [_letter(letter_id.decode(), fields) for letter_id, fields in page]
        if len(page) < _PAGE:
            return found
        start = f"({page[-1][0].decode()}"


async def remove_dead_letter(redis: Redis, letter_id: str) -> bool:
    """Remove one; False where it is not there."""
    return bool(await command(redis, "XDEL", keys.DEAD_LETTERS, letter_id))


def _letter(letter_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    text = {name.decode("utf-8", "replace"): value.decode("utf-8", "replace") for name, value in fields.items()}
    try:
        request = decode_entry(fields)
    except MalformedEntryError:
        request = None
    return DeadLetter(
        letter_id=letter_id,
        request_id=text.get("id", ""),
        application=text.get("app", ""),
        tenant=text.get("tenant", ""),
        stream=text.get("stream", ""),
        deliveries=int(text.get("deliveries", "0")),
        buried_us=int(text.get("buried_us", "0")),
        reason=text.get("reason", ""),
        request=request,
    )
