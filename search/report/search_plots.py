"""Plots of how a sweep went: the best so far, learning curves, and what the metric costs."""

from collections.abc import Mapping, Sequence

from markupsafe import Markup

from search.pareto import pareto_front
from search.report.findings import Findings, describe_state
from search.report.scales import Scale, linear, range_of, short, time_unit, whole
from search.report.svg import (
    NUM_SHAPES,
    WIDE_PX,
    Frame,
    Plot,
    axes,
    drawing,
    element,
    line,
    mark,
    polyline,
    spread,
    steps,
    text,
)
from search.study.recorded import Trial

# Curves that are drawn in colour, with their trial's number beside them.
_NUM_LABELLED = 5


def key_of(prefix: str, number: int) -> str:
    """Return what marks of one trial have in common; several sweeps on a page differ in prefix."""
    return f"{prefix}{number}"


def look_of(findings: Findings, trial: Trial) -> tuple[str, str]:
    """Return a trial's shape and classes: by its backbone, hollow unless it ran to the end."""
    backbone = findings.sweep.backbones.index(trial.params.backbone) % NUM_SHAPES
    small = "s" if findings.is_crowded else ""
    return f"{backbone}{small}", f"c{backbone}" + ("" if trial.state == "complete" else " hollow")


def metric_scale(findings: Findings, place: tuple[float, float]) -> Scale:
    """Return the axis of the trials' best values."""
    return linear(*range_of(findings.values.values(), findings.sweep.mode), *place)


def draw_history(findings: Findings, prefix: str) -> list[Plot]:
    """Draw the best so far against trials, and against time."""
    numbers = sorted(findings.values)
    by_number = [(float(number), number) for number in numbers]
    scale = whole(0, max(*numbers, 1), *Frame().x)
    plots = [_history(findings, prefix, by_number, scale, "trial", "Best so far, trial by trial")]
    ended = sorted((s, number) for number, s in findings.ended_s.items() if number in numbers)
    if ended:
        unit_s, unit = time_unit(ended[-1][0])
        by_time = [(seconds / unit_s, number) for seconds, number in ended]
        scale = linear(0, by_time[-1][0], *Frame().x)
        told = f"{unit} since the first trial began, pauses included"
        plots.append(_history(findings, prefix, by_time, scale, told, "Best so far, over time"))
    return plots


def _history(
    findings: Findings,
    prefix: str,
    places: Sequence[tuple[float, int]],
    x: Scale,
    x_title: str,
    title: str,
) -> Plot:
    frame = Frame()
    y = metric_scale(findings, frame.y)
    better = max if findings.sweep.mode == "max" else min
    parts = [axes(frame, x, y, x_title, findings.sweep.metric)]
    above_px, below_px = (-7, 15) if findings.sweep.mode == "max" else (15, -7)
    labels = []
    if 0 in findings.values:
        level = y(findings.values[0])
        parts.append(line(frame.x[0], level, frame.x[1], level, "dashed"))
        labels.append(text(frame.x[1], level + below_px, "baseline", class_="note end"))
    marks, best, so_far = [], [], None
    for place, number in places:
        value = findings.values[number]
        if so_far is None or better(value, so_far) != so_far:
            so_far = value
            best.append((x(place), y(value)))
            leader = number
        shape, look = look_of(findings, findings.trials[number])
        marks.append(mark(x(place), y(value), look, shape=shape, key=key_of(prefix, number)))
    labels.append(
        text(
            frame.x[1],
            best[-1][1] + above_px,
            f"{short(so_far or 0)}, trial {leader}",
            class_="strong end",
        )
    )
    # Over the marks, which they must not be lost under.
    parts += [steps(best, frame.x[1], "best"), *marks, *labels]
    versus = x_title.split(",")[0]
    label = (
        f"Best {findings.sweep.metric} so far against {versus}: {short(so_far or 0)} in the end."
    )
    return Plot(drawing(frame, parts, label), title)


