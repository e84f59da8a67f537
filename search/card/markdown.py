"""Text, tables, and images for Markdown, of words that may be anybody's."""

import sys
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# What Markdown or HTML would take for markup inside a line.
_SPECIAL = frozenset("\\`*[]<>|~$&")

MAX_CHARACTERS = 300


def escape(value: object) -> str:
    r"""Return a value as one line of text that shows as it is, cut if it is very long.

    Example:
        >>> print(escape("a|b <script>"))
        a\|b \<script\>
    """
    text = " ".join(str(value)[:MAX_CHARACTERS].split())
    return "".join(
        f"\\{character}" if character in _SPECIAL else character
        for character in text
        if character.isprintable()
    )


def say(facts: Mapping[str, Any], name: str) -> str:
    """Return one of the facts, escaped; ``unknown`` if it is not among them."""
    return escape(facts.get(name, "unknown"))


def mapping(facts: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return one of the facts if it is a mapping; an empty one if not."""
    value = facts.get(name)
    return value if isinstance(value, dict) else {}


def number(value: Any) -> str:
    """Return a number to four digits."""
    # JSON may have whole numbers beyond all floats.
    is_finite = isinstance(value, int | float) and abs(value) <= sys.float_info.max
    return f"{value:.4g}" if is_finite else "not defined"


def table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of escaped cells; ``None.`` where there are no rows."""
    lines = [f"| {' | '.join(escape(cell) for cell in row)} |" for row in rows]
    if not lines:
        return "None."
    head = f"| {' | '.join(escape(cell) for cell in header)} |"
    return "\n".join([head, f"|{'---|' * len(header)}", *lines])


def image(path: str) -> str:
    """Return an image by its path relative to the page."""
    return f"![{escape(path.rsplit('/', 1)[-1])}]({urllib.parse.quote(path, errors='replace')})"
