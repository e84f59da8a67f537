"""An evaluation as it is printed."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.scores import CALIBRATION, DECISION, PER_CLASS
from search.evaluation.scores import MERGED, NEGATIVES

_NAMES = {
    "macro_f1": "macro-F1",
    "balanced_accuracy": "balanced accuracy",
    "accuracy": "accuracy",
    "mcc": "MCC",
    "ece": "ECE",
    "nll": "NLL",
    "brier": "Brier",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "ppv": "PPV",
    "npv": "NPV",
    "f1": "F1",
    "roc_auc": "ROC-AUC",
    "pr_auc": "PR-AUC",
}


def print_evaluation(console: Console, evaluation: Mapping[str, Any]) -> None:
    """Print an evaluation as tables, what is to be known before believing it first.

    Args:
        console: Where to.
        evaluation: As of `evaluate_bundle`, or read from its ``evaluation.json``.
    """
    for line in _remarks(evaluation):
        console.print(line, markup=False, soft_wrap=True)
    internal, external = evaluation["internal"], evaluation["external"]
    columns = {"test": internal}
    if external is not None:
        columns["external"] = external
    if evaluation["baseline"] is not None:
        columns["baseline, test"] = evaluation["baseline"]
    console.print(_headline(columns))
    console.print(_calibration(columns))
    for name, figures in columns.items():
        if figures is not evaluation["baseline"]:  # its classes one by one are in the JSON
            _print_classes(console, name, figures)
        if figures["pairs"] or figures["merged"]:
            console.print(_tasks(name, figures))
    console.print(_sources(columns))
    if evaluation["baseline"] is not None:
        console.print(_difference(evaluation["baseline"]["difference"]))
    console.print(_robustness(evaluation["robustness"]))


def _remarks(evaluation: Mapping[str, Any]) -> Iterable[str]:
    internal, run, data = evaluation["internal"], evaluation["run"], evaluation["data"]
    intervals = evaluation["intervals"]
    yield (
        f"test: {internal['num_images']} images of {internal['num_groups']} groups; in brackets "
        f"95 % intervals over {intervals['num_resamples']} resamples of the groups"
    )
    if internal["num_groups"] == internal["num_images"]:
        yield (
            "note: every image is a group of its own; if patients have several, intervals are "
            "too narrow and rows may leak"
        )
    if data["num_skipped"]:
        yield f"note: {data['num_skipped']} test images could not be decoded and were left out"
    if data["leakage"]:
        yield (
            "note: the sweep was launched although copies of pictures lie in two splits: every "
            "figure flatters"
        )
    external = evaluation["external"]
    if external is not None and external["num_groups_named_alike"]:
        yield (
            f"note: {external['num_groups_named_alike']} of the external set's "
            f"{external['num_groups']} groups are named as groups of the bundle's own data: if "
            "they are the same patients, it is not external"
        )
    if run["on_these_images"] > 1:
        yield (
            f"note: evaluation {run['on_these_images']} on these test images, by this bundle or "
            f"another of its sweep, the first was on {run['earlier'][0]}: whatever was changed or "
            "chosen since was tuned on them"
        )
    elif run["of_this_bundle"] > 1:
        yield f"note: evaluation {run['of_this_bundle']} of this bundle, the first on these images"


def _headline(columns: Mapping[str, Any]) -> Table:
    table = _table("headline", "", *columns)
    table.add_row("images", *(str(figures["num_images"]) for figures in columns.values()))
    table.add_row("groups", *(str(figures["num_groups"]) for figures in columns.values()))
    for name in DECISION:
        table.add_row(_NAMES[name], *(_cell(figures[name]) for figures in columns.values()))
    return table


def _calibration(columns: Mapping[str, Any]) -> Table:
    table = _table("calibration, before and after temperature scaling", "", *columns)
    calibrations = [figures["calibration"] for figures in columns.values()]
    table.add_row("temperature", *(f"{part['temperature']:.3f}" for part in calibrations))
    for name in CALIBRATION:
        for when in ("before", "after"):
            table.add_row(f"{_NAMES[name]} {when}", *(_cell(p[when][name]) for p in calibrations))
    return table


def _print_classes(console: Console, name: str, figures: Mapping[str, Any]) -> None:
    # Two tables: all columns in one would not fit a terminal.
    per_class, confusion = figures["per_class"], figures["confusion"]
    estimated = ("sensitivity", "f1")
    table = _table(
        f"{name}: each class against the rest",
        "class",
        "images",
        "groups",
        *(_NAMES[key] for key in estimated),
    )
    for label, of_class in per_class.items():
        counts = (str(of_class["num_images"]), str(of_class["num_groups"]))
        table.add_row(Text(label), *counts, *(_cell(of_class[key]) for key in estimated))
    console.print(table)
    others = [key for key in PER_CLASS if key not in estimated]
    table = _table("", "class", *(_NAMES[key] for key in others))
    for label, of_class in per_class.items():
        table.add_row(Text(label), *(_cell({**of_class[key], "low": None}) for key in others))
    console.print(table)
    table = _table(f"{name}: images, true class down", "", *map(Text, confusion["classes"]))
    for label, row in zip(confusion["classes"], confusion["counts"], strict=True):
        table.add_row(Text(label), *map(str, row))
    console.print(table)


def _tasks(name: str, figures: Mapping[str, Any]) -> Table:
    """Lay out pairs, with the ROC-AUC of the first class, and the merged classes."""
    table = _table(f"{name}: tasks apart", "task", "images", "macro-F1", "ROC-AUC")
    for pair, of_pair in figures["pairs"].items():
        sought, other = pair.split("/")
        area = of_pair["per_class"][sought]["roc_auc"]
        cells = (str(of_pair["num_images"]), _cell(of_pair["macro_f1"]), _cell(area))
        table.add_row(f"{sought} against {other}", *cells)
    if (merged := figures["merged"]) is not None:
        cells = (str(merged["num_images"]), _cell(merged["macro_f1"]), "")
        table.add_row(f"{' and '.join(NEGATIVES)} as {MERGED}", *cells)
    return table


def _sources(columns: Mapping[str, Any]) -> Table:
    table = _table("by source", "source", "images", "groups", "classes", "macro-F1", "accuracy")
    for name, of_set in columns.items():
        for source, figures in of_set["sources"].items():
            table.add_row(
                Text(f"{name}: {source}"),
                str(figures["num_images"]),
                str(figures["num_groups"]),
                str(len(figures["classes"])),
                _cell(figures["macro_f1"]),
                _cell(figures["accuracy"]),
            )
    return table


def _difference(difference: Mapping[str, Any]) -> Table:
    table = _table("above the baseline, same resamples", "", "difference", "better in")
    for name, figure in difference.items():
        share = figure["share_above_0"]
        told = "-" if share is None else f"{100 * share:.1f} % of resamples"
        table.add_row(_NAMES[name], _cell(figure), told)
    return table


def _robustness(robustness: Mapping[str, Any]) -> Table:
    table = _table(
        f"macro-F1 of {robustness['num_images']} corrupted images; uncorrupted "
        f"{robustness['uncorrupted']:.3f}",
        "corruption",
        *("weak", "middle", "strong"),
    )
    rows: dict[str, list[str]] = {}
    for case in robustness["corrupted"]:
        cells = rows.setdefault(case["kind"], [])
        cells.append(f"{case['macro_f1']:.3f} at {case['strength']:g}")
    for kind, cells in rows.items():
        table.add_row(kind, *cells)
    return table


def _table(title: str, *columns: str | Text) -> Table:
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for index, column in enumerate(columns):
        # Names may be folded, figures may not.
        table.add_column(
            column, justify="right" if index else "left", overflow="fold", no_wrap=index > 0
        )
    return table


def _cell(figure: Mapping[str, float | None]) -> str:
    value, low, high = figure["value"], figure["low"], figure["high"]
    if value is None:
        return "-"
    if low is None or high is None:
        return f"{value:.3f}"
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"
