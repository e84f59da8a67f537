"""Tables of what a bundle's files say: untrusted, so that whatever is no number is not shown."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from search.card.markdown import mapping, number
from search.report.bundles import BundleFindings
from search.report.tables import Table

MAX_FIGURES = 400
_MAX_DEPTH = 8
_ABBREVIATIONS = {"ece", "nll", "mcc", "ppv", "npv", "roc", "auc", "pr", "f1"}


def describe_evaluation(bundle: BundleFindings) -> Table:
    """Return every number of the last full evaluation with its interval; lists are left out."""
    found = {name: mapping(bundle.evaluation, name) for name in ("internal", "external")}
    return _figures({**found, "robustness": _robustness(mapping(bundle.evaluation, "robustness"))})


def describe_explanation(bundle: BundleFindings) -> Table:
    """Return how maps did in their tests."""
    names = ("tests", "pointing_game")
    return _figures({name: mapping(bundle.explanation, name) for name in names})


def describe_bundle(bundle: BundleFindings) -> Table:
    """Return what a bundle is, and how its test images were looked at."""
    config, trial = bundle.config, bundle.trial
    made = f"trial {trial.get('number')} of {trial.get('sweep')}, epoch {trial.get('epoch')}"
    if bundle.num_members:
        made = f"{bundle.num_members} trials of {trial.get('sweep')}, mixed"
    rows = [["made of", made]]
    if not bundle.num_members:
        rows.append(["backbone", str(config.get("backbone"))])
    calibration = mapping(config, "calibration")
    rows.append(
        [
            "temperature",
            f"{number(config.get('temperature'))}, fitted on "
            f"{number(calibration.get('num_images'))} validation images (mean negative "
            f"log-likelihood {number(calibration.get('nll_before'))} to "
            f"{number(calibration.get('nll_after'))})",
        ]
    )
    for entry in bundle.log:
        run = entry.get("run")
        looked = "the first look" if run in (None, 1) else f"look {run}, which is no first one,"
        told = f"{looked} at these test images, as {entry.get('as')}"
        rows.append([str(entry.get("date"))[:16].replace("T", " "), told])
    return Table(("", ""), rows)


def headline_of(bundle: BundleFindings) -> Table:
    """Return the figures of the whole test set; of the last full evaluation, else of the log."""
    found = mapping(bundle.evaluation, "internal")
    if not found and bundle.log:
        found = mapping(bundle.log[0], "figures")
    columns = {"test": found}
    for name in ("external", "baseline"):
        if other := mapping(bundle.evaluation, name):
            columns[name if name == "external" else "baseline, test"] = other
    rows = [
        [name, *(number(of.get(f"num_{name}")) for of in columns.values())]
        for name in ("images", "groups")
    ]
    for name in ("macro_f1", "balanced_accuracy", "accuracy", "mcc"):
        rows.append([_named(name), *(_estimate(mapping(of, name)) for of in columns.values())])
    return Table(["", *columns], rows if found else [])


def confusion_of(bundle: BundleFindings) -> tuple[list[str], list[list[tuple[str, int]]]]:
    """Return classes, and for each true class the images and a shade of 0 to 6 for its share."""
    confusion = mapping(mapping(bundle.evaluation, "internal"), "confusion")
    classes, counts = confusion.get("classes"), confusion.get("counts")
    if not isinstance(classes, list) or not isinstance(counts, list):
        return [], []
    rows = []
    for row in counts:
        if not isinstance(row, list) or not all(isinstance(cell, int) for cell in row):
            return [], []
        total = max(sum(row), 1)
        rows.append([(str(cell), min(6, round(6 * max(cell, 0) / total))) for cell in row])
    return [str(name) for name in classes], rows if len(rows) == len(classes) else []


def _figures(found: Mapping[str, Any]) -> Table:
    rows = [row for row, _ in zip(_walk(found, ()), range(MAX_FIGURES), strict=False)]
    return Table(("figure", "value", "95 % interval"), rows)


def _walk(found: Any, names: tuple[str, ...]) -> Iterator[list[str]]:
    name = ", ".join(map(_named, names))
    if isinstance(found, int | float) and not isinstance(found, bool):
        yield [name, number(found), ""]
    elif isinstance(found, dict) and "value" in found:
        has_interval = None not in (found.get("low"), found.get("high"))
        between = f"{number(found.get('low'))} to {number(found.get('high'))}"
        yield [name, number(found["value"]), between if has_interval else ""]
    elif isinstance(found, dict) and len(names) < _MAX_DEPTH:
        for key, value in found.items():
            yield from _walk(value, (*names, str(key)))


def _named(name: str) -> str:
    if name == "macro_f1":
        return "macro-F1"
    words = re.split("[_ ]", name)
    return " ".join(word.upper() if word in _ABBREVIATIONS else word for word in words)


def _estimate(found: Mapping[str, Any]) -> str:
    if None in (found.get("low"), found.get("high")):
        return number(found.get("value"))
    low, value, high = (found.get(name) for name in ("low", "value", "high"))
    if not all(isinstance(end, int | float) for end in (low, value, high)):
        return number(value)
    return f"{value:.3f} [{low:.2f}, {high:.2f}]"


def _robustness(found: Mapping[str, Any]) -> dict[str, Any]:
    """Name each corruption by its kind and strength, so that it can be listed."""
    cases = found.get("corrupted")
    return {
        "uncorrupted": found.get("uncorrupted"),
        **{
            f"{case.get('kind')} {case.get('strength')}": {"macro_f1": case.get("macro_f1")}
            for case in (cases if isinstance(cases, list) else [])
            if isinstance(case, dict)
        },
    }
