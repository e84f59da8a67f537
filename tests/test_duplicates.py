"""Copies of a slice are found however they were altered, and strangers are not."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter

from lightning_modules.data import duplicates
from lightning_modules.data.decode import decode_file, decode_image
from lightning_modules.data.duplicates import (
    COARSE_PX,
    Duplicates,
    Whitening,
    _resampling,
    all_turns,
    duplicates_of,
    find_duplicates,
    local_structure,
)
from lightning_modules.data.pack import Pack
from lightning_modules.data.phantom import PhantomSettings, write_phantoms

SIDE_PX = 96


@pytest.fixture(scope="module")
def slices(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """One simulated slice each of 60 patients."""
    settings = PhantomSettings(num_patients=60, slices_per_patient=1, image_size_px=SIDE_PX)
    manifest = write_phantoms(settings, tmp_path_factory.mktemp("phantoms"))
    paths = sorted(path for path in manifest.parent.rglob("*.png") if "mask" not in str(path))
    return np.stack([decode_file(path, SIDE_PX)[0] for path in paths])


def test_every_crop_is_the_one_that_pillow_makes() -> None:
    rng = np.random.default_rng(0)
    picture = rng.standard_normal((64, 64)).astype(np.float32)
    for turn in all_turns():
        mirrored = picture[:: -1 if turn.upside_down else 1, :: -1 if turn.sideways else 1]
        left, top, side = (64 * share for share in (turn.left, turn.top, turn.side))
        expected = Image.fromarray(np.ascontiguousarray(mirrored)).resize(
            (COARSE_PX, COARSE_PX),
            Image.Resampling.BILINEAR,
            (left, top, left + side, top + side),
        )
        down = _resampling(turn.upside_down, turn.top, turn.side)
        across = _resampling(turn.sideways, turn.left, turn.side)
        np.testing.assert_allclose(down.T @ picture @ across, np.asarray(expected), atol=1e-6)


def as_jpeg(image: Image.Image, quality: int = 30) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("L")


def crop(image: Image.Image, left: float, top: float, side: float) -> Image.Image:
    px = image.width
    box = (left * px, top * px, (left + side) * px, (top + side) * px)
    return image.resize(image.size, Image.Resampling.BILINEAR, box)


ALTERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "brighter": lambda image: image.point(lambda grey: min(255, int(1.4 * grey) + 20)),
    "darker": lambda image: image.point(lambda grey: int(0.4 * grey)),
    "more contrast": lambda image: ImageEnhance.Contrast(image).enhance(1.8),
    "sharpened": lambda image: image.filter(ImageFilter.UnsharpMask(2, 100)),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1)),
    "recompressed": as_jpeg,
    "cropped at the centre": lambda image: crop(image, 0.05, 0.05, 0.9),
    "cropped at a corner": lambda image: crop(image, 0.0, 0.07, 0.93),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "turned by 180 degrees": lambda image: image.transpose(Image.Transpose.ROTATE_180),
    "all at once": lambda image: as_jpeg(
        crop(image.point(lambda grey: min(255, int(1.2 * grey))), 0.03, 0.03, 0.94).transpose(
            Image.Transpose.FLIP_LEFT_RIGHT
        ),
        quality=60,
    ),
}


def test_altered_copies_are_found(slices: np.ndarray) -> None:
    copies = [
        np.asarray(alter(Image.fromarray(slices[row])))
        for row, alter in enumerate(ALTERATIONS.values())
    ]
    found = find_duplicates(np.concatenate([slices, np.stack(copies)])).near
    names = {(row, len(slices) + row): name for row, name in enumerate(ALTERATIONS)}
    assert {names.get(rows, rows) for rows in found} == set(ALTERATIONS)


def test_slices_of_different_patients_are_no_copies(slices: np.ndarray) -> None:
    assert find_duplicates(slices) == Duplicates(exact=(), near=())


def test_equal_pixels_are_exact_and_near(slices: np.ndarray) -> None:
    images = slices[[0, 1, 2, 1, 0, 0]]
    assert find_duplicates(images) == Duplicates(
        exact=((0, 4, 5), (1, 3)), near=((0, 4, 5), (1, 3))
    )


def test_one_changed_pixel_is_near_but_not_exact(slices: np.ndarray) -> None:
    images = slices[[0, 1, 2, 3, 0]].copy()
    images[4, 5, 5] += 1
    found = find_duplicates(images)
    assert found.exact == ()
    assert found.near == ((0, 4),)


def test_copies_of_a_copy_are_one_cluster(slices: np.ndarray) -> None:
    image = Image.fromarray(slices[3])
    chain = [crop(image, 0, 0, 0.93), crop(crop(image, 0, 0, 0.93), 0.07, 0.07, 0.93)]
    images = np.concatenate([slices, np.stack([np.asarray(link) for link in chain])])
    assert find_duplicates(images).near == ((3, 60, 61),)


def test_many_images_are_compared_as_few_are(
    slices: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.concatenate([slices, slices[:5, :, ::-1], slices[5:9, ::-1]])
    found = find_duplicates(images)
    assert len(found.near) == 9
    # What is kept for few, and how many rows are compared at a time, changes nothing.
    monkeypatch.setattr(duplicates, "MAX_KEPT_ROWS", 0)
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    assert find_duplicates(images) == found


def test_images_without_structure_are_copies_only_if_their_pixels_are_equal() -> None:
    flat = np.stack([np.full((32, 32), grey, np.uint8) for grey in (0, 0, 90, 200)])
    assert find_duplicates(flat) == Duplicates(exact=((0, 1),), near=((0, 1),))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_images_have_no_copies(count: int) -> None:
    assert find_duplicates(np.zeros((count, 32, 32), np.uint8)) == Duplicates(exact=(), near=())


def test_local_structure_does_not_change_with_contrast() -> None:
    rng = np.random.default_rng(0)
    picture = rng.uniform(60, 120, (1, 64, 64)).astype(np.float32)
    plain, stretched = local_structure(picture), local_structure(2 * picture)
    assert np.corrcoef(plain.ravel(), stretched.ravel())[0, 1] > 0.999


def test_whitening_makes_directions_alike_as_far_as_it_is_not_shrunk() -> None:
    # Two directions, of variance 100 and 1: by hand, each is divided by the root of its variance
    # plus the shrinkage's share of their mean, 50.5.
    rng = np.random.default_rng(0)
    coarse = (rng.normal(size=(100_000, 2)) * (10.0, 1.0)).astype(np.float32)
    whitening = Whitening.of(coarse)
    white = (coarse - whitening.mean) @ whitening.matrix
    shrinkage = 0.1 + 2 / (20 * 100_000)
    expected = [1 / (1 + shrinkage * 50.5), 100 / (100 + shrinkage * 50.5)]
    np.testing.assert_allclose(sorted(white.var(axis=0)), expected, rtol=0.03)


def test_duplicates_are_looked_for_once_a_pack(tmp_path: Path, slices: np.ndarray) -> None:
    path = tmp_path / "pack.npy"
    np.save(path, slices[[0, 1, 0]])
    pack = Pack(path, "a" * 64, SIDE_PX, {})
    first = duplicates_of(pack, tmp_path)
    calls: list[int] = []
    again = duplicates_of(pack, tmp_path, lambda done, total: calls.append(done))
    assert first == again == Duplicates(exact=((0, 2),), near=((0, 2),))
    assert calls == []


@pytest.mark.parametrize("text", ["", "[]", "{}", json.dumps({"exact": 3, "near": []})])
def test_a_torn_result_is_looked_for_again(tmp_path: Path, slices: np.ndarray, text: str) -> None:
    path = tmp_path / "pack.npy"
    np.save(path, slices[[0, 1, 0]])
    pack = Pack(path, "a" * 64, SIDE_PX, {})
    expected = duplicates_of(pack, tmp_path)
    [stored] = tmp_path.glob("duplicates-*.json")
    stored.write_text(text)
    assert duplicates_of(pack, tmp_path) == expected


def test_the_fixture_has_twelve_exact_pairs_and_six_groups(shared_data: Path) -> None:
    folder = shared_data / "data" / "fixture-duplicates"
    files = sorted(folder.glob("*.jpg"))
    images = np.stack([decode_image(file.read_bytes(), 128) for file in files])
    found = find_duplicates(images)
    # Names are groupNN_k.jpg: one cluster a group, and nothing else.
    groups: dict[str, list[int]] = {}
    for row, file in enumerate(files):
        groups.setdefault(file.stem.split("_")[0], []).append(row)
    assert len(groups) == 18
    assert set(found.near) == {tuple(rows) for rows in groups.values()}
    pairs = {tuple(rows) for name, rows in groups.items() if name.startswith("exact")}
    assert len(pairs) == 12
    assert pairs <= set(found.exact)
