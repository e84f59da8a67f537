"""Times as people write them: 2h, 30m, 90s."""

import re

from lightning_modules.errors import InputError

UNITS_S = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str, option: str) -> float:
    """Return the seconds that a text means.

    Args:
        text: A number and its unit.
        option: Where it was given, for the message.

    Raises:
        InputError: If it means none, or less than a second.

    Example:
        >>> parse_duration("1.5h", "--budget")
        5400.0
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s?([hms])", text.strip())
    seconds = float(found[1]) * UNITS_S[found[2]] if found else 0.0
    if seconds < 1:
        raise InputError(
            f"{option} must be a time of a second or more, such as 2h, 30m, or 90s; got {text!r}"
        )
    return seconds


def in_words(seconds: float) -> str:
    """Return a time for people, in one unit.

    Example:
        >>> [in_words(s) for s in (0.04, 42, 1320, 9000, 400000)]
        ['0.04 s', '42 s', '22 min', '2.5 h', '4.6 days']
    """
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
