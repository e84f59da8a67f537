"""From values to places on a page, and the ticks between them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from search.space import Choice, Domain, Float, Int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """An axis: values from ``low`` to ``high`` lie between two places; others at its ends.

    Attributes:
        low: A value.
        high: A larger value.
        start: Where ``low`` lies.
        end: Where ``high`` lies; may be less than ``start``.
        ticks: Values and what to write beside them.
        is_log: Whether every decade is equally long.
        step: How far apart values are that are written one by one; 0 of a continuous axis.
    """

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[tuple[float, str], ...]
    is_log: bool = False
    step: float = 0.0

    def __call__(self, value: float) -> float:
        """Return where a value lies."""
        low, high = self.low, self.high
        value = min(max(value, low), high)
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def linear(low: float, high: float, start: float, end: float, *, num_ticks: int = 5) -> Scale:
    """Return an axis whose ends are ticks."""
    if low == high:
        reach = abs(low) * 0.05 or 0.5
        low, high = low - reach, high + reach
    locator = MaxNLocator(num_ticks, steps=[1, 2, 2.5, 5, 10])
    ticks = [float(tick) for tick in locator.tick_values(low, high)]
    # As many digits for all as the one that needs most.
    step = ticks[1] - ticks[0]
    digits = next((d for d in range(9) if math.isclose(step, round(step, d), rel_tol=1e-6)), 9)
    return Scale(
        low=ticks[0],
        high=ticks[-1],
        start=start,
        end=end,
        ticks=tuple((tick, f"{tick:.{digits}f}") for tick in ticks),
    )


def whole(low: int, high: int, start: float, end: float, *, max_ticks: int = 8) -> Scale:
    """Return an axis of whole numbers, with half a step of room at both ends.

    Args:
        low: The first number.
        high: The last one.
        start: Where the axis begins.
        end: Where it ends.
        max_ticks: Up to so many numbers have a tick each.
    """
    if high - low < max_ticks:
        numbers: Sequence[int] = range(low, high + 1)
    else:
        located = MaxNLocator(5, integer=True).tick_values(low, high)
        numbers = [int(tick) for tick in located if low <= tick <= high]
    return Scale(
        low=low - 0.5,
        high=high + 0.5,
        start=start,
        end=end,
        ticks=tuple((float(number), str(number)) for number in numbers),
        step=1.0,
    )


def logarithmic(low: float, high: float, start: float, end: float) -> Scale:
    """Return an axis from ``low`` to ``high``, with ticks at decades, or at 1, 2, and 5 of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if math.log10(high / low) >= 2 else (1, 2, 5)
    places = [factor * 10.0**decade for decade in decades for factor in factors]
    # A hair of room: 10 ** -4 is not what "1e-4" is read as.
    ticks = [place for place in places if low * (1 - 1e-9) <= place <= high * (1 + 1e-9)]
    if len(ticks) < 2:
        ticks = [low, high]
    return Scale(
        low=low,
        high=high,
        start=start,
        end=end,
        ticks=tuple((tick, f"{tick:.3g}") for tick in ticks),
        is_log=True,
    )


def of_domain(domain: Domain, start: float, end: float) -> Scale:
    """Return the axis of a param; of a choice by the index of its value."""
    match domain:
        case Float(low=low, high=high, log=True):
            return logarithmic(low, high, start, end)
        case Float(low=low, high=high):
            nice = linear(low, high, start, end)
            ticks = tuple(tick for tick in nice.ticks if low <= tick[0] <= high)
            return Scale(low=low, high=high, start=start, end=end, ticks=ticks)
        case Int(low=low, high=high):
            return whole(low, high, start, end)
        case Choice(choices=choices):
            named = tuple((float(i), str(choice)) for i, choice in enumerate(choices))
            return Scale(
                low=-0.5, high=len(choices) - 0.5, start=start, end=end, ticks=named, step=1.0
            )


def number_of(domain: Domain, value: Any) -> float:
    """Return where on its axis a param's value lies, as a number."""
    return float(domain.choices.index(value) if isinstance(domain, Choice) else value)


def range_of(values: Iterable[float], mode: str) -> tuple[float, float]:
    """Return the range to show of a metric.

    A few values far on the bad side, as of trials that diverge, would press all others into a line:
    they are then left to lie at the axis's end.
    """
    found = np.fromiter(values, dtype=np.float64)
    low, high = float(found.min()), float(found.max())
    tail = 95 if mode == "min" else 5
    bound, middle = (float(v) for v in np.percentile(found, [tail, 50]))
    limit = middle + 3 * (bound - middle)
    if mode == "min":
        return low, min(high, limit) if bound > middle else high
    return (max(low, limit) if bound < middle else low), high


def short(value: float) -> str:
    """Return a number to four digits."""
    return f"{value:.4g}"


def time_unit(seconds: float) -> tuple[float, str]:
    """Return the unit that a span is told in: its length in seconds, and its name."""
    for unit_s, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit_s:
            return unit_s, name
    return 1.0, "seconds"