def draw_curves(findings: Findings, prefix: str) -> Plot:
    """Draw the metric of every trial by epoch, where ASHA compared, and who was stopped there."""
    sweep, labelled = findings.sweep, findings.ranked[:_NUM_LABELLED]
    frame = Frame(width=WIDE_PX, height=400, right=150, top=52)
    curves = {
        trial.number: [
            (epoch.epoch, value)
            for epoch in trial.epochs
            if (value := epoch.metrics.get(sweep.metric)) is not None
        ]
        for trial in findings.trials
    }
    values = [value for curve in curves.values() for _, value in curve]
    y = linear(*range_of(values, sweep.mode), *frame.y, num_ticks=9)
    x = whole(1, sweep.training.max_epochs, *frame.x, max_ticks=20)
    parts = [axes(frame, x, y, "epoch", sweep.metric)]
    for row, compared in enumerate(findings.rungs[:-1]):
        at, above = x(compared.epoch), frame.y[1] - 9 - 14 * (row % 2)
        further = sum(len(trial.epochs) > compared.epoch for trial in findings.trials)
        parts.append(line(at, frame.y[0], at, above + 4, "dashed"))
        told = f"{len(compared.values)} compared, {further} went on"
        parts.append(text(at, above, told, class_="note mid"))
    ends: dict[int, tuple[float, float]] = {}
    for trial in reversed(findings.ranked):
        curve = [(x(epoch), y(value)) for epoch, value in curves[trial.number]]
        if not curve:
            continue
        shape, look = look_of(findings, trial)
        is_labelled = trial in labelled
        line_class = f"curve {look.split()[0]} lead" if is_labelled else "curve"
        parts.append(polyline(curve, line_class, key_of(prefix, trial.number)))
        if trial.state == "failed":
            parts.append(mark(*curve[-1], "failed", shape="x"))
        elif trial.state != "running":
            faint = "faint" if trial.state == "complete" else "faint hollow"
            parts.append(mark(*curve[-1], look if is_labelled else faint, shape=shape))
        if is_labelled:
            ends[trial.number] = curve[-1]
    for at in {end_x for end_x, _ in ends.values()}:
        numbers = [number for number, (end_x, _) in ends.items() if end_x == at]
        for number, place in zip(numbers, spread([ends[n][1] for n in numbers], 15), strict=True):
            trial = findings.trials[number]
            look = f"label halo {look_of(findings, trial)[1].split()[0]}"
            told = f"{number} {trial.params.backbone}"
            parts.append(text(at + 9, place + 4, told, class_=look, data_t=key_of(prefix, number)))
    states = ", ".join(f"{count} {state}" for state, count in findings.states.items())
    return Plot(
        drawing(frame, parts, f"{sweep.metric} by epoch of {len(curves)} trials: {states}."),
        "Learning curves",
        f"The best {len(labelled)} are in colour, with the trial's number. Hollow ends were "
        "stopped early, filled ones ran to the end, crosses diverged or failed.",
        is_wide=True,
    )


def draw_pareto(
    findings: Findings, prefix: str, costs: Mapping[int, float], cost_title: str
) -> Plot | None:
    """Draw the metric against what a trial costs, and the trials that none beats in both.

    Args:
        findings: The sweep's.
        prefix: Of the trials' keys.
        costs: By trial's number; less is better.
        cost_title: Names the cost, with its unit.

    Returns:
        None if no trial has both.
    """
    numbers = [number for number in findings.values if number in costs]
    if not numbers:
        return None
    frame = Frame()
    x = linear(0, max(costs[number] for number in numbers), *frame.x)
    y = metric_scale(findings, frame.y)
    front = pareto_front({n: (costs[n], findings.values[n]) for n in numbers}, findings.sweep.mode)
    places = {number: (x(costs[number]), y(findings.values[number])) for number in numbers}
    parts = [axes(frame, x, y, cost_title, findings.sweep.metric)]
    parts.append(steps([places[number] for number in front], frame.x[1], "best"))
    for number in numbers:
        shape, look = look_of(findings, findings.trials[number])
        parts.append(mark(*places[number], look, shape=shape, key=key_of(prefix, number)))
    labelled: list[tuple[float, float]] = []
    # The best first; what would cover a label has none.
    for at_x, at_y, number in reversed([(*places[number], number) for number in front]):
        if all(abs(at_x - x_px) > 30 or abs(at_y - y_px) > 14 for x_px, y_px in labelled):
            labelled.append((at_x, at_y))
            parts.append(text(at_x - 6, at_y - 7, str(number), class_="strong end"))
    told = ", ".join(f"trial {n}" for n in front)
    return Plot(
        drawing(
            frame, parts, f"{findings.sweep.metric} against {cost_title}; on the front: {told}."
        ),
        f"{findings.sweep.metric} against {cost_title.split(',')[0]}",
        "The line is the Pareto front: no trial is both cheaper and better than those on it.",
    )


def draw_key(findings: Findings) -> Markup:
    """Return what shapes and fillings mean, for a line above the plots."""
    entries = []
    for index, backbone in enumerate(findings.sweep.backbones):
        shape = index % NUM_SHAPES
        entries.append(_entry(shape, f"c{shape}", backbone))
    entries.append(_entry(0, "c9", "ran to the end"))
    entries.append(_entry(0, "c9 hollow", "stopped early, or running"))
    if any(describe_state(trial) == "diverged" for trial in findings.trials):
        entries.append(_entry("x", "failed", "diverged"))
    return Markup("").join(entries)


def _entry(shape: int | str, look: str, name: str) -> Markup:
    drawn = mark(7, 7, look, shape=shape)
    symbol = element("svg", drawn, viewBox="0 0 14 14", width=14, height=14, aria_hidden="true")
    return Markup("<span>{} {}</span>").format(symbol, name)
