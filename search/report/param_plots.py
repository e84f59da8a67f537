"""Plots of what params have to do with the metric."""

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from search.report.findings import Compared, Findings
from search.report.importance import Importance
from search.report.scales import Scale, number_of, of_domain, range_of
from search.report.search_plots import key_of, look_of, metric_scale
from search.report.svg import (
    NUM_TONES,
    WIDE_PX,
    Frame,
    Plot,
    axes,
    drawing,
    element,
    line,
    mark,
    polyline,
    text,
)
from search.space import Float

_NUM_LR_BINS = 6


def draw_parallel(findings: Findings, prefix: str) -> Plot:
    """Draw each trial as a line through its params, to its value at the right."""
    sweep, space = findings.sweep, findings.sweep.space
    frame = Frame(width=WIDE_PX, height=340, left=96, right=64, top=40, bottom=16)
    scales = [of_domain(domain, *frame.y) for domain in space.values()]
    metric = metric_scale(findings, frame.y)
    titles = [*space, sweep.metric]
    places = np.linspace(*frame.x, len(titles)).tolist()
    parts = []
    # The best last, so that they lie on top.
    for trial in reversed(findings.ranked):
        if trial.number not in findings.values:
            continue
        value = findings.values[trial.number]
        points = [
            (place, scale(number_of(space[name], getattr(trial.params, name)) + offset))
            for name, place, scale in zip(space, places, scales, strict=False)
            for offset in [_jitter(trial.number) * 0.5 * scale.step]
        ]
        tone = _tone(value, metric, sweep.mode)
        parts.append(
            polyline(
                [*points, (places[-1], metric(value))],
                f"thread s{tone}",
                key_of(prefix, trial.number),
            )
        )
    for title, place, scale in zip(titles, places, [*scales, metric], strict=True):
        parts.append(_upright(title, place, scale, frame))
    label = f"Parallel coordinates of {len(findings.values)} trials: {', '.join(titles)}."
    return Plot(
        drawing(frame, parts, label),
        "Params and value of every trial",
        "The more a line stands out from the page, the better the trial. Drag along an axis to "
        "keep the trials of a range, in all plots and in the table; a click beside it brings all "
        "back.",
        is_wide=True,
    )


def _upright(title: str, place: float, scale: Scale, frame: Frame) -> Markup:
    (bottom, top), is_last = frame.y, place > frame.width - frame.right - 1
    side, anchor = (8, "start") if is_last else (-8, "end")
    parts = [
        line(place, bottom, place, top, "axis"),
        text(place, 18, title.replace("_", " "), class_="title mid"),
    ]
    for at, label in scale.ticks:
        parts.append(line(place - 3, scale(at), place + 3, scale(at), "axis"))
        short_label = label if len(label) <= 12 else f"{label[:11]}…"
        parts.append(text(place + side, scale(at) + 4, short_label, class_=f"tick halo {anchor}"))
    # Where the page's script takes hold of an axis.
    grip = element(
        "rect", x=place - 18, y=top - 6, width=36, height=bottom - top + 12, class_="grip"
    )
    return element("g", Markup("").join([*parts, grip]), class_="upright", data_x=place)


def draw_slices(findings: Findings, prefix: str) -> list[Plot]:
    """Draw the best value of every trial against each param."""
    return [_slice(findings, prefix, name) for name in findings.sweep.space]


def _slice(findings: Findings, prefix: str, name: str) -> Plot:
    sweep, domain = findings.sweep, findings.sweep.space[name]
    frame = Frame(height=230, bottom=24)
    x, y = of_domain(domain, *frame.x), metric_scale(findings, frame.y)
    parts = [axes(frame, x, y, "", sweep.metric)]
    worst_px = frame.y[0] if sweep.mode == "max" else frame.y[1]
    for trial in reversed(findings.ranked):
        place = x(
            number_of(domain, getattr(trial.params, name)) + x.step * 0.5 * _jitter(trial.number)
        )
        key = key_of(prefix, trial.number)
        if trial.number in findings.values:
            shape, look = look_of(findings, trial)
            parts.append(mark(place, y(findings.values[trial.number]), look, shape=shape, key=key))
        elif trial.reason == "diverged":
            parts.append(mark(place, worst_px, "failed", shape="x", key=key))
    label = f"Best {sweep.metric} of each trial against {name}."
    return Plot(drawing(frame, parts, label), name.replace("_", " "))


def draw_map(findings: Findings, prefix: str, compared: Compared) -> list[Plot]:
    """Draw unfreezing depth against learning rate, a map for each backbone; none if not searched.

    Cells are medians at one epoch, where trials compare; a cell's best would be the better the more
    trials it has.
    """
    space = findings.sweep.space
    lr = space.get("lr")
    if "unfreeze_depth" not in space or not isinstance(lr, Float):
        return []
    # A range of one value has no darker end.
    low, high = range_of(compared.values.values() or [0.0], findings.sweep.mode)
    tone = Scale(low=low, high=high if high > low else low + 1, start=0, end=1, ticks=())
    return [
        _map(findings, prefix, compared, backbone, tone)
        for backbone in findings.sweep.backbones
        if any(t.params.backbone == backbone for t in findings.trials)
    ]


