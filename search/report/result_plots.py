"""Plots of what came of a sweep: its confirmation, a bundle's calibration, sweeps side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from search.report.findings import Findings
from search.report.scales import Scale, linear, short, time_unit
from search.report.search_plots import key_of
from search.report.svg import (
    Frame,
    Plot,
    axes,
    drawing,
    line,
    mark,
    spread,
    steps,
    text,
)


def draw_confirmation(findings: Findings, prefix: str) -> Plot:
    """Draw each candidate's mean and interval over fresh seeds, beside what the search had said."""
    confirmation = findings.facts["confirmation"]
    candidates = confirmation["candidates"]
    frame = Frame(height=84 + 42 * len(candidates), left=120)
    ends = [
        value
        for row in candidates
        for value in (*row["values"], row["low"], row["high"], findings.values.get(row["number"]))
        if value is not None
    ]
    x = linear(min(ends), max(ends), *frame.x)
    (bottom, top), (left, right) = frame.y, frame.x
    parts = [line(x(at), bottom, x(at), top, "grid") for at, _ in x.ticks]
    parts += [text(x(at), bottom + 17, label, class_="tick mid") for at, label in x.ticks]
    title = f"{confirmation['metric']}, {confirmation['num_seeds']} fresh seeds"
    parts.append(text((left + right) / 2, frame.height - 6, title, class_="title mid"))
    for index, row in enumerate(candidates):
        at, number = top + 26 + 42 * index, row["number"]
        key = key_of(prefix, number)
        name = f"trial {number}" + (", baseline" if number == 0 else "")
        parts.append(text(0, at + 4, name, class_="label", data_t=key))
        if row["low"] is not None:
            parts.append(line(x(row["low"]), at, x(row["high"]), at, "whisker"))
        parts += [line(x(v), at - 7, x(v), at + 7, "tally") for v in row["values"]]
        parts.append(mark(x(row["mean"]), at, "c0", key=key))
        if number in findings.values:
            parts.append(mark(x(findings.values[number]), at, "c1 hollow", shape=3))
    said = "; ".join(f"trial {row['number']} {short(row['mean'])}" for row in candidates)
    return Plot(
        drawing(frame, parts, f"Means over fresh seeds: {said}."),
        "The best again, with fresh seeds",
        "Dots are means with 95 % intervals, ticks single seeds. Diamonds are what the search had "
        "reported: the value that a trial was picked by is too good on average.",
    )


def draw_reliability(calibration: Mapping[str, Any]) -> list[Plot]:
    """Draw accuracy against confidence, before and after temperature scaling."""
    plots = []
    for when in ("before", "after"):
        bins = [found for found in calibration.get(f"reliability_{when}") or () if _is_bin(found)]
        if not bins:
            continue
        frame = Frame(height=330)
        x = _unit(frame.x)
        y = _unit(frame.y)
        parts = [axes(frame, x, y, "confidence", "accuracy")]
        parts.append(line(x(0), y(0), x(1), y(1), "dashed"))
        most = max(found["num_images"] for found in bins)
        for found in bins:
            at = x(found["confidence"])
            parts.append(line(at, y(found["confidence"]), at, y(found["accuracy"]), "whisker"))
            # Filled bins hold a tenth of the largest or more: a far-off bin of two is no scandal.
            look = "c0" if found["num_images"] * 10 >= most else "c0 hollow"
            parts.append(mark(at, y(found["accuracy"]), look))
        title = f"{when} temperature scaling"
        plots.append(
            Plot(
                drawing(frame, parts, f"Accuracy against confidence, {title}."),
                title.capitalize(),
                "Hollow dots are bins of few images.",
            )
        )
    return plots


def draw_comparison(sweeps: Sequence[Findings]) -> list[Plot]:
    """Draw the best so far of several sweeps, against epochs trained and against time."""
    plots = []
    last_s = max((s for findings in sweeps for s in findings.ended_s.values()), default=0.0)
    unit_s, unit = time_unit(last_s)
    for title in ("epochs trained", f"{unit} since the first trial began"):
        frame = Frame(height=320, right=110)
        curves = [_best_so_far(f, None if title == "epochs trained" else unit_s) for f in sweeps]
        drawn = [curve for curve in curves if curve]
        if not drawn:
            return []
        y_values = [value for curve in drawn for _, value in curve]
        x = linear(0, max(curve[-1][0] for curve in drawn), *frame.x)
        y = linear(min(y_values), max(y_values), *frame.y)
        parts = [axes(frame, x, y, title, sweeps[0].sweep.metric)]
        ends = [y(curve[-1][1]) if curve else 0.0 for curve in curves]
        for index, (findings, curve, place) in enumerate(
            zip(sweeps, curves, spread(ends, 15), strict=True)
        ):
            if not curve:
                continue
            look = index % 6
            points = [(x(at), y(value)) for at, value in curve]
            parts.append(steps(points, points[-1][0], f"best c{look} dash{index % 3}"))
            name = findings.sweep.name
            name = name if len(name) <= 14 else f"{name[:13]}…"
            parts.append(text(points[-1][0] + 6, place + 4, name, class_=f"label halo c{look}"))
        said = ", ".join(findings.sweep.name for findings in sweeps)
        label = f"Best {sweeps[0].sweep.metric} so far against {title}: {said}."
        plots.append(
            Plot(
                drawing(frame, parts, label),
                "Best so far, by epochs" if title == "epochs trained" else "Best so far, over time",
            )
        )
    return plots


def _best_so_far(findings: Findings, unit_s: float | None) -> list[tuple[float, float]]:
    """Return the best value after each trial that ended, against epochs or against time."""
    better = max if findings.sweep.mode == "max" else min
    curve: list[tuple[float, float]] = []
    num_epochs = 0
    for number, second in sorted(findings.ended_s.items(), key=lambda item: item[1]):
        num_epochs += len(findings.trials[number].epochs)
        found = [value for _, value in curve[-1:]]
        found += [findings.values[number]] if number in findings.values else []
        if found:
            curve.append((num_epochs if unit_s is None else second / unit_s, better(found)))
    return curve


def _unit(place: tuple[float, float]) -> Scale:
    ticks = tuple((tenth / 10, f"{tenth / 10:.1f}") for tenth in range(0, 11, 2))
    return Scale(low=0, high=1, start=place[0], end=place[1], ticks=ticks)


def _is_bin(found: Any) -> bool:
    return isinstance(found, dict) and all(
        isinstance(found.get(name), int | float)
        for name in ("confidence", "accuracy", "num_images")
    )
