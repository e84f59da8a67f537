"""A forecast's numbers, and how they stand beside what came of them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from search.planning.duration import in_words


@dataclass(frozen=True, kw_only=True)
class Span:
    """A low value, one in the middle, and a high one: nine in ten lie between the outer two."""

    low: float
    middle: float
    high: float

    def as_counts(self) -> str:
        """Return whole numbers for people."""
        return f"{self.middle:.0f} [{self.low:.0f}, {self.high:.0f}]"

    def as_times(self) -> str:
        """Return seconds for people."""
        return f"{in_words(self.middle)} [{in_words(self.low)}, {in_words(self.high)}]"


def compare_with_actual(facts: Mapping[str, Any]) -> str | None:
    """Return forecast beside actual in one line; none if a record's facts lack either."""
    forecast, actual = facts.get("forecast"), facts.get("actual")
    if forecast is None or actual is None:
        return None
    duration, epochs = Span(**forecast["duration_s"]), Span(**forecast["epochs"])
    apart = actual["duration_s"] / max(duration.middle, 1e-9) - 1
    return (
        f"forecast {duration.as_times()}, epochs {epochs.as_counts()}; actual "
        f"{in_words(actual['duration_s'])} ({apart:+.0%}), epochs {actual['epochs']}"
    )
