"""An exported bundle is the trained module, calibrated, and says nothing that names anybody."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lightning_modules.bundle import MODEL_FILES, load_bundle
from lightning_modules.calibration import fit_temperature
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.network_files import module_logits, pt2_logits, safetensors_logits
from search.bundles import export
from search.bundles.config import describe_trial
from search.bundles.export import Parity, compare, write_bundle
from search.config import load_sweep
from search.data import prepare_data
from search.study.record import Record
from search.study.recorded import Epoch, Trial
from search.sweep import DataSettings, Sweep


@dataclasses.dataclass(frozen=True)
class Export:
    """A bundle of a network with ImageNet's weights and a random head, on real images."""

    folder: Path
    parity: Parity
    module: ImageClassifier
    manifest: Manifest
    pack: Pack
    record: Record
    trial: Trial

    @property
    def config(self) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return config

    @property
    def val(self) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], Any]:
        rows = self.manifest.rows("val")
        return np.asarray(self.pack.images()[rows]), self.manifest.labels()[rows]


def recorded(sweep: Sweep, manifest: Manifest, pack: Pack, weights: dict[str, Any]) -> Record:
    """A sweep of which one trial has finished."""
    sweep.folder.mkdir(parents=True)
    facts = {
        "manifest_digest": manifest.digest,
        "pack_digest": pack.digest,
        "skipped_images": [],
        "weights": {"mobilenet_v2": weights},
        "versions": {"torch": "2"},
        "leakage": {"pictures": 3, "images": 7},
    }
    record = Record.create(sweep, facts)
    number = record.draw().number
    num_classes = len(manifest.classes)
    epoch = Epoch(
        epoch=1,
        metrics={"val_macro_f1": 0.5, "val_loss": 1.0},
        confusion=[[1] * num_classes] * num_classes,
        last=None,
        best=None,
        stopped="max_epochs",
        features="",
        ran_on="Doe's laptop",
    )
    record.add_epoch(number, epoch)
    return record


