"""Claims about the simulated data set: reproducible, balanced, labelled by its lesions alone."""

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from lightning_modules.data import phantom
from lightning_modules.data.phantom import (
    CLASSES,
    PhantomSettings,
    PhantomSlice,
    render_slice,
    write_phantoms,
)
from lightning_modules.errors import InputError

LESIONS = ("benign_tumor", "malignant_tumor", "stroke")
SMALL = PhantomSettings(num_patients=10, slices_per_patient=2, image_size_px=48)
PATIENTS = range(24)


def render(label: str, patient: int, slice_index: int = 1, image_size_px: int = 96) -> PhantomSlice:
    return render_slice(
        label,
        patient_seed=patient,
        slice_index=slice_index,
        slices_per_patient=4,
        image_size_px=image_size_px,
    )


@pytest.fixture(scope="module")
def slices() -> dict[str, list[PhantomSlice]]:
    """The same patients in every class."""
    return {label: [render(label, patient) for patient in PATIENTS] for label in CLASSES}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms(SMALL, tmp_path_factory.mktemp("phantom") / "data")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rows(manifest: Path) -> list[dict[str, str]]:
    with manifest.open(newline="") as stream:
        return list(csv.DictReader(stream))


def mean_inside(image: np.ndarray, mask: np.ndarray) -> float:
    return float(image[mask].mean())


def rim_and_core(result: PhantomSlice) -> tuple[float, float]:
    depth = ndimage.distance_transform_edt(result.lesion_mask)
    rim, core = (depth > 0) & (depth < 0.5 * depth.max()), depth > 0.75 * depth.max()
    return mean_inside(result.image, rim), mean_inside(result.image, core)


# Reproducible


def test_same_settings_give_the_same_bytes(manifest: Path, tmp_path: Path) -> None:
    again = write_phantoms(SMALL, tmp_path / "again")
    assert contents(again.parent) == contents(manifest.parent)


def test_another_seed_gives_other_images(manifest: Path, tmp_path: Path) -> None:
    other = PhantomSettings(num_patients=5, slices_per_patient=2, image_size_px=48, seed=1)
    images = contents(write_phantoms(other, tmp_path / "other").parent / "images")
    first = contents(manifest.parent / "images")
    assert set(images) < set(first)
    assert all(first[name] != data for name, data in images.items())


def test_more_patients_leave_the_first_ones_as_they_are(manifest: Path, tmp_path: Path) -> None:
    fewer = PhantomSettings(num_patients=5, slices_per_patient=2, image_size_px=48)
    images = contents(write_phantoms(fewer, tmp_path / "fewer").parent / "images")
    assert images.items() < contents(manifest.parent / "images").items()


# On disk


def test_classes_share_the_patients_evenly_and_no_patient_has_two(manifest: Path) -> None:
    label_of = {(row["group_id"], row["label"]) for row in rows(manifest)}
    assert len(label_of) == SMALL.num_patients == len({group for group, _ in label_of})
    assert Counter(label for _, label in label_of) == dict.fromkeys(CLASSES, 2)


def test_manifest_names_every_file_and_leaves_the_split_open(manifest: Path) -> None:
    table = rows(manifest)
    assert list(table[0]) == ["path", "label", "group_id", "source", "split", "sequence", "mask"]
    listed = {row[column] for row in table for column in ("path", "mask")} - {""}
    written = set(contents(manifest.parent)) - {"manifest.csv", "phantom.json"}
    assert listed == written
    for row in table:
        sequence = "FLAIR" if row["label"].endswith("stroke") else "T1CE"
        assert row["split"] == ""
        assert (row["sequence"], row["source"]) == (sequence, f"phantom_{sequence.lower()}")
        assert bool(row["mask"]) == (row["label"] in LESIONS)
    assert table[0]["path"] == "images/benign_tumor/p0001_s0.png"


