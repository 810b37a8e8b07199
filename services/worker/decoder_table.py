"""All decoding requests in columns, so that a step costs the same few vector operations at 1 and at 256 of them."""

import numpy as np
from numpy.typing import NDArray

from services.core.columns import DecoderColumns, Floats, Ints
from services.worker.hook_request import TrackedRequest

__all__ = ["DecoderTable"]

_GROWING = ("tokens", "context", "outputs")
_INT_COLUMNS = (*_GROWING, "tier", "number", "forecast", "max_tokens", "application")
_FLOAT_COLUMNS = ("anchor_s", "tpot_s")


class DecoderTable:
    """Decoding requests in the order they started. While a request is in here, its counts live here."""

    def __init__(self, capacity: int) -> None:
        self._hold(
            np.zeros((len(_INT_COLUMNS), capacity), np.int64), np.zeros((len(_FLOAT_COLUMNS), capacity), np.float64)
        )
        self.keys: list[str] = []
        self.key_set: set[str] = set()
        self.requests: list[TrackedRequest] = []
        self._columns: DecoderColumns | None = None  # as last read, while nothing has changed

    def __len__(self) -> int:
        return len(self.keys)

    def ints(self, name: str) -> Ints:
        """An integer column, one entry per request."""
        return self._ints[name][: len(self.keys)]

    def floats(self, name: str) -> Floats:
        """A float column, one entry per request."""
        return self._floats[name][: len(self.keys)]

    def add(self, request: TrackedRequest, tier: int, first_token_s: float, application: int = 0) -> None:
        """Take in a request whose first token is in flight and expected at `first_token_s`."""
        self._columns = None
        row = len(self.keys)
        if row == len(self._ints["tier"]):
            self._grow()
        self.keys.append(request.key)
        self.key_set.add(request.key)
        self.requests.append(request)
        request.decoding = True
        self._ints["number"][row] = request.number
        self._ints["context"][row] = request.computed_tokens
        self._ints["outputs"][row] = request.outputs
        self._ints["forecast"][row] = request.forecast_tokens
        self._ints["application"][row] = application
        self._ints["max_tokens"][row] = request.max_tokens
        self._ints["tokens"][row] = request.tokens
        self._floats["anchor_s"][row] = first_token_s - request.in_hand_s
        self._write(row, request, tier)

    def refresh(self, request: TrackedRequest, tier: int) -> None:
        """Write a request's tier and deadlines after they changed; its counts stay."""
        self._write(self.keys.index(request.key), request, tier)

    def reforecast(self, request: TrackedRequest) -> None:
        """Write a request's length forecast after it changed."""
        self._columns = None
        self._ints["forecast"][self.keys.index(request.key)] = request.forecast_tokens

    def restage(self, request: TrackedRequest, tier: int) -> None:
        """As `refresh`, with the tokens of a new stage."""
        self._columns = None
        row = self.keys.index(request.key)
        self._ints["tokens"][row] = request.tokens
        self._write(row, request, tier)

    def sync(self, request: TrackedRequest) -> None:
        """Copy the request's counts from its row."""
        row = self.keys.index(request.key)
        request.tokens = int(self._ints["tokens"][row])
        request.computed_tokens = int(self._ints["context"][row])
        request.outputs = int(self._ints["outputs"][row])

    def remove(self, request: TrackedRequest) -> None:
        """Let a request go, its counts copied back."""
        self._columns = None
        self.sync(request)
        row = self.keys.index(request.key)
        size = len(self.keys)
        for block in self._blocks:
            block[:, row : size - 1] = block[:, row + 1 : size]
        del self.keys[row]
        self.key_set.discard(request.key)
        del self.requests[row]
        request.decoding = False

    def advance(self, scheduled: slice | NDArray[np.bool_]) -> None:
        """One more token is in flight for the scheduled rows."""
        self._columns = None
        self._growing[:, : len(self.keys)][:, scheduled] += 1

    def accept(self, rows: list[int], accepted: list[int]) -> None:
        """Rows whose last step yielded more than one token: by how many more."""
        self._columns = None
        self._growing[:, rows] += np.array(accepted, np.int64)

    @property
    def due_s(self) -> Floats:
        """When each request's next token is due."""
        due: Floats = self.floats("anchor_s") + self.ints("tokens") * self.floats("tpot_s")
        return due

    @property
    def forecast_left(self) -> Ints:
        """Tokens still expected of each request; see `TrackedRequest.forecast_left`."""
        outputs = self.ints("outputs")
        left = self.ints("forecast") - outputs
        left = np.where(left > 0, left, outputs)
        expected: Ints = np.maximum(1, np.minimum(left, self.ints("max_tokens") - outputs))
        return expected

    def columns(self) -> DecoderColumns:
        """The table as the core's batch former reads it, until the next change."""
        if self._columns is None:
            tier = self.ints("tier")
            self._columns = DecoderColumns(
                self.keys, tier, self.due_s, self.floats("tpot_s"), self.ints("context"), self.forecast_left, tier >= 0
            )
        return self._columns

    def _write(self, row: int, request: TrackedRequest, tier: int) -> None:
        self._columns = None
        self._ints["tier"][row] = tier
        if request.anchor_s is not None:
            self._floats["anchor_s"][row] = request.anchor_s - request.in_hand_s
        self._floats["tpot_s"][row] = request.tpot_s

    def _grow(self) -> None:
        ints, floats = self._blocks
        self._hold(np.hstack([ints, np.zeros_like(ints)]), np.hstack([floats, np.zeros_like(floats)]))

    def _hold(self, ints: Ints, floats: Floats) -> None:
        """Keep the columns as the rows of two arrays, so that requests are shifted in all of them at once."""
        self._blocks = ints, floats
        self._ints: dict[str, Ints] = dict(zip(_INT_COLUMNS, ints, strict=True))
        self._floats: dict[str, Floats] = dict(zip(_FLOAT_COLUMNS, floats, strict=True))
        self._growing = ints[: len(_GROWING)]
