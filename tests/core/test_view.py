"""Views that contradict themselves are refused, by name."""

import math
from dataclasses import replace

import pytest

from services.core.columns import columns_of
from services.core.errors import BadViewError, CoreError
from services.core.presets import preset
from services.core.view import Decoder, Prefill, ReplicaView, check_prefill, check_view

DECODER = Decoder("d", 0, 1.0, 0.05, 100, 10)
PREFILL = Prefill("p", 0, 1.0, 0.05, 100)
VIEW = ReplicaView(0.0, preset("opt-6.7b-a100").model, (DECODER,), (PREFILL,), 10, 20)


def test_a_sound_view_passes() -> None:
    check_view(VIEW)
    check_view(replace(VIEW, decoders=columns_of(VIEW.decoders)))


@pytest.mark.parametrize(
    "change",
    [
        {"now_s": math.nan},
        {"engine_free_at_s": math.nan},
        {"free_blocks": 21},
        {"free_blocks": -1},
        {"block_size": 0},
        {"max_num_seqs": 0},
        {"decoders": (replace(DECODER, next_deadline_s=math.nan),)},
        {"decoders": (replace(DECODER, tpot_s=0.0),)},
        {"decoders": (replace(DECODER, tpot_s=math.inf),)},
        {"decoders": (replace(DECODER, tier=-2),)},
        {"decoders": (replace(DECODER, context_tokens=-1),)},
        {"decoders": (DECODER, DECODER)},
        {"decoders": (replace(DECODER, id="p"),)},
    ],
)
def test_a_contradiction_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(BadViewError):
        check_view(replace(VIEW, **change))


@pytest.mark.parametrize(
    "change",
    [
        {"deadline_s": math.inf},
        {"prompt_tokens": 0},
        {"computed_tokens": 101},
        {"output_tokens": 0},
        {"weight": 0},
        {"tier": -5},
    ],
)
def test_a_candidate_without_meaning_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(CoreError, match="request p"):
        check_prefill(replace(PREFILL, **change))


def test_columns_read_as_the_decoders_they_came_from() -> None:
    decoders = tuple(Decoder(f"d{i}", i % 3 - 1, 1.0 + i, 0.05, 100 + i, 5 + i, i % 2 == 0) for i in range(7))
    columns = columns_of(decoders)
    assert tuple(columns) == decoders
    assert columns[1:3] == list(decoders[1:3])
    assert columns_of(columns) is columns
