"""On-line forecast of output lengths, per application and prompt-length bucket.

Each bucket keeps a decaying histogram over geometrically spaced length bins. The mean serves capacity (KV that will be
in use), the quantile serves margins, and both can be asked again for a request that has outlived its forecast: given
that it has produced g tokens, only the part of the histogram beyond g counts.
"""

import math
from dataclasses import dataclass

__all__ = ["LengthForecast", "LengthForecaster"]

_RATIO = 1.15
_DEFAULT_TOKENS = 256


@dataclass(frozen=True, slots=True)
class LengthForecast:
    """Forecast of the total output length of a request, tokens: `mean` for capacity, `quantile` for margin."""

    mean_tokens: int
    quantile_tokens: int
    samples: float


class LengthForecaster:
    """Learns output lengths from finished requests.

    `memory` is how many recent requests a bucket remembers (older ones fade), `quantile` the level of the upper
    forecast. A bucket that has seen fewer than `min_samples` falls back to its application, then to all traffic, then
    to `default_tokens`.
    """

    def __init__(
        self,
        *,
        quantile: float = 0.9,
        memory: float = 512.0,
        min_samples: float = 8.0,
        default_tokens: int = _DEFAULT_TOKENS,
    ) -> None:
        self._quantile = quantile
        self._keep = 1.0 - 1.0 / memory
        self._min_samples = min_samples
        self._default_tokens = default_tokens
        self._histograms: dict[tuple[str, int], dict[int, list[float]]] = {}

    def observe(self, application: str, prompt_tokens: int, output_tokens: int) -> None:
        """A request finished by itself after `output_tokens`."""
        for key in _keys(application, prompt_tokens):
            histogram = self._histograms.setdefault(key, {})
            for cell in histogram.values():
                cell[0] *= self._keep
                cell[1] *= self._keep
            cell = histogram.setdefault(_bin(output_tokens), [0.0, 0.0])
            cell[0] += 1.0
            cell[1] += output_tokens

    def forecast(
        self, application: str, prompt_tokens: int, max_tokens: int, generated_tokens: int = 0
    ) -> LengthForecast:
        """Forecast the total output, never above `max_tokens` and always beyond what was generated already."""
        floor = min(generated_tokens + 1, max_tokens)
        for key in _keys(application, prompt_tokens):
            cells = sorted((b, c) for b, c in self._histograms.get(key, {}).items() if _upper(b) > generated_tokens)
            weight = sum(count for _, (count, _) in cells)
            if weight >= self._min_samples:
                mean = sum(total for _, (_, total) in cells) / weight
                quantile = _quantile_of(cells, self._quantile * weight)
                return LengthForecast(
                    min(max_tokens, max(floor, math.ceil(mean))),
                    min(max_tokens, max(floor, math.ceil(quantile))),
                    weight,
                )
        guess = max(self._default_tokens, 2 * generated_tokens, floor)
        return LengthForecast(min(max_tokens, guess), min(max_tokens, 2 * guess), 0.0)


def _keys(application: str, prompt_tokens: int) -> tuple[tuple[str, int], ...]:
    return ((application, max(0, prompt_tokens).bit_length()), (application, -1), ("", -1))


def _bin(tokens: int) -> int:
    return math.floor(math.log(max(1, tokens), _RATIO))


def _upper(index: int) -> float:
    return _RATIO ** (index + 1)


def _quantile_of(cells: list[tuple[int, list[float]]], target: float) -> float:
    seen = 0.0
    for _, (count, total) in cells:
        seen += count
        if seen >= target:
            return total / count
    return cells[-1][1][1] / cells[-1][1][0]