def test_files_are_8_bit_grey_of_the_asked_size(manifest: Path) -> None:
    for row in rows(manifest):
        for name in filter(None, (row["path"], row["mask"])):
            with Image.open(manifest.parent / name) as image:
                assert (image.mode, image.size) == ("L", (48, 48))


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(7))

    def interrupted(*args: object, **kwargs: object) -> PhantomSlice:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return PhantomSlice(np.zeros((8, 8), np.uint8), np.zeros((8, 8), bool))

    monkeypatch.setattr(phantom, "render_slice", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_phantoms(SMALL, tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def test_a_second_call_draws_nothing(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(phantom, "render_slice")
    before = manifest.stat().st_mtime_ns
    assert write_phantoms(SMALL, manifest.parent) == manifest
    assert manifest.stat().st_mtime_ns == before


def test_a_folder_with_other_settings_is_refused_and_kept(manifest: Path) -> None:
    before = contents(manifest.parent)
    with pytest.raises(InputError, match="same settings"):
        write_phantoms(PhantomSettings(num_patients=5, seed=3), manifest.parent)
    assert contents(manifest.parent) == before


@pytest.mark.parametrize(
    "wrong", [{"num_patients": 4}, {"slices_per_patient": 0}, {"image_size_px": 8}, {"seed": -1}]
)
def test_settings_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        PhantomSettings(**wrong)


# Anatomy and lesions


def test_only_lesion_classes_have_a_lesion(slices: dict[str, list[PhantomSlice]]) -> None:
    for label, results in slices.items():
        assert {bool(result.lesion_mask.any()) for result in results} == {label in LESIONS}


@pytest.mark.parametrize("label", LESIONS)
def test_every_slice_of_a_lesion_patient_shows_it_at_any_size(label: str) -> None:
    for patient in range(6):
        masks = [render(label, patient, index, 32).lesion_mask for index in range(4)]
        assert all(mask.any() for mask in masks)
        fine = [render(label, patient, index).lesion_mask for index in (1, 2)]
        assert (fine[0] & fine[1]).any(), "one lesion, not one for each slice"


@pytest.mark.parametrize("label", LESIONS)
def test_lesions_lie_inside_the_head(label: str, slices: dict[str, list[PhantomSlice]]) -> None:
    for result in slices[label]:
        smooth = ndimage.gaussian_filter(result.image.astype(float), 1)
        head = ndimage.binary_fill_holes(smooth > 0.35 * np.percentile(smooth, 98))
        assert not (result.lesion_mask & ~head).any()


def test_classes_of_one_sequence_show_the_same_heads(
    slices: dict[str, list[PhantomSlice]],
) -> None:
    for label, healthy_label in zip(LESIONS, ("no_tumor", "no_tumor", "no_stroke"), strict=True):
        for ill, healthy in zip(slices[label], slices[healthy_label], strict=True):
            corner = np.s_[:12, :12]  # air and noise
            assert (ill.image[corner] == healthy.image[corner]).all()
            assert (ill.image == healthy.image).mean() > 0.4


def test_stroke_is_brighter_than_the_other_hemisphere(
    slices: dict[str, list[PhantomSlice]],
) -> None:
    gains = []
    for result, healthy in zip(slices["stroke"], slices["no_stroke"], strict=True):
        centre_px = ndimage.center_of_mass(result.image > 40)[1]
        mirror = np.roll(result.image[:, ::-1], round(2 * centre_px - 95), axis=1)
        gains.append(
            mean_inside(result.image, result.lesion_mask) / mean_inside(mirror, result.lesion_mask)
        )
        mask = result.lesion_mask
        assert mean_inside(result.image, mask) > 1.1 * mean_inside(healthy.image, mask)
    assert np.mean(np.array(gains) > 1) > 0.9


def test_malignant_tumors_have_a_rim_and_benign_ones_do_not(
    slices: dict[str, list[PhantomSlice]],
) -> None:
    contrast = {
        label: [rim / core for rim, core in map(rim_and_core, slices[label])]
        for label in ("malignant_tumor", "benign_tumor")
    }
    assert np.mean(np.array(contrast["malignant_tumor"]) > 1.1) > 0.9
    assert np.mean(np.array(contrast["benign_tumor"]) < 1.1) > 0.9


def test_benign_tumors_enhance(slices: dict[str, list[PhantomSlice]]) -> None:
    for ill, healthy in zip(slices["benign_tumor"], slices["no_tumor"], strict=True):
        mask = ill.lesion_mask
        assert mean_inside(ill.image, mask) > 1.15 * mean_inside(healthy.image, mask)


def test_malignant_tumors_disturb_the_brain_around_them_and_strokes_do_not(
    slices: dict[str, list[PhantomSlice]],
) -> None:
    for label, healthy_label in (("malignant_tumor", "no_tumor"), ("stroke", "no_stroke")):
        for ill, healthy in zip(slices[label], slices[healthy_label], strict=True):
            outside = ~ndimage.binary_dilation(ill.lesion_mask, iterations=4)
            changed = np.abs(ill.image.astype(int) - healthy.image) > 10
            disturbed = (changed & outside).sum() / ill.lesion_mask.sum()
            assert disturbed > 0.1 if label == "malignant_tumor" else disturbed < 0.1


@pytest.mark.parametrize(
    ("label", "healthy_label"),
    [("benign_tumor", "no_tumor"), ("malignant_tumor", "no_tumor"), ("stroke", "no_stroke")],
)
def test_mean_brightness_does_not_give_the_class_away(
    label: str, healthy_label: str, slices: dict[str, list[PhantomSlice]]
) -> None:
    ill = np.array([result.image.mean() for result in slices[label]])
    healthy = np.array([result.image.mean() for result in slices[healthy_label]])
    thresholds = np.concatenate((ill, healthy))[:, None]
    above = ((ill > thresholds).mean(1) + (healthy <= thresholds).mean(1)) / 2
    assert np.maximum(above, 1 - above).max() < 0.7
