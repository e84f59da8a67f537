"""A bundle on images that had no part in making it: every figure, once.

What is trained, stopped, chosen, and calibrated, is so on train and validation rows. Test rows are
read here alone, and the bundle keeps a log of it: who evaluates, changes something, and evaluates
again, tunes on the test set.
"""

import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_modules.bootstrap import COVERAGE
from lightning_modules.bundle import USE
from lightning_modules.data.manifest import Manifest
from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from lightning_modules.scores import CALIBRATION, DECISION
from search.evaluation.data import (
    ImageSet,
    Progress,
    count_named_alike,
    decode,
    read_external,
    read_own,
    sweep_at,
    take_test_rows,
)
from search.evaluation.figures import draw_evaluation
from search.evaluation.log import Run, log_evaluation, read_looks
from search.evaluation.model import (
    Model,
    open_baseline,
    open_model,
    predict,
    reordered,
    score_corrupted,
)
from search.evaluation.scores import Bootstrap, Predictions, compare, describe
from search.study.sweep_files import (
    LocalFiles,
    ObjectFiles,
    SweepFiles,
    check_object_storage,
)

FORMAT = 1


def evaluate_bundle(
    bundle: Path,
    data: Path | str,
    *,
    external: Path | None,
    baseline: Path | None,
    out: Path | None,
    seed: int = 0,
    num_resamples: int = 1000,
    skip_bad_images: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score a bundle on test rows, log it in bundle and sweep, and write figures and plots.

    Args:
        bundle: Its folder, which has to be writable: ``evaluations.json`` there grows by an entry.
        data: The manifest that the bundle was trained with, splits included; or the sweep's folder
            or address, where all looks at its test images are logged, whichever bundle's they are.
        external: A data set from elsewhere, evaluated whole, with nothing refitted.
        baseline: A second bundle for the same classes, compared on the same test rows; the
            evaluation is logged there too.
        out: Folder for ``evaluation.json`` and the plots; ``evaluation`` in the bundle if none.
        seed: Of the resamples and corruptions.
        num_resamples: For the intervals.
        skip_bad_images: Leave images out that cannot be decoded, and count them.
        progress: Called with what is done, how many, and of how many.

    Returns:
        What ``evaluation.json`` holds. No path, and no group.

    Raises:
        InputError: If bundle, data, and baseline do not fit together, or cannot be read or written.
    """
    tell = progress or (lambda task, done, total: None)
    model = open_model(bundle)
    other = None if baseline is None else open_baseline(baseline, model)
    if out is None:
        out = bundle / "evaluation"
        if out.is_symlink():
            raise InputError(f"a bundle's files are its own; {out} is a link: give another --out")
    sweep = sweep_at(data)
    files = None if sweep is None else sweep.files
    if files is not None:
        # What is wrong with its log should not wait for the images to be classified.
        read_looks(files)
        if isinstance(files, ObjectFiles):
            check_object_storage(files.location)
    local = [files.folder] if isinstance(files, LocalFiles) else []
    for folder in (out, bundle, *([] if baseline is None else [baseline]), *local):
        _check_writable(folder)

    classes = model.bundle.classes
    own = read_own(data, classes)
    _check_same(own, data, model)
    outside = None if external is None else read_external(external, classes)

    def decoded(manifest: Manifest, rows: Manifest, opened: Model) -> ImageSet:
        return decode(
            rows,
            manifest.digest,
            classes=opened.bundle.classes,
            image_size_px=opened.bundle.image_size_px,
            skip_bad_images=skip_bad_images,
            progress=tell,
        )

    images = decoded(own, take_test_rows(own), model)
    # Their mistakes should not wait for the test images to be classified.
    elsewhere = None if outside is None else decoded(outside, outside, model)
    same = None if other is None else decoded(own, take_test_rows(own), other)

    bootstrap = Bootstrap(num_resamples, seed)
    predictions = predict(model, images, "classifying", tell)
    evaluation: dict[str, Any] = {
        "format": FORMAT,
        "use": USE,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "bundle": model.identity(),
        "data": _origin(images, model),
        "intervals": {
            "method": "percentile bootstrap over groups",
            "coverage": COVERAGE,
            "num_resamples": num_resamples,
            "seed": seed,
        },
        "internal": describe(predictions, bootstrap),
        "external": None,
        "baseline": None,
        "robustness": score_corrupted(model, images, seed, tell),
    }
    drawn = {"": predictions}
    if outside is not None and elsewhere is not None:
        drawn["external_"] = predict(model, elsewhere, "classifying the external set", tell)
        evaluation["external"] = {
            **_digests(elsewhere),
            "num_groups_named_alike": count_named_alike(outside, own),
            **describe(drawn["external_"], bootstrap),
        }
    if other is not None and same is not None:
        theirs = reordered(predict(other, same, "classifying by the baseline", tell), classes)
        evaluation["baseline"] = {
            "bundle": other.identity(),
            **describe(theirs, bootstrap),
            "difference": compare(predictions, theirs, bootstrap),
        }
    run = _log(
        model,
        files,
        "evaluated",
        evaluation["date"],
        images,
        evaluation["internal"],
        evaluation["external"],
        None if baseline is None else evaluation["baseline"]["difference"],
    )
    if other is not None and same is not None:
        _log(other, files, "baseline", evaluation["date"], same, evaluation["baseline"])
    evaluation["run"] = {
        "on_these_images": run.on_these_images,
        "of_this_bundle": run.of_this_bundle,
        "earlier": list(run.earlier),
    }
    _write(evaluation, drawn, out)
    return evaluation


def _check_writable(folder: Path) -> None:
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(
            "an evaluation is written down: in the bundle, the sweep, and the folder of --out; "
            f"{above} cannot be written to: copy what is there, or give another --out"
        )


def _check_same(own: Manifest, data: Path | str, model: Model) -> None:
    """Refuse test rows that a bundle may have been trained on."""
    trained = model.bundle.config.get("data")
    expected = trained.get("manifest_digest") if isinstance(trained, dict) else None
    if expected is not None and own.digest != expected:
        raise InputError(
            f"{data}: test images are those that the sweep has locked; the manifest's images, "
            f"groups, or splits are not the bundle's (digest {own.digest[:12]}, the bundle's is "
            f"{expected!s:.12}): give the sweep's folder, such as sweeps/NAME, or evaluate other "
            "images with --external"
        )


def _origin(images: ImageSet, model: Model) -> dict[str, Any]:
    """Return which test rows these are."""
    leakage = model.bundle.config.get("leakage")
    return {
        **_digests(images),
        "split": "test",
        # Found before the launch, and allowed: counts by kind.
        "leakage": {
            str(kind): count
            for kind, count in (leakage.items() if isinstance(leakage, dict) else ())
            if isinstance(count, int | float)
        },
    }


def _digests(images: ImageSet) -> dict[str, Any]:
    return {
        "manifest_digest": images.manifest_digest,
        "images_digest": images.images_digest,
        "num_skipped": images.num_skipped,
    }


def _log(
    model: Model,
    sweep: SweepFiles | None,
    role: str,
    date: str,
    images: ImageSet,
    figures: Mapping[str, Any],
    external: Mapping[str, Any] | None = None,
    difference: Mapping[str, Any] | None = None,
) -> Run:
    """Append to a bundle's log, and its sweep's, what its test images said of it."""
    entry = {
        "date": date,
        "as": role,
        "model_digest": model.digest,
        **_digests(images),
        "figures": _headline(figures),
    }
    if external is not None:
        entry["external"] = {
            **{name: external[name] for name in ("manifest_digest", "images_digest")},
            "figures": _headline(external),
        }
    if difference is not None:
        entry["figures"]["above_baseline"] = difference
    return log_evaluation(model.folder, entry, sweep)


def _headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures that the log keeps, and that a model card shows."""
    calibrated = figures["calibration"]["after"]
    return {
        "num_images": figures["num_images"],
        "num_groups": figures["num_groups"],
        **{name: figures[name] for name in DECISION},
        **{name: calibrated[name] for name in CALIBRATION},
        **{
            part: {name: {"macro_f1": found["macro_f1"]} for name, found in figures[part].items()}
            for part in ("pairs", "sources")
        },
        "per_class": {
            name: {"sensitivity": found["sensitivity"], "f1": found["f1"]}
            for name, found in figures["per_class"].items()
        },
    }


def _write(
    evaluation: Mapping[str, Any], predictions: Mapping[str, Predictions], out: Path
) -> None:
    text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, png in draw_evaluation(evaluation, predictions).items():
            write_atomically(out / name, png)
        write_atomically(out / "evaluation.json", f"{text}\n".encode())
    except OSError as error:
        raise InputError(
            f"figures and plots go into a folder; {out}: {error.strerror}: give another with "
            "--out; the evaluation is in the bundle's evaluations.json"
        ) from error
