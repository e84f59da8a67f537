"""What a data set says of a classifier: every figure with its interval, ready for JSON.

A figure is ``{"value", "low", "high"}``: its value on all images, and its 95 % interval over
resampled groups. None stands for what is not defined; for both ends also where there are fewer
than two groups (of a class: with images of it), which cannot show how groups differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_modules.bootstrap import Score, interval, paired_difference, resample
from lightning_modules.calibration import softmax
from lightning_modules.scores import (
    CALIBRATION,
    DECISION,
    PER_CLASS,
    confusion_matrix,
    reliability,
    score,
    score_calibration,
    score_decisions,
)

# The class that is looked for, and the one that it is told from.
PAIRS = (("malignant_tumor", "benign_tumor"), ("stroke", "no_stroke"))

# Not exclusive: who has no stroke may have no tumour either. Which one an image is called by says
# where it was collected.
NEGATIVES = ("no_tumor", "no_stroke")
MERGED = "normal"

Values = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a bundle says of some images.

    Attributes:
        classes: C names.
        logits: Shape ``(N, C)``.
        temperature: That logits are divided by.
        labels: Shape ``(N,)``, indices into the classes.
        groups: Shape ``(N,)``; may be patients' names.
        sources: Shape ``(N,)``.
    """

    classes: tuple[str, ...]
    logits: Values
    temperature: float
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_]
    sources: npt.NDArray[np.str_]

    def probabilities(self) -> Values:
        """Return calibrated probabilities, shape ``(N, C)``."""
        return softmax(self.logits, self.temperature)


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made.

    Attributes:
        num_resamples: Of the groups.
        seed: Of the draws.
    """

    num_resamples: int
    seed: int


def describe(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return all figures of a data set.

    The calibration of all classes is told before and after temperature scaling; everything else
    is of calibrated probabilities.
    """
    probabilities = predictions.probabilities()
    labels, groups = predictions.labels, predictions.groups
    raw = softmax(predictions.logits)
    before = _estimate(lambda times: score_calibration(raw, labels, times), groups, bootstrap)
    overall = _figures(probabilities, labels, groups, predictions.classes, bootstrap)
    several = overall["num_groups"] > 1
    after = {name: overall.pop(name) for name in CALIBRATION}
    return {
        **overall,
        "calibration": {
            "temperature": predictions.temperature,
            "before": {name: _figure(before[name], several) for name in CALIBRATION},
            "after": after,
            "reliability_before": reliability(raw, labels),
            "reliability_after": reliability(probabilities, labels),
        },
        "pairs": _pairs(predictions, bootstrap),
        "merged": _merged(predictions, bootstrap),
        "sources": {
            str(source): _brief(predictions, predictions.sources == source, bootstrap)
            for source in np.unique(predictions.sources)
        },
    }


