"""Pieces of SVG. Text and attributes are escaped; colours and sizes of type are the page's style.

Every mark of a trial has its key as ``data-t``: the page's script finds it by that in all plots.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from search.report.scales import Scale

# Names that are anybody's may be of any length.
MAX_CHARACTERS = 2000

NUM_SHAPES = 6
NUM_TONES = 7

# Two of the narrow side by side fill the page.
NARROW_PX, WIDE_PX = 440, 904


@dataclass(frozen=True)
class Plot:
    """A plot, drawn.

    Attributes:
        svg: The drawing.
        title: What it shows, in a few words.
        note: What has to be known to read it.
        is_wide: Whether it takes the whole width.
    """

    svg: Markup
    title: str
    note: str = ""
    is_wide: bool = False


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The room of a plot, in px.

    Attributes:
        width: Of all.
        height: Of all.
        left: Left of the axes.
        right: Right of them.
        top: Above them.
        bottom: Below them.
    """

    width: int = NARROW_PX
    height: int = 290
    left: int = 46
    right: int = 14
    top: int = 28
    bottom: int = 44

    @property
    def x(self) -> tuple[float, float]:
        """Where the x axis begins and ends."""
        return float(self.left), float(self.width - self.right)

    @property
    def y(self) -> tuple[float, float]:
        """Where the y axis begins, at the bottom, and ends."""
        return float(self.height - self.bottom), float(self.top)


def clean(value: object) -> str:
    """Return text on one line without characters that cannot be seen, cut if it is very long."""
    text = " ".join(str(value)[:MAX_CHARACTERS].split())
    return "".join(character for character in text if character.isprintable())


def element(name: str, content: Markup | str = "", **attributes: object) -> Markup:
    """Return an element; an attribute's trailing underscore is dropped, others become hyphens."""
    parts = [
        f' {key.rstrip("_").replace("_", "-")}="{_attribute(value)}"'
        for key, value in attributes.items()
        if value is not None
    ]
    # Escaped above and here: nothing that comes in stays markup unless it was.
    return Markup("<{}{}>{}</{}>").format(name, Markup("".join(parts)), content, name)  # noqa: S704


def text(x: float, y: float, content: object, **attributes: object) -> Markup:
    """Return a line of text."""
    return element("text", clean(content), x=x, y=y, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Return a straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def polyline(points: Iterable[tuple[float, float]], class_: str, key: str | None = None) -> Markup:
    """Return a line through points, of a trial if it has a key."""
    path = " ".join(f"{_number(x)},{_number(y)}" for x, y in points)
    return element("polyline", points=path, class_=class_, data_t=key)


def steps(points: Sequence[tuple[float, float]], end_x: float, class_: str) -> Markup:
    """Return a line that stays level until the next point."""
    path = [points[0]]
    for x, y in points[1:]:
        path += [(x, path[-1][1]), (x, y)]
    return polyline([*path, (end_x, path[-1][1])], class_)


def mark(
    x: float, y: float, class_: str, *, shape: int | str = 0, key: str | None = None
) -> Markup:
    """Return one of the page's symbols by its name: an index, small with an ``s``, ``x``, ``d``."""
    return element("use", href=f"#m{shape}", x=x, y=y, class_=class_, data_t=key)


def join(parts: Iterable[Markup]) -> Markup:
    """Return pieces one after the other."""
    return Markup("").join(parts)


def drawing(frame: Frame, parts: Iterable[Markup], label: str) -> Markup:
    """Return the whole SVG; ``label`` is what a screen reader says of it."""
    return element(
        "svg",
        join(parts),
        viewBox=f"0 0 {frame.width} {frame.height}",
        width=frame.width,
        height=frame.height,
        role="img",
        aria_label=clean(label),
    )


def axes(frame: Frame, x: Scale, y: Scale, x_title: str, y_title: str) -> Markup:
    """Return grid, ticks, and titles; the y axis's title stands above it, to be read level."""
    (left, right), bottom = frame.x, frame.y[0]
    parts = [line(left, y(at), right, y(at), "grid") for at, _ in y.ticks]
    parts += [text(left - 7, y(at) + 4, label, class_="tick end") for at, label in y.ticks]
    parts.append(line(left, bottom, right, bottom, "axis"))
    for at, label in x.ticks:
        parts.append(line(x(at), bottom, x(at), bottom + 4, "axis"))
        parts.append(text(x(at), bottom + 17, label, class_="tick mid"))
    parts.append(text(0, 12, y_title, class_="title"))
    if x_title:
        parts.append(text((left + right) / 2, frame.height - 6, x_title, class_="title mid"))
    return element("g", join(parts), aria_hidden="true")


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Move labels apart that would cover each other, in their order, about where they were."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for one, other in itertools.pairwise(order):
        moved[other] = max(moved[other], moved[one] + gap)
    shift = sum(moved) / max(1, len(moved)) - sum(places) / max(1, len(places))
    return [place - shift for place in moved]


def _attribute(value: object) -> str:
    return _number(value) if isinstance(value, float) else str(escape(value))


@functools.cache
def _number(value: float) -> str:
    # A tenth of a pixel; without it a report of a thousand trials is twice as long.
    return f"{value:.1f}".removesuffix(".0")
