"""A bundle classifies files without Ray and torch; what it says can be joined, and names nobody."""

import csv
import hashlib
import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import onnx
import pydicom
import pytest
from onnx import TensorProto, helper
from PIL import Image
from rich.console import Console

from lightning_modules import bundle as bundle_module
from lightning_modules.bundle import MODEL_FILES, Bundle, load_bundle
from lightning_modules.errors import InputError
from search.bundles.predict import Form, predict_files, print_predictions

SIZE_PX = 8


@pytest.fixture
def bundle_folder(tmp_path: Path) -> Path:
    """A bundle whose logits are 4 m - 2 and 2 - 4 m, for a mean intensity of m; temperature 2."""
    nodes = [
        helper.make_node("GlobalAveragePool", ["intensities"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["mean"]),
        helper.make_node("Gemm", ["mean", "weight", "bias"], ["logits"]),
    ]
    shape = ["batch", 1, SIZE_PX, SIZE_PX]
    graph = helper.make_graph(
        nodes,
        "bundle",
        [helper.make_tensor_value_info("intensities", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            helper.make_tensor("weight", TensorProto.FLOAT, [1, 2], [4.0, -4.0]),
            helper.make_tensor("bias", TensorProto.FLOAT, [2], [-2.0, 2.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    contents = (model.SerializeToString(), b"", struct.pack("<Q", 2) + b"{}")
    folder = tmp_path / "bundle"
    folder.mkdir()
    for name, content in zip(MODEL_FILES, contents, strict=True):
        (folder / name).write_bytes(content)
    config = {
        "format": 2,
        "classes": ["=bright", "[red]dark"],
        "input": {"image_size_px": SIZE_PX},
        "temperature": 2.0,
        "digests": {
            name: hashlib.sha256(content).hexdigest()
            for name, content in zip(MODEL_FILES, contents, strict=True)
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def image(path: Path, grey: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (SIZE_PX, SIZE_PX), grey).save(path)
    return path


def volume(path: Path, *greys: int) -> Path:
    values = np.stack([np.full((SIZE_PX, SIZE_PX), grey, np.uint8) for grey in greys], axis=2)
    nibabel.Nifti1Image(values, np.eye(4)).to_filename(path)
    return path


def dicom_file(path: Path, grey: int) -> Path:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.SOPInstanceUID = "1.2.3"
    dataset.PatientName = "Featherstonehaugh"
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.Rows = dataset.Columns = SIZE_PX
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit = 7
    dataset.PixelData = bytes([grey]) * SIZE_PX**2
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def printed(bundle: Bundle, form: Form, *paths: Path, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_predictions(console, bundle, predict_files(bundle, paths, **options), form)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


HIGH = 1 / (1 + math.exp(-2))  # logits 2 and -2 at temperature 2


def test_csv_has_a_line_a_slice_with_calibrated_probabilities(
    bundle_folder: Path, tmp_path: Path
) -> None:
    light = image(tmp_path / "Doe" / "light.png", 255)
    dark = dicom_file(tmp_path / "dark.dcm", 0)
    both = volume(tmp_path / "both.nii.gz", 0, 255)
    text = printed(load_bundle(bundle_folder), "csv", light, dark, both)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(row["image"], row["slice"], row["class"]) for row in rows] == [
        ("light.png", "", "'=bright"),
        ("dark.dcm", "", "[red]dark"),
        ("both.nii.gz", "0", "[red]dark"),
        ("both.nii.gz", "1", "'=bright"),
    ]
    assert {row["probability"] for row in rows} == {f"{HIGH:.6f}"}
    assert rows[0]["probability_=bright"] == rows[1]["probability_[red]dark"] == f"{HIGH:.6f}"
    assert rows[0]["probability_[red]dark"] == f"{1 - HIGH:.6f}"
    assert rows[0]["sha256"] == hashlib.sha256(light.read_bytes()).hexdigest()
    assert rows[2]["sha256"] == rows[3]["sha256"] == hashlib.sha256(both.read_bytes()).hexdigest()


def test_json_says_what_predicted_and_under_which_reservations(
    bundle_folder: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(bundle_folder)
    found = json.loads(printed(bundle, "json", image(tmp_path / "light.png", 255)))
    assert found["use"] == "Research use only. Not a medical device."
    assert found["temperature"] == 2.0
    assert found["bundle"] == bundle.config["digests"]["model.onnx"]
    assert "leakage" not in found
    [prediction] = found["predictions"]
    assert prediction["image"] == "light.png"
    assert prediction["slice"] is None
    assert prediction["class"] == "=bright"
    assert prediction["probabilities"] == pytest.approx({"=bright": HIGH, "[red]dark": 1 - HIGH})


@pytest.mark.parametrize("form", ["table", "json"])
def test_leakage_is_repeated(bundle_folder: Path, tmp_path: Path, form: Form) -> None:
    path = bundle_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"leakage": {"pictures": 17}}))
    text = printed(load_bundle(bundle_folder), form, image(tmp_path / "a.png", 9))
    assert "leakage" in text
    assert "17" in text


def test_a_table_shows_names_as_they_are(bundle_folder: Path, tmp_path: Path) -> None:
    path = image(tmp_path / "Doe" / "[bold]a\x1b[2J.png", 0)
    text = printed(load_bundle(bundle_folder), "table", path, volume(tmp_path / "v.nii", 255))
    assert "[bold]a\N{REPLACEMENT CHARACTER}[2J.png" in text
    assert "[red]dark" in text
    assert f"{HIGH:.3f}" in text
    assert "Doe" not in text
    assert "Research use only. Not a medical device." in text


def test_one_slice_of_each_volume_can_be_asked_for(bundle_folder: Path, tmp_path: Path) -> None:
    bundle = load_bundle(bundle_folder)
    paths = [volume(tmp_path / f"{name}.nii", 0, 255, 0) for name in "ab"]
    found = list(predict_files(bundle, paths, slice_number=1))
    assert [(item.image, item.slice_number, item.label) for item in found] == [
        ("a.nii", 1, "=bright"),
        ("b.nii", 1, "=bright"),
    ]
    with pytest.raises(InputError, match=r"^a\.nii has slices 0 to 2, not 3$"):
        list(predict_files(bundle, paths, slice_number=3))


def test_slices_of_several_files_share_a_batch(
    bundle_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(bundle_folder)
    monkeypatch.setattr(bundle_module, "_BATCH_PIXELS", 4 * SIZE_PX**2)
    assert bundle.batch_size == 4
    # More than a batch, so that one ends within a file.
    greys = [(7 * number) % 256 for number in range(bundle.batch_size + 5)]
    paths = [volume(tmp_path / "a.nii", *greys[:3]), volume(tmp_path / "b.nii", *greys[3:])]
    found = [item.probabilities[0] for item in predict_files(bundle, paths)]
    expected = [1 / (1 + math.exp(-(4 * grey / 255 - 2))) for grey in greys]
    assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["csv", "json", "table"])
def test_after_a_mistake_nothing_is_printed(
    bundle_folder: Path, tmp_path: Path, form: Form
) -> None:
    bundle = load_bundle(bundle_folder)
    good, bad = image(tmp_path / "good.png", 9), tmp_path / "Doe" / "bad.png"
    bad.parent.mkdir()
    for content, line in (
        (None, "an image to classify must exist; there is no bad.png"),
        (b"junk", "bad.png is not a PNG, JPEG, TIFF, DICOM, or NIfTI file"),
    ):
        if content is not None:
            bad.write_bytes(content)
        console = Console(file=io.StringIO())
        with pytest.raises(InputError) as caught:
            print_predictions(console, bundle, predict_files(bundle, [good, bad]), form)
        assert str(caught.value) == line
        assert isinstance(console.file, io.StringIO)
        assert console.file.getvalue() == ""
    with pytest.raises(InputError, match=r"^Doe is not a plain file$"):
        list(predict_files(bundle, [bad.parent]))


def test_neither_torch_nor_ray_is_imported(bundle_folder: Path, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from rich.console import Console
from lightning_modules.bundle import load_bundle
from search.bundles.predict import predict_files, print_predictions
bundle = load_bundle(Path(sys.argv[1]))
print_predictions(Console(), bundle, predict_files(bundle, [Path(sys.argv[2])]), "csv")
heavy = {"torch", "ray", "optuna", "pytorch_lightning", "pandas", "pydicom", "nibabel"}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    arguments = [sys.executable, "-c", code, bundle_folder, image(tmp_path / "a.png", 255)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "a.png" in done.stdout