@pytest.fixture(scope="module")
def exported(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp("export")
    [path] = (shared_data / "weights").glob("mobilenet_v2*")
    data = DataSettings(path=str(shared_data / "data" / "ci-mri5-mini"), image_size_px=96)
    url = "sqlite:///" + str(root / "sweeps" / "real" / "study.db")
    sweep = Sweep(name="real", storage=str(root / "sweeps"), data=data, study_url=url)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEUROSWEEP_CACHE", str(root / "cache"))
        manifest, pack = prepare_data(sweep)
    weights = {
        "origin": str(path),
        "path": str(path),
        "digest": "e" * 64,
        "seed": 0,
        "passed_over": ["nothing at " + str(root)],
    }
    record = recorded(sweep, manifest, pack, weights)
    module = ImageClassifier(
        backbone="mobilenet_v2",
        num_classes=len(manifest.classes),
        image_size_px=96,
        weights_path=str(path),
    ).eval()
    with torch.no_grad():
        module.head.weight *= 10.0  # logits as far apart as a trained network's
    [trial] = record.trials()
    config = describe_trial(record, trial, manifest, pack, chosen="best")
    folder = root / "bundle"
    parity = write_bundle([(1.0, module)], config, folder, manifest=manifest, pack=pack)
    return Export(folder, parity, module, manifest, pack, record, trial)


def test_models_that_differ_are_refused_whichever_it_is() -> None:
    ours = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    near, far = ours + np.float32(0.0009), ours + np.float32([[0, 0], [0, 0.0011]])
    parity = compare(ours, {"model.onnx": ours, "model.pt2": near})
    assert parity.num_images == 2
    assert parity.differences["model.onnx"] == 0
    assert parity.largest_difference == pytest.approx(0.0009, rel=1e-3)
    for wrong in (far, ours * np.float32(np.nan)):
        with pytest.raises(InputError, match=r"logits of model\.pt2 differ by .*nothing was writt"):
            compare(ours, {"model.onnx": ours, "model.pt2": wrong})


@pytest.mark.slow
def test_three_files_equal_the_module_on_real_images(exported: Export) -> None:
    images, _ = exported.val
    ours = module_logits([(1.0, exported.module)], images)
    assert np.ptp(ours) > 2  # or equality would mean little
    assert exported.parity.num_images == len(images)
    assert set(exported.parity.differences) == set(MODEL_FILES)
    assert exported.parity.largest_difference < 1e-4
    np.testing.assert_allclose(load_bundle(exported.folder).logits(images), ours, atol=1e-4)
    assert exported.config["parity"]["differences"] == exported.parity.differences


@pytest.mark.slow
def test_each_file_takes_batches_of_any_size(exported: Export) -> None:
    images, _ = exported.val
    bundle = load_bundle(exported.folder)
    ours = module_logits([(1.0, exported.module)], images[:7])
    for size in (1, 3, 7):
        found = (
            bundle.logits(images[:size]),
            pt2_logits(exported.folder / "model.pt2", images[:size]),
            safetensors_logits(
                exported.folder / "model.safetensors", [(1.0, "mobilenet_v2")], 5, images[:size]
            ),
        )
        for logits in found:
            np.testing.assert_allclose(logits, ours[:size], atol=1e-4)


@pytest.mark.slow
def test_the_temperature_is_the_validation_images_and_leaves_accuracy_unchanged(
    exported: Export,
) -> None:
    images, labels = exported.val
    bundle = load_bundle(exported.folder)
    logits = bundle.logits(images)
    assert bundle.temperature == fit_temperature(logits, labels)
    assert bundle.temperature != 1.0
    probabilities = bundle.predict(images)
    assert (probabilities.argmax(1) == logits.argmax(1)).all()
    scaled = np.exp(logits.astype(float) / bundle.temperature)
    np.testing.assert_allclose(probabilities, scaled / scaled.sum(1, keepdims=True), rtol=1e-9)
    calibration = exported.config["calibration"]
    true = np.arange(len(labels)), labels
    assert calibration["nll_after"] == pytest.approx(-np.log(probabilities[true]).mean())
    assert calibration["nll_after"] < calibration["nll_before"]


@pytest.mark.slow
def test_no_file_names_a_folder_a_host_or_a_group(exported: Export) -> None:
    root, here = exported.folder.parent, Path(__file__).parents[1]
    words = [str(root), str(here), "site-packages", "sqlite", "Doe", "patient_1"]
    for path in exported.folder.iterdir():
        data = path.read_bytes()
        assert [word for word in words if word.encode() in data] == [], path.name
    said = "".join((exported.folder / name).read_text() for name in ("config.json", "README.md"))
    groups = exported.manifest.frame["group_id"]
    assert [group for group in groups if group in said] == []
    # Hashed ones neither.
    assert exported.config["leakage"] == {"pictures": 3, "images": 7}
    assert "**Leakage.**" in said


@pytest.mark.slow
def test_counts_are_the_manifests(exported: Export) -> None:
    data, frame = exported.config["data"], exported.manifest.frame
    for split in ("train", "val", "test"):
        part = frame[frame["split"] == split]
        assert data["images"][split] == len(part)
        assert data["groups"][split] == len(set(part["group_id"]))
        for label in exported.manifest.classes:
            of_class = part[part["label"] == label]
            expected = {"images": len(of_class), "groups": len(set(of_class["group_id"]))}
            assert data["classes"][label][split] == expected
    assert sum(sum(of.values()) for of in data["classes_by_source"].values()) == len(frame)


@pytest.mark.slow
def test_the_card_holds_the_sweep_file_that_launches_it_again(
    exported: Export, tmp_path: Path
) -> None:
    card = (exported.folder / "README.md").read_text()
    block = card.split("With this as `sweep.yaml`")[1].split("\n\n")[1]
    path = tmp_path / "sweep.yaml"
    path.write_text("\n".join(line.removeprefix("    ") for line in block.splitlines()))
    assert yaml.safe_load(path.read_text()) == exported.config["settings"]
    sweep = exported.record.sweep
    again = load_sweep(path, {"data.path": sweep.data.path, "storage": sweep.storage})
    assert dataclasses.replace(again, study_url=sweep.study_url, weights=sweep.weights) == sweep


@pytest.mark.slow
def test_nothing_is_written_if_a_file_differs(
    exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of the files: what is compared is what was read back from them.
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    config = describe_trial(
        exported.record, exported.trial, exported.manifest, exported.pack, chosen="by hand"
    )
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="nothing was written"):
        write_bundle(
            [(1.0, exported.module)], config, out, manifest=exported.manifest, pack=exported.pack
        )
    assert list(tmp_path.iterdir()) == []
