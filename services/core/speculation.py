"""Speculation length per tier: how many tokens each step verifies for a decoder.

With acceptance rate a, a step that verifies n tokens is expected to yield (1 - a**n) / (1 - a) of them, and needs
n - 1 sequential draft steps. n = 1 is plain decoding.
"""

__all__ = ["MAX_VERIFY_TOKENS", "expected_tokens"]

MAX_VERIFY_TOKENS = 10


def expected_tokens(verify_tokens: int, acceptance: float) -> float:
    """Tokens a step is expected to yield when it verifies `verify_tokens` of them."""
    if acceptance >= 1.0:
        return float(verify_tokens)
    return (1.0 - acceptance**verify_tokens) / (1.0 - acceptance)
