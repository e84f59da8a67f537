"""A bundle that is evaluated: opened, and asked for the logits of images."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_modules.bundle import Bundle, load_bundle
from lightning_modules.corruptions import STRENGTHS, corrupt
from lightning_modules.errors import InputError
from lightning_modules.scores import confusion_matrix, score_decisions
from lightning_modules.seeds import derive_seed
from search.evaluation.data import ImageSet, Progress
from search.evaluation.log import read_log
from search.evaluation.scores import Predictions

# Twelve corruptions of each: more would take longer than everything else.
MAX_CORRUPTED_IMAGES = 1000

# Images classified between two calls of the progress callback.
_CHUNK = 64


@dataclass(frozen=True)
class Model:
    """A bundle, with what is evaluated of it.

    Attributes:
        folder: The bundle's.
        bundle: Open.
    """

    folder: Path
    bundle: Bundle

    @property
    def digest(self) -> str:
        """Sha256 of ``model.onnx``, as it was checked when the bundle was opened."""
        return str(self.bundle.config["digests"]["model.onnx"])

    def identity(self) -> dict[str, Any]:
        """Return what tells this model from others."""
        return {
            "model_digest": self.digest,
            "backbone": str(self.bundle.config.get("backbone", "unknown")),
            "classes": list(self.bundle.classes),
            "image_size_px": self.bundle.image_size_px,
            "temperature": self.bundle.temperature,
        }


def open_model(folder: Path) -> Model:
    """Open a bundle, and its log of evaluations.

    Raises:
        InputError: If either is not what was written.
    """
    model = Model(folder, load_bundle(folder))
    read_log(folder)  # its mistakes should not wait for the images
    return model


def open_baseline(folder: Path, model: Model) -> Model:
    """Open a bundle that another is to be compared with.

    Raises:
        InputError: Also if it is the same model, or has other classes.
    """
    other = open_model(folder)
    if set(other.bundle.classes) != set(model.bundle.classes):
        raise InputError(
            f"a baseline has the classes of the bundle; {folder} has "
            f"{', '.join(map(repr, other.bundle.classes))}: give another with --baseline"
        )
    if other.digest == model.digest:
        raise InputError(
            f"a baseline is another model; {folder} holds the same one: give another with "
            "--baseline"
        )
    return other


def predict(model: Model, images: ImageSet, task: str, tell: Progress) -> Predictions:
    """Classify images.

    Args:
        model: Which bundle.
        images: Decoded at its image size, labelled in its order of classes.
        task: What this is called in calls of ``tell``.
        tell: Called with the task, how many images are done, and of how many.

    Raises:
        InputError: If the bundle's model fails, or gives what is no logit.
    """
    logits = []
    for start in range(0, len(images.pixels), _CHUNK):
        logits.append(_logits(model, np.asarray(images.pixels[start : start + _CHUNK])))
        tell(task, start + len(logits[-1]), len(images.pixels))
    return Predictions(
        classes=model.bundle.classes,
        logits=np.concatenate(logits),
        temperature=model.bundle.temperature,
        labels=images.labels,
        groups=images.groups,
        sources=images.sources,
    )


def reordered(predictions: Predictions, classes: tuple[str, ...]) -> Predictions:
    """Return predictions with their classes in another order."""
    columns = np.array([predictions.classes.index(name) for name in classes])
    return dataclasses.replace(
        predictions,
        classes=classes,
        logits=predictions.logits[:, columns],
        labels=np.argsort(columns)[predictions.labels],
    )


def score_corrupted(model: Model, images: ImageSet, seed: int, tell: Progress) -> dict[str, Any]:
    """Return macro-F1 on corrupted images, and on the same images as they are.

    Of more than ``MAX_CORRUPTED_IMAGES``, as many are drawn.
    """
    rows = np.arange(len(images.labels))
    if len(rows) > MAX_CORRUPTED_IMAGES:
        rng = np.random.default_rng(derive_seed("corrupted rows", seed))
        rows = np.sort(rng.choice(rows, MAX_CORRUPTED_IMAGES, replace=False))
    cases = [(kind, strength) for kind, strengths in STRENGTHS.items() for strength in strengths]
    logits: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(1 + len(cases))]
    for start in range(0, len(rows), _CHUNK):
        pixels = np.asarray(images.pixels[rows[start : start + _CHUNK]])
        logits[0].append(_logits(model, pixels))
        for found, (kind, strength) in zip(logits[1:], cases, strict=True):
            own_seed = derive_seed(kind, str(strength), start, seed)
            found.append(_logits(model, corrupt(pixels, kind, strength, own_seed)))
        tell("classifying corrupted images", start + len(pixels), len(rows))
    macro_f1 = [_macro_f1(np.concatenate(found), images.labels[rows]) for found in logits]
    return {
        "num_images": len(rows),
        "uncorrupted": macro_f1[0],
        "corrupted": [
            {"kind": kind, "strength": strength, "macro_f1": value}
            for (kind, strength), value in zip(cases, macro_f1[1:], strict=True)
        ],
    }


def _logits(model: Model, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    return model.bundle.logits(pixels).astype(np.float64)


def _macro_f1(logits: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]) -> float:
    return float(score_decisions(confusion_matrix(logits, labels))["macro_f1"][0])
