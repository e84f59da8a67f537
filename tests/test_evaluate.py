"""A bundle meets its test rows: the right rows, figures checked by hand, and a log of each time."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from rich.console import Console
from safetensors.numpy import save_file
from sklearn import metrics

from lightning_modules.bundle import FORMAT, MODEL_FILES, load_bundle
from lightning_modules.calibration import softmax
from lightning_modules.corruptions import STRENGTHS, corrupt
from lightning_modules.data.manifest import read_manifest
from lightning_modules.errors import InputError
from search.evaluation.evaluate import evaluate_bundle
from search.evaluation.log import Run, log_evaluation, read_log
from search.evaluation.scores import Bootstrap, Predictions, describe
from search.evaluation.tables import print_evaluation
from search.study.sweep_files import LocalFiles

CLASSES = ("benign_tumor", "malignant_tumor", "no_stroke", "no_tumor", "stroke")
GREY = (20, 70, 120, 170, 220)
SIDE_PX = 16
NUM_RESAMPLES = 50


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEUROSWEEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def write_bundle(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    grey: Sequence[float] = GREY,
    temperature: float = 1.0,
    manifest_digest: str | None = None,
    image_size_px: int = SIDE_PX,
    leakage: dict[str, int] | None = None,
) -> Path:
    """A bundle that takes an image for the class whose grey is nearest to the image's mean.

    Logits are -200 (mean - grey)^2, less what all classes have in common, as a linear layer.
    """
    levels = np.array(grey, np.float32) / 255
    pixels = image_size_px**2
    weight = np.tile(400 * levels / pixels, (pixels, 1)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["intensities"], ["flat"]),
            helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"]),
        ],
        "nearest_grey",
        [
            helper.make_tensor_value_info(
                "intensities", TensorProto.FLOAT, ["batch", 1, image_size_px, image_size_px]
            )
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", len(classes)])],
        [
            numpy_helper.from_array(weight, "weight"),
            numpy_helper.from_array(-200 * levels**2, "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    folder.mkdir(parents=True)
    onnx.save(model, folder / "model.onnx")
    save_file({"weight": weight}, folder / "model.safetensors")
    (folder / "model.pt2").write_bytes(b"never opened")
    config = {
        "format": FORMAT,
        "backbone": "nearest_grey",
        "classes": list(classes),
        "input": {"image_size_px": image_size_px},
        "temperature": temperature,
        "leakage": leakage or {},
        "data": {"manifest_digest": manifest_digest, "skipped_images": 0},
        "digests": {
            name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in MODEL_FILES
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_images(
    folder: Path,
    *,
    classes: Sequence[str] = CLASSES,
    groups_a_class: int = 6,
    seed: int = 0,
    split: bool = True,
) -> Path:
    """Two images a patient, greys around their class's; half of the patients are test patients."""
    rng = np.random.default_rng(seed)
    rows = ["path,label,group_id,source,split" if split else "path,label,group_id,source"]
    (folder / "images").mkdir(parents=True)
    for label in classes:
        for group in range(groups_a_class):
            shift = rng.normal(0, 22)
            for number in range(2):
                name = f"images/{label}-{group}-{number}.png"
                grey = GREY[CLASSES.index(label)] + shift + rng.normal(0, 12)
                pixels = np.clip(rng.normal(grey, 20, (SIDE_PX, SIDE_PX)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / name)
                source = "here" if "tumor" in label else "there"
                row = f"{name},{label},Doe John {label} {group},{source}"
                rows.append(row + (f",{('train', 'test')[group % 2]}" if split else ""))
    path = folder / "manifest.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def evaluate(bundle: Path, data: Path, **options: Any) -> dict[str, Any]:
    defaults = {"external": None, "baseline": None, "out": None, "num_resamples": NUM_RESAMPLES}
    return evaluate_bundle(bundle, data, **{**defaults, **options})


def printed(evaluation: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_evaluation(Console(file=stream, width=200), evaluation)
    return stream.getvalue()


def predicted_by_hand(
    bundle: Path, data: Path, split: str | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Logits, and class indices in the bundle's order, of a manifest's rows."""
    frame = read_manifest(data).frame
    frame = frame if split is None else frame[frame["split"] == split]
    opened = load_bundle(bundle)
    images = np.stack([np.asarray(Image.open(data.parent / path)) for path in frame["path"]])
    labels = [opened.classes.index(label) for label in frame["label"]]
    return opened.logits(images).astype(float), np.array(labels)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_images(tmp_path / "data")


@pytest.fixture
def bundle(tmp_path: Path, data: Path) -> Path:
    return write_bundle(
        tmp_path / "bundle", temperature=2.5, manifest_digest=read_manifest(data).digest
    )


@dataclass(frozen=True)
class Evaluated:
    """A bundle that was evaluated once, with all there is; shared, to be copied if changed."""

    data: Path
    bundle: Path
    outside: Path
    baseline: Path
    out: Path
    evaluation: dict[str, Any]
    told: list[tuple[str, int, int]]


@pytest.fixture(scope="module")
def once(_own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("once")
    data = write_images(folder / "data")
    bundle = write_bundle(
        folder / "bundle", temperature=2.5, manifest_digest=read_manifest(data).digest
    )
    # Splits of its own, which mean nothing; stroke, no_stroke, and no_tumor are missing.
    outside = write_images(folder / "outside", classes=CLASSES[:2], groups_a_class=4, seed=3)
    # Other patients, but for the first of each class.
    text = outside.read_text()
    for group in (1, 2, 3):
        text = text.replace(f"tumor {group},", f"tumor outside {group},")
    outside.write_text(text)
    # Worse, with classes in another order, and made for another image size.
    baseline = write_bundle(
        folder / "baseline",
        classes=CLASSES[::-1],
        grey=[level + 25 for level in GREY[::-1]],
        image_size_px=8,
    )
    told: list[tuple[str, int, int]] = []
    evaluation = evaluate(
        bundle,
        data,
        external=outside,
        baseline=baseline,
        out=folder / "new" / "out",
        progress=lambda task, done, total: told.append((task, done, total)),
    )
    return Evaluated(data, bundle, outside, baseline, folder / "new" / "out", evaluation, told)


def test_figures_are_those_of_the_test_rows(once: Evaluated) -> None:
    found = once.evaluation["internal"]
    logits, labels = predicted_by_hand(once.bundle, once.data, "test")
    probabilities = softmax(logits, 2.5)
    decided = logits.argmax(axis=1)
    assert (found["num_images"], found["num_groups"]) == (len(labels), 15)
    assert found["macro_f1"]["value"] == pytest.approx(
        metrics.f1_score(labels, decided, average="macro")
    )
    assert found["mcc"]["value"] == pytest.approx(metrics.matthews_corrcoef(labels, decided))
    counts = metrics.confusion_matrix(labels, decided)
    assert found["confusion"] == {"classes": list(CLASSES), "counts": counts.tolist()}
    assert 0 < (labels == decided).mean() < 1  # there is something to tell
    for when, values in (("before", softmax(logits)), ("after", probabilities)):
        assert found["calibration"][when]["nll"]["value"] == pytest.approx(
            metrics.log_loss(labels, values), rel=1e-6
        )
    assert found["calibration"]["temperature"] == 2.5
    for index, name in enumerate(CLASSES):
        figures = found["per_class"][name]
        area = metrics.roc_auc_score(labels == index, probabilities[:, index])
        assert figures["roc_auc"]["value"] == pytest.approx(area)
        assert (figures["num_images"], figures["num_groups"]) == (6, 3)


def test_pairs_are_told_apart_by_their_own_probabilities(once: Evaluated) -> None:
    found = once.evaluation["internal"]["pairs"]
    logits, labels = predicted_by_hand(once.bundle, once.data, "test")
    probabilities = softmax(logits, 2.5)
    for pair in (("malignant_tumor", "benign_tumor"), ("stroke", "no_stroke")):
        first, second = (CLASSES.index(name) for name in pair)
        among = np.isin(labels, (first, second))
        sure = probabilities[among]
        share = sure[:, first] / (sure[:, first] + sure[:, second])
        is_first = labels[among] == first
        figures = found["/".join(pair)]
        assert figures["num_images"] == 12
        assert figures["accuracy"]["value"] == pytest.approx(((share > 0.5) == is_first).mean())
        assert figures["per_class"][pair[0]]["roc_auc"]["value"] == pytest.approx(
            metrics.roc_auc_score(is_first, share)
        )
        assert figures["per_class"][pair[0]]["sensitivity"]["value"] == pytest.approx(
            (share > 0.5)[is_first].mean()
        )


def test_both_negatives_merge_into_normal(once: Evaluated) -> None:
    found = once.evaluation["internal"]["merged"]
    logits, labels = predicted_by_hand(once.bundle, once.data, "test")
    probabilities = softmax(logits, 2.5)
    # no_stroke and no_tumor are columns 2 and 3.
    merged = np.stack(
        [
            probabilities[:, 0],
            probabilities[:, 1],
            probabilities[:, 2] + probabilities[:, 3],
            probabilities[:, 4],
        ],
        axis=1,
    )
    column = np.array([0, 1, 2, 2, 3])
    assert found["confusion"]["classes"] == ["benign_tumor", "malignant_tumor", "normal", "stroke"]
    assert found["confusion"]["counts"] == (
        metrics.confusion_matrix(column[labels], merged.argmax(axis=1)).tolist()
    )
    assert found["per_class"]["normal"]["num_images"] == 12


def test_each_source_has_a_row(once: Evaluated) -> None:
    found = once.evaluation["internal"]["sources"]
    logits, labels = predicted_by_hand(once.bundle, once.data, "test")
    strokes = np.isin(labels, (2, 4))
    right = logits.argmax(axis=1) == labels
    assert list(found) == ["here", "there"]
    assert found["there"]["classes"] == ["no_stroke", "stroke"]
    assert (found["there"]["num_images"], found["there"]["num_groups"]) == (12, 6)
    assert found["there"]["accuracy"]["value"] == pytest.approx(right[strokes].mean())
    assert found["here"]["accuracy"]["value"] == pytest.approx(right[~strokes].mean())


def test_every_interval_holds_its_figure_in_range(once: Evaluated) -> None:
    found = once.evaluation["internal"]
    figures = [found["macro_f1"], found["accuracy"], found["balanced_accuracy"], found["mcc"]]
    figures += [found["per_class"][name][key] for name in CLASSES for key in ("sensitivity", "f1")]
    figures += [source[key] for source in found["sources"].values() for key in ("accuracy",)]
    for figure in figures:
        assert -1e-9 <= figure["low"] <= figure["high"] <= 1 + 1e-9
    wide = found["accuracy"]
    assert wide["low"] < wide["value"] < wide["high"]


def test_intervals_depend_on_the_seed_and_values_do_not() -> None:
    rng = np.random.default_rng(0)
    predictions = Predictions(
        classes=("a", "b"),
        logits=rng.normal(size=(40, 2)),
        temperature=1.0,
        labels=np.arange(40) % 2,
        groups=np.arange(40).astype(str),
        sources=np.full(40, "here"),
    )
    first, second, other = (
        describe(predictions, Bootstrap(NUM_RESAMPLES, seed)) for seed in (0, 0, 1)
    )
    assert first == second
    assert other["macro_f1"]["value"] == first["macro_f1"]["value"]
    assert other["macro_f1"] != first["macro_f1"]


def test_one_patient_a_class_has_no_interval() -> None:
    predictions = Predictions(
        classes=("a", "b"),
        logits=np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]]),
        temperature=1.0,
        labels=np.array([0, 0, 1, 1]),
        groups=np.array(["x", "x", "y", "z"]),
        sources=np.array(["here", "here", "there", "there"]),
    )
    found = describe(predictions, Bootstrap(NUM_RESAMPLES, 0))
    assert found["accuracy"]["low"] is not None  # of three patients
    assert found["per_class"]["a"]["sensitivity"] == {"value": 0.5, "low": None, "high": None}
    assert found["per_class"]["b"]["sensitivity"]["low"] is not None
    assert found["sources"]["here"]["accuracy"] == {"value": 0.5, "low": None, "high": None}


def test_classes_of_any_name_are_printed_as_they_are_and_allowed_leakage_is_told(
    tmp_path: Path,
) -> None:
    classes = ("[red]benign", r"$\frac{1$")  # neither markup nor a formula
    data = write_images(tmp_path / "data", classes=CLASSES[:2])
    text = data.read_text().replace(",benign_tumor,", f",{classes[0]},")
    data.write_text(text.replace(",malignant_tumor,", f",{classes[1]},"))
    bundle = write_bundle(
        tmp_path / "b", classes=classes, grey=GREY[:2], leakage={"copies": 3, "[red]": 1}
    )
    evaluation = evaluate(bundle, data)
    assert evaluation["internal"]["pairs"] == {}
    assert evaluation["internal"]["merged"] is None
    text = printed(evaluation)
    assert all(name in text for name in classes)
    assert "tasks apart" not in text
    assert evaluation["data"]["leakage"] == {"copies": 3, "[red]": 1}
    assert "copies of pictures lie in two splits: every figure flatters" in text


# The log


def test_a_second_evaluation_says_that_it_is_one(once: Evaluated, tmp_path: Path) -> None:
    first, bundle = once.evaluation, shutil.copytree(once.bundle, tmp_path / "bundle")
    second = evaluate(bundle, once.data)
    assert first["run"] == {"on_these_images": 1, "of_this_bundle": 1, "earlier": []}
    assert second["run"] == {"on_these_images": 2, "of_this_bundle": 2, "earlier": [first["date"]]}
    assert "evaluation 2 on these test images, by this bundle or another" in printed(second)
    assert "note: evaluation" not in printed(first)
    log = json.loads((bundle / "evaluations.json").read_text())
    assert [entry["run"] for entry in log] == [1, 2]
    for entry, evaluation in zip(log, (first, second), strict=True):
        assert entry["date"] == evaluation["date"]
        assert entry["manifest_digest"] == read_manifest(once.data).digest
        digest = hashlib.sha256((bundle / "model.onnx").read_bytes()).hexdigest()
        assert entry["model_digest"] == digest
        assert entry["figures"]["macro_f1"] == evaluation["internal"]["macro_f1"]
        of_stroke = evaluation["internal"]["per_class"]["stroke"]
        assert entry["figures"]["per_class"]["stroke"]["f1"] == of_stroke["f1"]
    assert log[0]["figures"]["above_baseline"] == first["baseline"]["difference"]
    assert "above_baseline" not in log[1]["figures"]
    assert "flatters" not in printed(second)
    # And it comes to the same.
    assert second["internal"] == first["internal"]
    assert second["robustness"] == first["robustness"]


def test_the_same_test_images_in_another_manifest_are_the_same(
    once: Evaluated, tmp_path: Path
) -> None:
    bundle = shutil.copytree(once.bundle, tmp_path / "bundle")
    lines = once.data.read_text().splitlines()
    other = once.data.with_name("other.csv")  # a training image less
    other.write_text("\n".join(lines[:1] + lines[2:]) + "\n")
    forget_manifest(bundle)
    assert evaluate(bundle, other)["run"]["on_these_images"] == 2


def test_a_manifest_that_is_not_the_sweeps_is_refused(once: Evaluated, tmp_path: Path) -> None:
    bundle = shutil.copytree(once.bundle, tmp_path / "bundle")
    lines = once.data.read_text().splitlines()
    other = once.data.with_name("torn.csv")
    other.write_text("\n".join(lines[:1] + lines[2:]) + "\n")
    with pytest.raises(InputError, match="the manifest's images, groups, or splits are not the"):
        evaluate(bundle, other)
    assert read_log(bundle) == read_log(once.bundle)


def forget_manifest(bundle: Path) -> None:
    """Make a bundle one that does not say which images it was trained on."""
    config = json.loads((bundle / "config.json").read_text())
    config["data"] = {}
    (bundle / "config.json").write_text(json.dumps(config))


def test_other_images_are_a_first_evaluation_of_an_evaluated_bundle(
    once: Evaluated, tmp_path: Path
) -> None:
    bundle = shutil.copytree(once.bundle, tmp_path / "bundle")
    forget_manifest(bundle)
    evaluation = evaluate(bundle, write_images(tmp_path / "more", groups_a_class=8, seed=1))
    assert evaluation["run"] == {"on_these_images": 1, "of_this_bundle": 2, "earlier": []}
    text = printed(evaluation)
    assert "evaluation 2 of this bundle, the first on these images" in text


def test_two_evaluations_at_once_are_both_logged(tmp_path: Path) -> None:
    entry = {"date": "now", "manifest_digest": "a", "images_digest": "b"}
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: log_evaluation(tmp_path, entry), range(24)))
    assert sorted(run.on_these_images for run in runs) == list(range(1, 25))
    assert len(read_log(tmp_path)) == 24


def test_another_bundle_of_the_sweep_gets_no_first_look(tmp_path: Path) -> None:
    sweep, first, baseline, second = (tmp_path / name for name in ("s", "a", "b", "c"))
    for folder in (sweep, first, baseline, second):
        folder.mkdir()
    files = LocalFiles(str(sweep))
    monday, tuesday = (
        {"date": date, "as": "evaluated", "manifest_digest": "a", "images_digest": "b"}
        for date in ("2026-11-23", "2026-11-24")
    )
    assert log_evaluation(first, monday, files) == Run(1, 1, ())
    # One look, of two bundles beside each other.
    assert log_evaluation(baseline, {**monday, "as": "baseline"}, files) == Run(1, 1, ())
    assert log_evaluation(second, tuesday, files) == Run(2, 1, ("2026-11-23",))
    wednesday = {**monday, "date": "2026-11-25"}
    assert log_evaluation(baseline, wednesday, files) == Run(3, 2, ("2026-11-23", "2026-11-24"))
    # A sweep that was not at hand when its images were looked at learns of it.
    third = tmp_path / "d"
    third.mkdir()
    log_evaluation(third, {**monday, "date": "2026-11-26"})
    thursday = {**monday, "date": "2026-11-27"}
    assert log_evaluation(third, thursday, files).on_these_images == 5
    assert log_evaluation(first, {**monday, "date": "2026-11-30"}, files).on_these_images == 6
    # Other images are looked at for the first time.
    others = {**monday, "date": "2026-11-28", "manifest_digest": "c", "images_digest": "d"}
    assert log_evaluation(second, others, files) == Run(1, 2, ())
    # What cannot be read is not begun anew, and nothing is logged beside it.
    (sweep / "evaluations.json").write_text("{}")
    before = read_log(second)
    with pytest.raises(InputError, match="of a bundle, or of a sweep's; it is no list"):
        log_evaluation(second, others, files)
    assert read_log(second) == before


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", "[" * 100_000, '[{"date": []}]', '[{"date": "\\ud800"}]']
)
def test_a_log_that_was_tampered_with_is_refused(bundle: Path, data: Path, text: str) -> None:
    (bundle / "evaluations.json").write_text(text)
    with pytest.raises(
        InputError, match=r"evaluations\.json must list the evaluations of a bundle"
    ):
        evaluate(bundle, data)
    assert not (bundle / "evaluation").exists()


def test_a_log_that_leads_elsewhere_is_refused(bundle: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere.json").write_text("[]")
    (bundle / "evaluations.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="must list the evaluations of a bundle"):
        evaluate(bundle, data)
    assert (tmp_path / "elsewhere.json").read_text() == "[]"


def test_an_output_folder_that_leads_elsewhere_is_refused(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    (bundle / "evaluation").symlink_to(tmp_path)
    with pytest.raises(InputError, match="is a link: give another --out"):
        evaluate(bundle, data)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_bundle_that_cannot_be_written_is_refused_before_it_is_scored(
    bundle: Path, data: Path
) -> None:
    bundle.chmod(0o500)
    with pytest.raises(InputError, match="an evaluation is written down"):
        evaluate(bundle, data)


def test_an_output_folder_that_is_a_file_is_refused_before_it_is_scored(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(InputError, match=r"out cannot be written to"):
        evaluate(bundle, data, out=tmp_path / "out")
    assert not (bundle / "evaluations.json").exists()


# The data


def test_without_splits_the_sweeps_own_manifest_is_named(bundle: Path, tmp_path: Path) -> None:
    data = write_images(tmp_path / "unsplit", split=False)
    with pytest.raises(InputError, match=r"got no splits; the sweep has assigned them: give its f"):
        evaluate(bundle, data)


def test_splits_without_test_rows_are_refused(bundle: Path, data: Path) -> None:
    data.write_text(data.read_text().replace(",test", ",val"))
    with pytest.raises(InputError, match="got only train and val; mark the locked images"):
        evaluate(bundle, data)


@pytest.mark.parametrize("label", ["lesion", "stroke"])
def test_classes_that_are_not_the_bundles_are_refused(bundle: Path, data: Path, label: str) -> None:
    # Renamed to a class that the bundle has not; or merged, so that one is missing.
    data.write_text(data.read_text().replace(",no_tumor,", f",{label},"))
    with pytest.raises(InputError, match=r"the classes are the bundle's, .* got .*--external"):
        evaluate(bundle, data)


def test_a_bad_test_image_is_refused_or_counted_and_a_bad_training_image_not_missed(
    bundle: Path, data: Path
) -> None:
    for name in ("stroke-0-0.png", "stroke-1-0.png"):  # one to train with, one to test
        (data.parent / "images" / name).write_bytes(b"torn")
    with pytest.raises(InputError, match="got 1 of 30 that are not"):
        evaluate(bundle, data)
    evaluation = evaluate(bundle, data, skip_bad_images=True)
    assert evaluation["data"]["num_skipped"] == 1
    assert evaluation["internal"]["num_images"] == 29
    assert "1 test images could not be decoded" in printed(evaluation)


# External sets and baselines


def test_an_external_set_is_evaluated_whole(once: Evaluated) -> None:
    found = once.evaluation["external"]
    logits, labels = predicted_by_hand(once.bundle, once.outside, None)
    assert found["num_images"] == len(labels) == 16
    assert found["accuracy"]["value"] == pytest.approx((logits.argmax(axis=1) == labels).mean())
    assert found["per_class"]["stroke"]["sensitivity"] == {"value": None, "low": None, "high": None}
    assert set(found["pairs"]) == {"malignant_tumor/benign_tumor"}
    assert found["calibration"]["temperature"] == 2.5  # as fitted before, on other images
    assert "external: tasks apart" in printed(once.evaluation)
    log = json.loads((once.bundle / "evaluations.json").read_text())
    assert log[0]["external"]["figures"]["accuracy"] == found["accuracy"]


@pytest.mark.slow
def test_an_external_folder_of_class_folders_is_evaluated(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    for label in ("stroke", "no_stroke"):
        (tmp_path / "folders" / label).mkdir(parents=True)
        for path in (data.parent / "images").glob(f"{label}-*.png"):
            shutil.copy(path, tmp_path / "folders" / label)
    found = evaluate(bundle, data, external=tmp_path / "folders")["external"]
    assert (found["num_images"], found["num_groups"]) == (24, 24)
    assert list(found["sources"]) == ["folder"]


def test_an_external_set_of_the_bundles_own_patients_is_told(once: Evaluated) -> None:
    found = once.evaluation["external"]
    assert (found["num_groups"], found["num_groups_named_alike"]) == (8, 2)
    assert "2 of the external set's 8 groups are named as groups" in printed(once.evaluation)


def test_an_external_set_with_a_foreign_class_is_refused(
    bundle: Path, data: Path, tmp_path: Path
) -> None:
    outside = write_images(tmp_path / "outside", classes=CLASSES[:2])
    outside.write_text(outside.read_text().replace(",benign_tumor,", ",glioma,"))
    with pytest.raises(InputError, match="got 'glioma'; rename them, or leave them out"):
        evaluate(bundle, data, external=outside)
    assert not (bundle / "evaluations.json").exists()


def test_a_baseline_is_compared_on_the_same_images(once: Evaluated) -> None:
    ours, theirs = once.evaluation["internal"], once.evaluation["baseline"]
    assert theirs["confusion"]["classes"] == list(CLASSES)
    assert theirs["accuracy"]["value"] < ours["accuracy"]["value"]
    for name in ("macro_f1", "accuracy"):
        difference = theirs["difference"][name]
        expected = ours[name]["value"] - theirs[name]["value"]
        assert difference["value"] == pytest.approx(expected)
        assert difference["low"] <= difference["value"] <= difference["high"]
        assert 0.5 < difference["share_above_0"] <= 1
    assert "above the baseline" in printed(once.evaluation)


def test_a_baselines_own_evaluation_is_a_second_look(once: Evaluated, tmp_path: Path) -> None:
    baseline = shutil.copytree(once.baseline, tmp_path / "baseline")
    (entry,) = read_log(baseline)
    assert entry["as"] == "baseline"
    evaluation = evaluate(baseline, once.data)
    assert evaluation["run"]["on_these_images"] == 2
    theirs = once.evaluation["baseline"]
    expected = pytest.approx(theirs["macro_f1"]["value"])
    assert evaluation["internal"]["macro_f1"]["value"] == expected


def test_a_baseline_of_other_classes_is_refused(bundle: Path, data: Path, tmp_path: Path) -> None:
    baseline = write_bundle(tmp_path / "baseline", classes=(*CLASSES[:4], "lesion"))
    with pytest.raises(InputError, match="a baseline has the classes of the bundle"):
        evaluate(bundle, data, baseline=baseline)


def test_a_bundle_is_not_its_own_baseline(bundle: Path, data: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    with pytest.raises(InputError, match="a baseline is another model"):
        evaluate(bundle, data, baseline=copy)


# Corruptions


def test_robustness_has_three_strengths_of_each_kind(once: Evaluated) -> None:
    evaluation = once.evaluation
    found = evaluation["robustness"]
    assert found["uncorrupted"] == evaluation["internal"]["macro_f1"]["value"]
    told = [(case["kind"], case["strength"]) for case in found["corrupted"]]
    assert told == [(kind, strength) for kind, all_s in STRENGTHS.items() for strength in all_s]
    # The bundle looks at the mean alone, and contrast around it leaves that as it is.
    of_contrast = [c["macro_f1"] for c in found["corrupted"] if c["kind"] == "contrast"]
    assert of_contrast == pytest.approx([found["uncorrupted"]] * 3, abs=0.05)


def test_noise_has_the_strength_that_it_is_called_by() -> None:
    images = np.full((4, 64, 64), 128, np.uint8)
    for strength in STRENGTHS["noise"]:
        noisy = corrupt(images, "noise", strength, seed=0).astype(float)
        assert noisy.std() == pytest.approx(255 * strength, rel=0.03)
        assert noisy.mean() == pytest.approx(128, abs=0.5)


def test_blur_spreads_a_point_as_a_gaussian() -> None:
    images = np.zeros((1, 101, 101), np.uint8)
    images[0, 50, 50] = 255
    sigma_px = 0.02 * 101
    blurred = corrupt(images, "blur", 0.02, seed=0)
    assert blurred[0, 50, 50] == round(255 / (2 * np.pi * sigma_px**2))
    assert (blurred[0] == blurred[0].T).all()


def test_contrast_halves_the_distance_to_the_mean() -> None:
    images = np.array([[[0, 200], [100, 100]]], np.uint8)
    assert corrupt(images, "contrast", 0.5, seed=0).tolist() == [[[50, 150], [100, 100]]]


def test_rotation_turns_around_the_middle_and_leaves_black_corners() -> None:
    images = np.full((8, 65, 65), 200, np.uint8)
    images[:, 32, 48] = 255  # 16 px to the right of the middle
    turned = corrupt(images, "rotation", 20.0, seed=0)
    assert (turned[:, 0, 0] == 0).all()
    assert (turned[:, 32, 32] == 200).all()
    found = {tuple(np.unravel_index(image.argmax(), image.shape)) for image in turned}
    down, right = round(16 * np.sin(np.pi / 9)), round(16 * np.cos(np.pi / 9))
    assert found == {(32 + down, 32 + right), (32 - down, 32 + right)}  # either way


@pytest.mark.parametrize("kind", STRENGTHS)
def test_corruptions_are_replayed_by_their_seed(kind: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, 32, 32)).astype(np.uint8)
    kept = images.copy()
    once = corrupt(images, kind, STRENGTHS[kind][2], seed=1)
    np.testing.assert_array_equal(once, corrupt(images, kind, STRENGTHS[kind][2], seed=1))
    np.testing.assert_array_equal(images, kept)
    assert once.dtype == np.uint8
    assert (once != images).any()


# What is written


def test_json_and_plots_are_written(once: Evaluated) -> None:
    names = ["confusion.png", "reliability.png", "roc.png"]
    expected = {"evaluation.json", *names, *(f"external_{name}" for name in names)}
    assert {path.name for path in once.out.iterdir()} == expected
    assert json.loads((once.out / "evaluation.json").read_text()) == once.evaluation
    for name in expected - {"evaluation.json"}:
        with Image.open(once.out / name) as image:
            image.verify()
    assert not (once.bundle / "evaluation").exists()


def test_outputs_name_no_patient_and_no_path(once: Evaluated) -> None:
    written = [once.out / "evaluation.json", once.bundle / "evaluations.json"]
    for text in (printed(once.evaluation), *(path.read_text() for path in written)):
        assert "Doe" not in text
        assert "images/" not in text
        assert str(once.data.parent.parent) not in text


def test_progress_is_told(once: Evaluated) -> None:
    tasks = list(dict.fromkeys(task for task, _, _ in once.told))
    assert tasks == [
        "decoding",
        "classifying",
        "classifying corrupted images",
        "classifying the external set",
        "classifying by the baseline",
    ]
    for name in tasks:
        *_, last = (ends for ends in once.told if ends[0] == name)
        assert last[1] == last[2]


@pytest.mark.slow
def test_evaluating_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, search.evaluation.evaluate, search.evaluation.tables; "
        "sys.exit(bool({'torch', 'ray', 'optuna'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_real_images_are_evaluated(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "data" / "ci-mri5-mini" / "manifest.csv"
    bundle = write_bundle(tmp_path / "bundle", image_size_px=32)
    evaluation = evaluate(bundle, data)
    rows = read_manifest(data).rows("test")
    assert evaluation["internal"]["num_images"] == len(rows)
    assert set(evaluation["internal"]["pairs"]) == {
        "malignant_tumor/benign_tumor",
        "stroke/no_stroke",
    }
