"""Where prompts went."""

from services.core.prefixes import CHUNK_TOKENS, PrefixMemory

CAPACITY = 100 * CHUNK_TOKENS
PROMPT = list(range(10 * CHUNK_TOKENS))


def test_a_conversation_is_found_where_its_beginning_went() -> None:
    memory = PrefixMemory()
    memory.sent("a", PROMPT, CAPACITY)
    longer = [*PROMPT, *range(5, 500)]
    assert memory.cached_tokens(longer, ["a", "b"]) == {"a": len(PROMPT)}


def test_only_the_common_head_counts() -> None:
    memory = PrefixMemory()
    memory.sent("a", PROMPT, CAPACITY)
    other = [*PROMPT[: 3 * CHUNK_TOKENS + 10], 7, *PROMPT[3 * CHUNK_TOKENS + 11 :]]
    assert memory.cached_tokens(other, ["a"]) == {"a": 3 * CHUNK_TOKENS}
    assert memory.cached_tokens(PROMPT[1:], ["a"]) == {}
    assert memory.cached_tokens(PROMPT[: CHUNK_TOKENS - 1], ["a"]) == {}


def test_it_forgets_the_least_recently_used_first_and_tails_before_heads() -> None:
    memory = PrefixMemory()
    first, second = PROMPT, [9, *PROMPT]
    memory.sent("a", first, 12 * CHUNK_TOKENS)
    memory.sent("a", second, 12 * CHUNK_TOKENS)
    assert memory.cached_tokens(second, ["a"]) == {"a": 10 * CHUNK_TOKENS}
    assert memory.cached_tokens(first, ["a"]) == {"a": 2 * CHUNK_TOKENS}


def test_a_replica_that_left_is_forgotten() -> None:
    memory = PrefixMemory()
    memory.sent("a", PROMPT, CAPACITY)
    memory.forget("a")
    assert memory.cached_tokens(PROMPT, ["a"]) == {}


def test_a_prompt_larger_than_the_cache_leaves_what_fits() -> None:
    memory = PrefixMemory()
    memory.sent("a", PROMPT, 4 * CHUNK_TOKENS + 3)
    assert memory.cached_tokens(PROMPT, ["a"]) == {"a": 4 * CHUNK_TOKENS}
