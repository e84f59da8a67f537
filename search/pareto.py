"""The best that can be had at each cost: trials that none beats in both metric and cost."""

import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.data.pack import default_cache_dir
from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from search.results import rank, score
from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import Sweep


@dataclass(frozen=True, kw_only=True)
class Point:
    """A trial's place between metric and cost.

    Attributes:
        trial: Which.
        value: Its best epoch's metric.
        latency_ms: Of one image on one CPU thread.
        size_mib: Of the exported model.
        on_front: Whether no other trial is better and costs no more, or costs less and is as good.
    """

    trial: Trial
    value: float
    latency_ms: float
    size_mib: float
    on_front: bool


def costs_of(record: Record) -> dict[str, dict[str, float]]:
    """Return what each backbone costs: as recorded at launch, or else as measured on this machine.

    ``latency_ms`` and ``size_mib`` by backbone. It is the exported classifier's cost, which is not
    a matter of weights.
    """
    recorded: dict[str, dict[str, float]] = record.facts.get("costs") or {}
    if recorded:
        return recorded
    from lightning_modules.network_cost import measure_costs

    sweep = record.sweep
    costs = measure_costs(
        sweep.backbones,
        num_classes=len(record.facts["classes"]),
        image_size_px=sweep.data.image_size_px,
        cache_dir=default_cache_dir(),
    )
    return {backbone: dataclasses.asdict(cost) for backbone, cost in costs.items()}


def place(
    trials: Sequence[Trial], sweep: Sweep, costs: Mapping[str, Mapping[str, float]]
) -> list[Point]:
    """Return every trial that has a value, best first, and which of them are on the front.

    Args:
        trials: In any order.
        sweep: Its metric; and its cost, which is latency unless ``objectives`` says otherwise.
        costs: By backbone.
    """
    cost = sweep.cost or "latency_ms"
    ranked = [trial for trial in rank(list(trials), sweep) if score(trial, sweep) > -math.inf]
    values = {trial.number: score(trial, sweep) for trial in ranked}
    on_front = pareto_front(
        {t.number: (costs[t.params.backbone][cost], values[t.number]) for t in ranked}, "max"
    )
    return [
        Point(
            trial=trial,
            value=values[trial.number] if sweep.mode == "max" else -values[trial.number],
            latency_ms=costs[trial.params.backbone]["latency_ms"],
            size_mib=costs[trial.params.backbone]["size_mib"],
            on_front=trial.number in on_front,
        )
        for trial in ranked
    ]


def pareto_front(found: Mapping[int, tuple[float, float]], mode: str) -> list[int]:
    """Return which trials no other beats in both cost and value, the cheapest first.

    Args:
        found: Cost and value by number.
        mode: ``max`` or ``min``: which values are better; less cost is.
    """
    sign = 1 if mode == "max" else -1
    front: list[int] = []
    best = None
    for number, (_, value) in sorted(
        found.items(), key=lambda item: (item[1][0], -sign * item[1][1], item[0])
    ):
        if best is None or sign * value > best:
            best = sign * value
            front.append(number)
    return front


def front(record: Record) -> list[Point]:
    """Return the trials of a sweep that none beats in both metric and cost, best metric first.

    Raises:
        InputError: If no trial has a value yet.
    """
    return [point for point in _points(record) if point.on_front]


def print_front(console: Console, record: Record) -> None:
    """Print the front, best metric first.

    Raises:
        InputError: If no trial has a value yet.
    """
    sweep = record.sweep
    points = _points(record)
    table = Table(
        title=f"{sweep.name}: none of {len(points)} trials is better and costs no more",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for header in ("trial", "backbone", sweep.metric, "latency", "size", "unfreeze depth"):
        table.add_column(header)
    for point in points:
        if point.on_front:
            table.add_row(
                f"{point.trial.number:05d}",
                point.trial.params.backbone,
                f"{point.value:.4f}",
                f"{point.latency_ms:.1f} ms",
                f"{point.size_mib:.1f} MiB",
                str(point.trial.params.unfreeze_depth),
            )
    console.print(table)
    console.print("latency: one image, one CPU thread, float32; size: of the ONNX file")


def draw_front(record: Record, out: Path) -> None:
    """Draw all trials between metric and cost, the front connected, as PNG.

    Raises:
        InputError: If no trial has a value yet, or the file cannot be written.
    """
    # Here: a table should not wait for matplotlib.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    sweep = record.sweep
    points = _points(record)
    cost = sweep.cost or "latency_ms"
    figure = Figure(figsize=(6.4, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.scatter(
        [getattr(point, cost) for point in points],
        [point.value for point in points],
        s=18,
        color="0.6",
        label="trials",
    )
    best = sorted((p for p in points if p.on_front), key=lambda point: getattr(point, cost))
    costs, values = [getattr(p, cost) for p in best], [p.value for p in best]
    axes.step(costs, values, where="post", color="tab:blue", linewidth=1.2)
    axes.scatter(costs, values, s=36, color="tab:blue", label="none is better and costs no more")
    for point in best:
        axes.annotate(
            f"{point.trial.number:05d}: {point.value:.3f}",
            (getattr(point, cost), point.value),
            xytext=(0, 7),
            textcoords="offset points",
            ha="center",
        )
    unit, label = {
        "latency_ms": ("ms", "latency of one image on one CPU thread"),
        "size_mib": ("MiB", "size of the ONNX file"),
    }[cost]
    ticks = {getattr(p, cost): p.trial.params.backbone for p in points}
    axes.set(xscale="log", xlabel=label, ylabel=sweep.metric)
    axes.set_xticks(list(ticks), [f"{name}\n{at:.3g} {unit}" for at, name in ticks.items()])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.25, y=0.15)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    if sweep.mode == "min":
        axes.invert_yaxis()
    if out.suffix.lower() != ".png":
        raise InputError(f"--plot must be a file that ends in .png; got {out.name}: rename it")
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    try:
        write_atomically(out, buffer.getvalue())
    except OSError as error:
        raise InputError(
            f"--plot must be a file that can be written; {out}: {error.strerror}"
        ) from error


def _points(record: Record) -> list[Point]:
    sweep = record.sweep
    points = place(record.trials(), sweep, costs_of(record))
    if not points:
        raise InputError(f"a front needs a trial with a result; no epoch of {sweep.name} has ended")
    return points
