"""A run of the core as one JSON object, and back, without losing a bit.

JSON has no infinities and no NaN: those travel as the strings "inf", "-inf" and "nan". Every other float is written by
its shortest form that reads back the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from services.core.admission import Decisions, Policy
from services.core.columns import DecoderColumns, columns_of
from services.core.perf_model import PerfModel, Segment
from services.core.view import Decoder, PlanSettings, Prefill, ReplicaView
from services.planner.promises import PlanRun

__all__ = ["Recorded", "decisions_to_json", "run_from_json", "run_to_json"]

Json = dict[str, Any]

_VERSION = 1
_TEXT = frozenset({"id", "application"})
_VIEW_NUMBERS = ("now_s", "free_blocks", "total_blocks", "block_size", "max_num_seqs", "engine_free_at_s")
_DECODER_FIELDS = tuple(field.name for field in fields(Decoder))


@dataclass(frozen=True, slots=True)
class Recorded:
    """The inputs of a run, and what was decided (as JSON: compare it with `decisions_to_json`)."""

    replica_id: str
    at_us: int
    view: ReplicaView
    candidates: tuple[Prefill, ...]
    policy: Policy
    settings: PlanSettings
    decisions: Json


def run_to_json(run: PlanRun, at_us: int) -> Json:
    """A run and when it was (Unix microseconds)."""
    view = run.view
    return {
        "v": _VERSION,
        "at_us": at_us,
        "replica_id": run.replica_id,
        "policy": run.policy.value,
        "settings": _plain(asdict(run.settings)),
        "model": {
            "segments": [asdict(segment) for segment in view.model.segments],
            "margin_s": view.model.margin_s,
            "r2": view.model.r2,
            "attention": view.model.attention,
        },
        "view": {name: _number(getattr(view, name)) for name in _VIEW_NUMBERS},
        "decoders": _columns(columns_of(view.decoders)),
        "prefills": [_plain(asdict(prefill)) for prefill in view.prefills],
        "candidates": [_plain(asdict(prefill)) for prefill in run.candidates],
        "decisions": decisions_to_json(run.decisions),
        "seconds": run.seconds,
    }


def decisions_to_json(decisions: Decisions) -> Json:
    """Decisions with every number, comparable by `==`."""
    plain: Json = _plain(asdict(decisions))
    return plain


def run_from_json(record: Json) -> Recorded:
    """The inputs that a record holds. Raises ValueError or KeyError where it is not one of ours."""
    if record["v"] != _VERSION:
        raise ValueError(f"record of version {record['v']}, expected {_VERSION}")
    columns = [record["decoders"][name] for name in _DECODER_FIELDS]
    model = record["model"]
    view = ReplicaView(
        model=PerfModel(
            tuple(Segment(**s) for s in model["segments"]), model["margin_s"], model["r2"], model.get("attention", 0.0)
        ),
        decoders=columns_of([Decoder(*row) for row in zip(*columns, strict=True)]),
        prefills=_prefills(record["prefills"]),
        **{name: _back(value) for name, value in record["view"].items()},
    )
    settings: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record["settings"].items()}
    return Recorded(
        record["replica_id"],
        record["at_us"],
        view,
        _prefills(record["candidates"]),
        Policy(record["policy"]),
        PlanSettings(**settings),
        record["decisions"],
    )


def _columns(columns: DecoderColumns) -> Json:
    named = {name: getattr(columns, name).tolist() for name in _DECODER_FIELDS if name != "id"}
    return {"id": list(columns.ids), **{name: [_number(value) for value in column] for name, column in named.items()}}


def _prefills(rows: Sequence[Json]) -> tuple[Prefill, ...]:
    return tuple(Prefill(**{k: v if k in _TEXT else _back(v) for k, v in row.items()}) for row in rows)


def _plain(value: Any) -> Any:
    """`value` with infinities and NaN as strings, tuples as lists, at any depth."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return _number(value)


def _number(value: Any) -> Any:
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


def _back(value: Any) -> Any:
    return float(value) if isinstance(value, str) else value
