"""Plots of an evaluation, as PNG: confusion matrices, reliability diagrams, ROC curves.

They show figures only: no image, no group, no path.
"""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from lightning_modules.scores import NUM_BINS
from search.evaluation.scores import Predictions

_DPI = 120
_MAX_NAME_CHARACTERS = 24


def draw_evaluation(
    evaluation: Mapping[str, Any], predictions: Mapping[str, Predictions]
) -> dict[str, bytes]:
    """Return all plots by their file names.

    Args:
        evaluation: As of `evaluate_bundle`.
        predictions: Of the internal set under ``""``, and of the external one, if there is one,
            under ``"external_"``: what their file names begin with.
    """
    plots = {}
    for prefix, of_set in predictions.items():
        figures = evaluation["external" if prefix else "internal"]
        plots[f"{prefix}confusion.png"] = _draw_confusion(figures["confusion"])
        plots[f"{prefix}reliability.png"] = _draw_reliability(figures["calibration"])
        plots[f"{prefix}roc.png"] = _draw_roc(of_set, figures["per_class"])
    return plots


def _draw_confusion(confusion: Mapping[str, Any]) -> bytes:
    """Draw counts, and the share of each true class, side by side."""
    counts = np.asarray(confusion["counts"])
    names = [_label(name) for name in confusion["classes"]]
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    side_inch = 2.2 + 0.6 * len(names)
    figure = Figure(figsize=(2 * side_inch, side_inch), dpi=_DPI, layout="constrained")
    for axes, cells, title in zip(
        figure.subplots(1, 2),
        (counts.astype(str), np.char.mod("%.2f", share)),
        ("images", "share of the true class"),
        strict=True,
    ):
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for row, column in np.ndindex(counts.shape):
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, cells[row, column], ha="center", va="center", color=color)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(title=title, xlabel="predicted", ylabel="true")
    return _png(figure)


def _draw_reliability(calibration: Mapping[str, Any]) -> bytes:
    """Draw accuracy over confidence before and after temperature scaling."""
    figure = Figure(figsize=(9, 4.6), dpi=_DPI, layout="constrained")
    for axes, when in zip(figure.subplots(1, 2), ("before", "after"), strict=True):
        bins = calibration[f"reliability_{when}"]
        confidence = np.array([part["confidence"] for part in bins])
        accuracy = np.array([part["accuracy"] for part in bins])
        num_images = np.array([part["num_images"] for part in bins])
        axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
        axes.vlines(confidence, confidence, accuracy, color="tab:red", linewidth=1)
        # The area is the share of images: a far-off bin of two images is no scandal.
        axes.scatter(confidence, accuracy, s=10 + 400 * num_images / num_images.sum(), alpha=0.7)
        ece = calibration[when]["ece"]["value"]
        temperature = calibration["temperature"] if when == "after" else 1.0
        axes.set(
            title=f"{when}: temperature {temperature:.2f}, ECE {ece:.3f}",
            xlabel=f"confidence, {NUM_BINS} bins",
            ylabel="accuracy",
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
        )
    return _png(figure)


def _draw_roc(predictions: Predictions, per_class: Mapping[str, Any]) -> bytes:
    """Draw each class against the rest; leave classes out that have no images, or all."""
    figure = Figure(figsize=(5.6, 5.6), dpi=_DPI, layout="constrained")
    axes: Axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    probabilities = predictions.probabilities()
    for index, name in enumerate(predictions.classes):
        area = per_class[name]["roc_auc"]["value"]
        if area is not None:
            of_class = predictions.labels == index
            wrong, right, _ = roc_curve(of_class, probabilities[:, index])
            axes.plot(wrong, right, label=f"{_label(name)}, AUC {area:.3f}")
    axes.set(
        title="one class against the rest",
        xlabel="1 - specificity",
        ylabel="sensitivity",
        xlim=(-0.01, 1.01),
        ylim=(-0.01, 1.01),
    )
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    return _png(figure)


def _label(name: str) -> str:
    """Return a class name as matplotlib should show it: short, and no formula."""
    short = name if len(name) <= _MAX_NAME_CHARACTERS else f"{name[: _MAX_NAME_CHARACTERS - 1]}…"
    return short.replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
