"""Classes of image files by a bundle alone: neither torch nor Ray is imported."""

import csv
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_modules.bundle import USE, Bundle
from lightning_modules.data.volumes import Slice, decode_slices, read_file
from lightning_modules.errors import InputError, printable

Form = Literal["table", "csv", "json"]

# With these, spreadsheets take a cell for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a bundle makes of one slice.

    Attributes:
        image: The file's name, without its folders, which may be patients' names.
        sha256: The file's, in hex.
        slice_number: Counted from 0; none where the file holds one picture only.
        label: The most probable class.
        probabilities: Of each class, calibrated, in the bundle's order.
    """

    image: str
    sha256: str
    slice_number: int | None
    label: str
    probabilities: tuple[float, ...]


def predict_files(
    bundle: Bundle, paths: Sequence[Path], *, slice_number: int | None = None
) -> Iterator[Prediction]:
    """Yield a prediction for each slice of each file, in order.

    A batch of slices and one file are in memory at a time.

    Args:
        bundle: What predicts.
        paths: PNG, JPEG, TIFF, DICOM, or NIfTI files.
        slice_number: The one slice of each file that is read; all if none.

    Raises:
        InputError: If a file is none of these, or cannot be read; at the first such.
    """
    slices = _slices(bundle, paths, slice_number)
    while batch := list(itertools.islice(slices, bundle.batch_size)):
        probabilities = bundle.predict(np.stack([item.pixels for _, _, item in batch]))
        for (image, sha256, item), of_classes in zip(batch, probabilities, strict=True):
            yield Prediction(
                image=image,
                sha256=sha256,
                slice_number=item.number,
                label=bundle.classes[int(of_classes.argmax())],
                probabilities=tuple(float(probability) for probability in of_classes),
            )


def print_predictions(
    console: Console, bundle: Bundle, predictions: Iterable[Prediction], form: Form
) -> None:
    """Print predictions: all of them or, after a mistake, none.

    Args:
        console: Where to.
        bundle: What predicted them.
        predictions: Such as `predict_files` yields.
        form: ``table`` for people; ``csv``, a line a slice; ``json``, one object.
    """
    found = list(predictions)
    if form == "table":
        console.print(_table(found))
        if leakage := bundle.config.get("leakage"):
            told = printable(str(leakage))
            console.print(Text(f"trained with leakage across splits: {told:.200}"))
        console.print(f"{USE} Probabilities are calibrated (temperature {bundle.temperature:.3g}).")
    else:
        text = to_csv(bundle, found) if form == "csv" else to_json(bundle, found)
        console.file.write(text)


def to_csv(bundle: Bundle, predictions: Sequence[Prediction]) -> str:
    """Return a header and a line a slice; probabilities to six digits, a column each class."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = [f"probability_{name}" for name in bundle.classes]
    writer.writerow(["image", "sha256", "slice", "class", "probability", *columns])
    for item in predictions:
        writer.writerow(
            [
                _cell(item.image),
                item.sha256,
                "" if item.slice_number is None else item.slice_number,
                _cell(item.label),
                f"{max(item.probabilities):.6f}",
                *(f"{probability:.6f}" for probability in item.probabilities),
            ]
        )
    return file.getvalue()


def to_json(bundle: Bundle, predictions: Sequence[Prediction]) -> str:
    """Return one object: what predicted, under which reservations, and what."""
    document: dict[str, Any] = {
        "use": USE,
        "bundle": bundle.config["digests"]["model.onnx"],
        "temperature": bundle.temperature,
        "predictions": [
            {
                "image": item.image,
                "sha256": item.sha256,
                "slice": item.slice_number,
                "class": item.label,
                "probabilities": dict(zip(bundle.classes, item.probabilities, strict=True)),
            }
            for item in predictions
        ],
    }
    if leakage := bundle.config.get("leakage"):
        document["leakage"] = leakage
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _slices(
    bundle: Bundle, paths: Sequence[Path], slice_number: int | None
) -> Iterator[tuple[str, str, Slice]]:
    for path in paths:
        name = _printable(path.name)
        try:
            data = read_file(path)
            sha256 = hashlib.sha256(data).hexdigest()
            for item in decode_slices(data, bundle.image_size_px, only=slice_number):
                yield name, sha256, item
        except FileNotFoundError as error:
            raise InputError(f"an image to classify must exist; there is no {name}") from error
        except OSError as error:
            raise InputError(f"{name} must be readable; {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{name} {error}") from error


def _table(predictions: Sequence[Prediction]) -> Table:
    has_slices = any(item.slice_number is not None for item in predictions)
    table = Table("image", *(["slice"] if has_slices else []), "class", "probability")
    table.box = box.SIMPLE_HEAD
    for item in predictions:
        number = "" if item.slice_number is None else str(item.slice_number)
        table.add_row(
            Text(item.image),
            *([number] if has_slices else []),
            Text(item.label),
            f"{max(item.probabilities):.3f}",
        )
    return table


def _printable(name: str) -> str:
    """Return a file name without what would steer a terminal, or is not UTF-8."""
    return "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in name
    )


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
