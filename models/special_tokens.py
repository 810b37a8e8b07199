"""The control tokens of the bundled model, in the order of their ids."""

from typing import Final

__all__ = [
    "ASSISTANT",
    "BOS",
    "CONTROL_TOKENS",
    "END",
    "PAD",
    "STAGE_TOKENS",
    "SYSTEM",
    "THINK",
    "THINK_END",
    "TOOL_CALL",
    "TOOL_CALL_END",
    "USER",
]

BOS: Final = "<|bos|>"
END: Final = "<|end|>"
PAD: Final = "<|pad|>"
SYSTEM: Final = "<|system|>"
USER: Final = "<|user|>"
ASSISTANT: Final = "<|assistant|>"
THINK: Final = "<think>"
THINK_END: Final = "</think>"
TOOL_CALL: Final = "<tool_call>"
TOOL_CALL_END: Final = "</tool_call>"

CONTROL_TOKENS: Final = (BOS, END, PAD, SYSTEM, USER, ASSISTANT)
"""Never part of a text: detokenisation skips them."""

STAGE_TOKENS: Final = (THINK, THINK_END, TOOL_CALL, TOOL_CALL_END)
"""Mark where a stage begins or ends: one id each, and visible in the text, as clients parse them."""