def compare(ours: Predictions, theirs: Predictions, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return by how much macro-F1 and accuracy exceed those of another bundle on the same images.

    Args:
        ours: Of the bundle.
        theirs: Of the baseline; the same images in the same order, the same order of classes.
        bootstrap: How intervals are made.

    Returns:
        Of both figures the difference with its interval, and in which ``share_above_0`` of the
        resamples the bundle is strictly better.
    """
    here, there = _decisions(ours), _decisions(theirs)
    samples = paired_difference(
        here,
        there,
        ours.groups,
        num_resamples=bootstrap.num_resamples,
        seed=bootstrap.seed,
    )
    whole = np.ones((1, len(ours.labels)))
    several = len(np.unique(ours.groups)) > 1
    compared = {}
    for name in ("macro_f1", "accuracy"):
        value = here(whole)[name][0] - there(whole)[name][0]
        compared[name] = {
            **_figure((value, *interval(samples[name])), several),
            "share_above_0": float((samples[name] > 0).mean()) if several else None,
        }
    return compared


def _figures(
    probabilities: Values,
    labels: npt.NDArray[np.int64],
    groups: npt.NDArray[np.str_],
    classes: tuple[str, ...],
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    found = _estimate(lambda times: score(probabilities, labels, times), groups, bootstrap)
    num_groups = len(np.unique(groups))
    per_class = {}
    for index, name in enumerate(classes):
        groups_of_class = len(np.unique(groups[labels == index]))
        several = num_groups > 1 and groups_of_class != 1
        per_class[name] = {
            "num_images": int((labels == index).sum()),
            "num_groups": groups_of_class,
            **{key: _figure([part[index] for part in found[key]], several) for key in PER_CLASS},
        }
    return {
        "num_images": len(labels),
        "num_groups": num_groups,
        **{name: _figure(found[name], num_groups > 1) for name in (*DECISION, *CALIBRATION)},
        "per_class": per_class,
        "confusion": {
            "classes": list(classes),
            "counts": found["confusion"][0].astype(int).tolist(),
        },
    }


def _brief(
    predictions: Predictions, among: npt.NDArray[np.bool_], bootstrap: Bootstrap
) -> dict[str, Any]:
    """Return macro-F1 and accuracy of some images."""
    labels, groups = predictions.labels[among], predictions.groups[among]
    found = _estimate(_decisions(predictions, among), groups, bootstrap)
    num_groups = len(np.unique(groups))
    return {
        "num_images": len(labels),
        "num_groups": num_groups,
        "classes": [predictions.classes[index] for index in np.unique(labels)],
        **{name: _figure(found[name], num_groups > 1) for name in ("macro_f1", "accuracy")},
    }


def _decisions(predictions: Predictions, among: npt.NDArray[np.bool_] | None = None) -> Score:
    """Return what scores the decisions on some images, all if not told which."""
    rows = slice(None) if among is None else among
    logits, labels = predictions.logits[rows], predictions.labels[rows]
    return lambda times: score_decisions(confusion_matrix(logits, labels, times))


def _estimate(
    figures: Score, groups: npt.NDArray[np.str_], bootstrap: Bootstrap
) -> dict[str, tuple[Values, Values, Values]]:
    """Return every figure of all images, and both ends of its interval."""
    values = figures(np.ones((1, len(groups))))
    samples = resample(figures, groups, num_resamples=bootstrap.num_resamples, seed=bootstrap.seed)
    return {name: (values[name][0], *interval(samples[name])) for name in values}


def _pairs(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return the figures of two classes told apart, on their images and probabilities alone."""
    found = {}
    for pair in PAIRS:
        if not set(pair) <= set(predictions.classes):
            continue
        indices = [predictions.classes.index(name) for name in pair]
        among = np.isin(predictions.labels, indices)
        if among.any():
            found["/".join(pair)] = _figures(
                # Of the pair's logits: the same as dividing both probabilities by their sum.
                softmax(predictions.logits[among][:, indices], predictions.temperature),
                (predictions.labels[among] == indices[1]).astype(np.int64),
                predictions.groups[among],
                pair,
                bootstrap,
            )
    return found


def _merged(predictions: Predictions, bootstrap: Bootstrap) -> dict[str, Any] | None:
    """Return the figures with both negatives as one class; None if there are not both."""
    if not set(NEGATIVES) <= set(predictions.classes):
        return None
    names = tuple(MERGED if name in NEGATIVES else name for name in predictions.classes)
    classes = tuple(dict.fromkeys(names))
    column_of = np.array([classes.index(name) for name in names])
    return _figures(
        predictions.probabilities() @ np.eye(len(classes))[column_of],
        column_of[predictions.labels],
        predictions.groups,
        classes,
        bootstrap,
    )


def _figure(estimate: Sequence[Any], several: bool) -> dict[str, float | None]:
    value, low, high = (None if np.isnan(part) else float(part) for part in estimate)
    return {"value": value, "low": low if several else None, "high": high if several else None}