def _map(findings: Findings, prefix: str, compared: Compared, backbone: str, tone: Scale) -> Plot:
    space, mode = findings.sweep.space, findings.sweep.mode
    frame = Frame(height=290)
    x, y = of_domain(space["lr"], *frame.x), of_domain(space["unfreeze_depth"], *frame.y)
    trials = [
        trial
        for trial in findings.trials
        if trial.params.backbone == backbone and trial.number in compared.values
    ]
    cells = defaultdict(list)
    for trial in trials:
        share = (x(trial.params.lr) - x.start) / (x.end - x.start)
        column = min(int(share * _NUM_LR_BINS), _NUM_LR_BINS - 1)
        cells[column, trial.params.unfreeze_depth].append(trial)
    parts = [axes(frame, x, y, "lr", "unfreeze depth")]
    width, height = (frame.x[1] - frame.x[0]) / _NUM_LR_BINS, abs(y(1) - y(0))
    dots = []
    for (column, depth), members in cells.items():
        median = statistics.median(compared.values[trial.number] for trial in members)
        shade = _tone(median, tone, mode)
        left, top = frame.x[0] + column * width + 1, y(depth) - height / 2 + 1
        room = element(
            "rect", x=left, y=top, width=width - 2, height=height - 2, class_=f"q{shade}"
        )
        parts.append(room)
        told = f"{median:.2f}"
        parts.append(text(left + width - 6, top + 13, told, class_=f"cell end on{shade}"))
        for trial in members:
            at_y = y(depth) + height * (0.18 + 0.3 * _jitter(trial.number))
            key = key_of(prefix, trial.number)
            dot = "ds" if findings.is_crowded else "d"
            dots.append(mark(x(trial.params.lr), at_y, f"dot on{shade}", shape=dot, key=key))
    parts += dots
    label = (
        f"Median {findings.sweep.metric} at epoch {compared.epoch} by unfreezing depth and "
        f"learning rate, {backbone}, {len(trials)} trials."
    )
    return Plot(drawing(frame, parts, label), f"{backbone}, {len(trials)} trials")


def draw_importance(found: Sequence[tuple[Compared, Mapping[str, Importance]]]) -> Plot:
    """Draw each param's share with its interval, a row for each epoch at which trials compare.

    Args:
        found: The trials that were compared, and what came of it; at least one.
    """
    names = list(found[0][1])
    row_px = 19
    block_px = row_px * len(found) + 16
    frame = Frame(width=WIDE_PX, left=170, right=190, height=72 + block_px * len(names))
    x = Scale(low=0, high=1, start=frame.x[0], end=frame.x[1], ticks=tuple(
        (share, f"{share:.0%}") for share in (0, 0.25, 0.5, 0.75, 1)
    ))  # fmt: skip
    (left, right), (bottom, top) = frame.x, frame.y
    parts = [line(x(at), bottom, x(at), top - 4, "grid") for at, _ in x.ticks]
    parts += [text(x(at), bottom + 16, label, class_="tick mid") for at, label in x.ticks]
    parts.append(
        text((left + right) / 2, frame.height - 6, "share of the importance", class_="title mid")
    )
    parts.append(text(right + 14, top - 12, "share, and p by chance", class_="title"))
    for block, name in enumerate(names):
        start = top + block * block_px + 14
        parts.append(text(0, start + 4, name.replace("_", " "), class_="label"))
        for row, (compared, importances) in enumerate(found):
            one, at = importances[name], start + row * row_px
            told = " hollow" if one.p_value >= 0.05 else ""
            parts.append(text(left - 10, at + 4, f"epoch {compared.epoch}", class_="tick end"))
            parts.append(line(x(one.low), at, x(one.high), at, "whisker"))
            parts.append(mark(x(one.share), at, f"c0{told}", shape=row))
            parts.append(
                text(right + 14, at + 4, f"{one.share:.0%}, p = {one.p_value:.2f}", class_="tick")
            )
    said = "; ".join(
        f"{name} {one.share:.0%} ({one.low:.0%} to {one.high:.0%})"
        for name, one in found[0][1].items()
    )
    label = f"Importance at epoch {found[0][0].epoch}: {said}."
    return Plot(
        drawing(frame, parts, label),
        "How much each param tells the best trials from the others",
        is_wide=True,
    )


def _tone(value: float, scale: Scale, mode: str) -> int:
    """Return how dark a value is drawn, the best darkest."""
    share = (value - scale.low) / (scale.high - scale.low)
    share = min(max(share if mode == "max" else 1 - share, 0.0), 1.0)
    return min(int(share * NUM_TONES), NUM_TONES - 1)


def _jitter(number: int) -> float:
    """Return a fixed place within (-0.5, 0.5) for a trial, to tell it from others beside it."""
    # Multiples of the golden ratio lie evenly, however many there are.
    return math.modf(number * (math.sqrt(5) - 1) / 2)[0] - 0.5
