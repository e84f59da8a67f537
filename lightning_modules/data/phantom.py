"""Simulated axial brain MRI slices in five classes, for the quickstart and for tests.

Every structure is a closed-form function of millimetre coordinates, so the slices of a patient cut
one and the same head, at any image size. Head axes: x to the right of the image, y to the back of
the head (down the image), z up, with zero at the thalami.
"""

import csv
import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_modules.errors import InputError

CLASSES = ("benign_tumor", "malignant_tumor", "no_stroke", "no_tumor", "stroke")

# Recorded beside the manifest: files of an older generator must not pass as new.
_GENERATOR_VERSION = 1
_COLUMNS = ("path", "label", "group_id", "source", "split", "sequence", "mask")
_FIELD_OF_VIEW_MM = 208.0
_STACK_MM = 24.0
_HEAD_RADIUS_MM = 92.0
_CORTEX_MM = 3.6

# Grey levels before gain, bias, and noise. FLAIR suppresses fluid and inverts grey and white.
_LEVELS = {
    "T1CE": {"scalp": 0.85, "bone": 0.06, "marrow": 0.45, "csf": 0.13, "grey": 0.4, "white": 0.55},
    "FLAIR": {"scalp": 0.6, "bone": 0.05, "marrow": 0.25, "csf": 0.08, "grey": 0.6, "white": 0.45},
}

_Map = npt.NDArray[np.floating[Any]]
_Mask = npt.NDArray[np.bool_]
_Place = tuple[_Map, _Map, float]  # x, y, and z in millimetres
_Rng = np.random.Generator


@dataclass(frozen=True, kw_only=True)
class PhantomSettings:
    """What a phantom data set is a pure function of.

    Attributes:
        num_patients: Patients, dealt out over the five classes in turn.
        slices_per_patient: Axial slices of each patient.
        image_size_px: Height and width of each image.
        seed: Any integer that is not negative.
    """

    num_patients: int = 100
    slices_per_patient: int = 4
    image_size_px: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num_patients": 5, "slices_per_patient": 1, "image_size_px": 32, "seed": 0}
        for name, value in asdict(self).items():
            if value < least[name]:
                raise InputError(f"{name} must be at least {least[name]}, got {value}: raise it")


@dataclass(frozen=True)
class PhantomSlice:
    """One image and where its lesion is.

    Attributes:
        image: (H, W) uint8.
        lesion_mask: (H, W) bool; all False where the class has no lesion.
    """

    image: npt.NDArray[np.uint8]
    lesion_mask: _Mask


def _length(x: _Map, y: _Map) -> _Map:
    """As np.hypot, seven times as fast: nothing here can overflow."""
    length: _Map = np.sqrt(x * x + y * y)
    return length


class _Patient:
    """The head that all slices of a patient cut; it does not depend on the class."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng((seed, 0))
        self.seed = seed
        self.half_width_mm = rng.uniform(68, 78)
        self.half_length_mm = rng.uniform(86, 96)
        self.egg = rng.uniform(0.02, 0.07)
        self.scalp_mm = rng.uniform(3, 6)
        self.shell_mm = self.scalp_mm + rng.uniform(5, 8)  # from the skin to the dura
        self.atrophy = rng.uniform(0, 1)
        self.ventricle_mm = rng.uniform(3.0, 4.5) + 3.0 * self.atrophy
        self.asymmetry = rng.uniform(-0.08, 0.08)
        self.num_folds = int(rng.integers(10, 14))
        self.leukoaraiosis = rng.uniform(0, 1) ** 1.5
        self.middle_z_mm = rng.uniform(2, 32)
        self.tilt_rad = rng.normal(0, 0.07)
        self.shift_mm = rng.normal(0, 2.0, 2).tolist()

    def half_axes_mm(self, z_mm: float) -> tuple[float, float]:
        cut = math.sqrt(1 - (max(z_mm, 0) / _HEAD_RADIUS_MM) ** 2)
        return self.half_width_mm * cut, self.half_length_mm * cut

    def depth_mm(self, at: _Place) -> _Map:
        """Inside an egg with its broad end at the back, along the ray from its centre."""
        x, y, z_mm = at
        half_width_mm, half_length_mm = self.half_axes_mm(z_mm)
        wide = x / (half_width_mm * (1 + self.egg / half_length_mm * y))
        depth: _Map = _length(x, y) * (1 / (_length(wide, y / half_length_mm) + 1e-3) - 1)
        return depth


@dataclass(frozen=True)
class _Lesion:
    """The lesion of a patient as one slice cuts it; `contrast` and `oedema` go from 0 to 1."""

    kind: str
    x_mm: float
    y_mm: float
    radius_mm: float
    push: float
    contrast: float
    oedema: float
    rng: _Rng


@dataclass(frozen=True)
class _Head:
    """Maps of one slice, before the lesion is painted and the scanner spoils the image."""

    image: _Map
    depth_mm: _Map
    brain: _Map
    white: _Map
    fluid: _Map


def _waves(rng: _Rng, at: _Place, length_mm: float) -> _Map:
    """Smooth noise of unit variance; plane waves need no lattice and carry on between slices."""
    x, y, z_mm = at
    direction = rng.standard_normal((8, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    waves = (direction * rng.uniform(0.7, 1.4, (8, 1)) * (2 * np.pi / length_mm)).tolist()
    total = np.zeros_like(x)
    for (k_x, k_y, k_z), phase in zip(waves, rng.uniform(0, 2 * np.pi, 8).tolist(), strict=True):
        total += np.cos(k_x * x + (k_y * y + (k_z * z_mm + phase)))
    return total * math.sqrt(2 / 8)


def _inside(distance_mm: _Map, edge_mm: float) -> _Map:
    """Share of a pixel inside a border; `edge_mm` is the width of the partial-volume ramp."""
    share: _Map = np.clip(0.5 + distance_mm / edge_mm, 0, 1)
    return share


def _least(*maps: _Map) -> _Map:
    least: _Map = np.minimum.reduce(maps)
    return least


def _tubes(x: _Map, y: _Map, tubes: Sequence[tuple[float, ...]]) -> _Map:
    """Millimetres outside tapered tubes, each (x, y, radius) of one end and of the other."""
    distances = []
    for x0, y0, r0, x1, y1, r1 in tubes:
        d_x, d_y = x1 - x0, y1 - y0
        along = np.clip(((x - x0) * d_x + (y - y0) * d_y) / (d_x**2 + d_y**2), 0, 1)
        axis_mm = _length(x - (x0 + along * d_x), y - (y0 + along * d_y))
        distances.append(axis_mm - (r0 + along * (r1 - r0)))
    return _least(*distances)


def _spots(x: _Map, y: _Map, spots: _Map) -> _Map:
    """Sum of Gaussian spots, rows of (x, y, radius, height)."""
    total = np.zeros_like(x)
    for x0, y0, radius_mm, height in spots.tolist():
        total += height * np.exp(((x - x0) ** 2 + (y - y0) ** 2) * (-0.5 / radius_mm**2))
    return total


def _random_spots(rng: _Rng, count: int, reach: float, radius_mm: tuple[float, float]) -> _Map:
    """Rows for `_spots` about the ventricles, as far out as a share of the head's half axes."""
    angle, distance = rng.uniform(0, 2 * np.pi, count), rng.uniform(0.3, reach, count)
    place = (70 * np.cos(angle) * distance, 85 * np.sin(angle) * distance)
    return np.stack((*place, rng.uniform(*radius_mm, count), rng.uniform(0.4, 1, count)), axis=1)


def _ventricles(patient: _Patient, at: _Place) -> _Map:
    """Millimetres outside the ventricles: horns and a third ventricle low down, bodies above."""
    x, y, z_mm = at
    size = patient.ventricle_mm * (1 - ((z_mm - 14) / 24) ** 2)
    body = min(max((z_mm - 4) / 10, 0), 1) * size
    third = 1.2 + patient.atrophy - 2 * max(z_mm - 6, 0)
    near = 4 + 0.5 * patient.ventricle_mm
    tubes = [
        (near - 1, -6, 0.6 * size, near + 2, -18, 0.8 * size),
        (near + 2, -18, 0.8 * size, near + 9, -29, size - 2.0),
        (near, -6, body, near + 5, 20, body),
        (near + 7, 20, size - 1, near + 13, 38, 0.5 * size - 1),
        (0, -4, third, 0, 8, third + 1),
    ]
    return _tubes(np.abs(x) * (1 + patient.asymmetry * np.sign(x)), y, tubes)


def _fissures(patient: _Patient, at: _Place) -> _Map:
    """Millimetres from the midline fissure, the Sylvian fissures, and the basal cistern."""
    x, y, z_mm = at
    callosum_mm = 30 * math.sqrt(max(1 - (max(z_mm - 8, 0) / 24) ** 2, 0))
    midline = np.abs(x) + 2 * np.clip(callosum_mm - np.abs(y + 1), 0, None)
    high, low = -1.5 * max(z_mm - 12, 0), 1 - 1.5 * max(z_mm + 7, 0)
    outer = patient.half_width_mm - 12
    tubes = [
        (outer, -12, 1 + high, 41, -8, high),
        (41, -8, high, 39, 16, high),
        (0, -18, low + 4, 13, -21, low),
    ]
    return _least(midline, _tubes(np.abs(x), y, tubes))


def _draw_head(patient: _Patient, sequence: str, skull_at: _Place, brain_at: _Place) -> _Head:
    """Draw the healthy head; a mass displaces the brain but not the skull."""
    rng = np.random.default_rng((patient.seed, 1))
    level, pixel_mm = _LEVELS[sequence], _FIELD_OF_VIEW_MM / len(brain_at[0])
    atrophy, old = patient.atrophy, patient.leukoaraiosis

    skin = patient.depth_mm(skull_at) + _waves(rng, skull_at, 120)
    bone = skin - patient.scalp_mm - 0.7 * _waves(rng, skull_at, 60)
    dura = bone - (patient.shell_mm - patient.scalp_mm)
    depth = _least(dura, patient.depth_mm(brain_at) - patient.shell_mm)
    depth -= 1.2 + 2 * atrophy

    # No two brains have straight ventricles or fissures.
    x, y, z_mm = brain_at
    x, y = x + 1.5 * _waves(rng, brain_at, 38), y + 2.0 * _waves(rng, brain_at, 38)
    at = (x, y, z_mm)
    # Sulci are the zero lines of an angular wave that wanders with position; dividing it by its
    # slope gives millimetres. They are wider at the surface, and end at a varying depth.
    wander = 1.9 * _waves(rng, at, 52) + 0.9 * _waves(rng, at, 23)
    fold = np.sin(patient.num_folds * np.arctan2(y, x) + wander)
    slope = _length(*np.gradient(fold, pixel_mm)) + 1e-3
    reach_mm = 15 + 6 * _waves(rng, at, 30) + 0.3 * max(z_mm - 20, 0)
    sulci = np.abs(fold) / slope + 0.8 * np.clip(depth - reach_mm, 0, None)
    sulci -= (0.5 + atrophy) * (1.5 - np.clip(depth, 0, 20) / 20)
    folds = _least(sulci, _fissures(patient, at) - 0.7 - 0.8 * atrophy)
    pial, ventricles = _least(depth, folds), _ventricles(patient, at)

    nuclei = [(16, -24, 2, 16, -8, 2.5), (25, -10, 5, 29, 6, 3), (8, 5, 6, 12, 13, 6)]
    nuclear = 0.7 * min(max((16 - z_mm) / 8, 0), 1) * _inside(-_tubes(np.abs(x), y, nuclei), 3)
    parenchyma = _inside(_least(pial, ventricles), pixel_mm)
    white = _inside(pial - _CORTEX_MM, 1.5 * pixel_mm) * (1 - nuclear)
    matter = level["grey"] + (level["white"] - level["grey"]) * white
    matter *= 1 + 0.02 * _waves(rng, at, 9)

    # White-matter disease of age: bright in FLAIR, faintly dark in T1, and no lesion of any class.
    spots = _spots(x, y, _random_spots(rng, int(1 + 9 * old), 0.6, (1.3, 3.2)))
    caps = np.exp(-np.clip(ventricles, 0, None) / (1.5 + 5 * old))
    caps *= np.clip(0.6 + 0.4 * _waves(rng, at, 40), 0, 1)
    disease = np.clip((0.4 + 0.6 * old) * (spots + caps), 0, 1) * white
    matter += disease * (0.38 if sequence == "FLAIR" else -0.10)

    brain, skull = _inside(dura, pixel_mm), _inside(bone, pixel_mm)
    inner = level["csf"] + (matter - level["csf"]) * parenchyma
    if sequence == "T1CE":
        inner = np.maximum(inner, _draw_vessels(patient, rng, at, folds) * (depth > -3))
        inner = np.maximum(inner, 0.4 * _inside(0.6 - np.abs(dura - 0.8), 1.5))
    marrow = _inside(1.2 - np.abs(bone - 0.5 * (patient.shell_mm - patient.scalp_mm)), 2)
    outer = level["bone"] + (level["marrow"] - level["bone"]) * marrow
    outer = level["scalp"] * (1 - skull) + outer * skull
    image = (outer * (1 - brain) + inner * brain) * _inside(skin, pixel_mm)
    return _Head(image, depth, brain, white * parenchyma, brain * (1 - parenchyma))


def _draw_vessels(patient: _Patient, rng: _Rng, at: _Place, folds_mm: _Map) -> _Map:
    """What takes up contrast agent in a healthy head: veins, sinuses, falx, choroid plexus."""
    x, y, z_mm = at
    vessels = _random_spots(rng, int(rng.integers(8, 18)), 0.82, (0.8, 1.7))
    if rng.uniform() < 0.5:  # a vein as wide as a small metastasis
        vessels[0, 2] = rng.uniform(2.0, 3.4)
    vessels[:, :2] += rng.normal(0, 0.25, (len(vessels), 2)) * z_mm  # they run obliquely
    back_mm = patient.half_axes_mm(z_mm)[1] - patient.shell_mm
    deep = 0.9 if z_mm < 18 else 0.0
    sinuses = [(0, back_mm - 3, 2.6, 1.1), (0, 2 - back_mm, 1.4, 0.9), (1, 25, 1.6, deep)]
    plexus = [(-17, 27, 1.7, deep), (18, 26, 1.7, deep)]
    spots = _spots(x, y, np.concatenate((vessels, sinuses, plexus)))
    veins = _inside(0.5 - np.abs(folds_mm), 1.5) * np.clip(_waves(rng, at, 26) - 0.6, 0, 1)
    falx = 0.45 * _inside(0.5 - np.abs(x), 1.5) * _inside(np.abs(y) - 34, 6)
    enhanced: _Map = np.maximum.reduce([0.85 * spots, 0.9 * veins, falx])
    return enhanced


def _place_lesion(label: str, patient: _Patient, slice_mm: float) -> _Lesion:
    """Draw the lesion of a patient and cut it `slice_mm` above the middle of the stack."""
    rng = np.random.default_rng((patient.seed, 2, CLASSES.index(label)))
    # The lesion is taller than the stack, so that no slice of a patient with one is without.
    cut = math.sqrt(1 - ((slice_mm - rng.uniform(-4, 4)) / 20) ** 2)
    axes_mm = patient.half_axes_mm(patient.middle_z_mm + slice_mm)
    width_mm, length_mm = axes_mm[0] - patient.shell_mm, axes_mm[1] - patient.shell_mm
    side, choice = math.copysign(1, rng.uniform(-1, 1)), rng.uniform()
    x_mm, y_mm = side * rng.uniform(0.36, 0.58) * width_mm, rng.uniform(-0.5, 0.5) * length_mm
    kind, push = "glioma", rng.uniform(0.15, 0.5)
    radius_mm = rng.uniform(8, 25) * cut
    if label == "benign_tumor":
        kind, radius_mm, angle = "meningioma", 0.9 * radius_mm, rng.uniform(0, 2 * math.pi)
        if patient.middle_z_mm < 7 and choice < 0.7:  # above the sella
            x_mm, y_mm, radius_mm = rng.normal(0, 1.5), -20, 0.6 * radius_mm
        elif choice < 0.25:  # on the falx
            x_mm, y_mm = 0.75 * side * radius_mm, math.copysign(0.66, math.cos(angle)) * length_mm
        else:  # on the convexity
            surface_mm = 1 / math.hypot(math.cos(angle) / width_mm, math.sin(angle) / length_mm)
            x_mm = math.cos(angle) * (surface_mm - 0.6 * radius_mm)
            y_mm = math.sin(angle) * (surface_mm - 0.6 * radius_mm)
    elif label == "stroke" and choice < 0.3:
        kind, push, x_mm, y_mm, radius_mm = "lacune", 0, 0.8 * x_mm, 0.6 * y_mm, 3 + radius_mm / 4
    elif label == "stroke":  # a wedge with its tip beside the ventricle; the radius is 40 mm out
        kind, push, x_mm, y_mm, radius_mm = "infarct", 0, 12 * side, 0.1 * y_mm, 1.1 * radius_mm
    return _Lesion(kind, x_mm, y_mm, radius_mm, push, rng.uniform(), rng.uniform(), rng)


def _paint_lesion(lesion: _Lesion, head: _Head, at: _Place) -> tuple[_Map, _Mask]:
    """Return the image with the lesion in it, and the lesion's mask."""
    rng, image, size_mm = lesion.rng, head.image, lesion.radius_mm
    value: _Map
    x, y, _ = at
    d_x, d_y = x - lesion.x_mm, y - lesion.y_mm
    distance = _length(d_x, d_y)
    ragged, texture = _waves(rng, at, 22), _waves(rng, at, 11)
    if lesion.kind == "glioma":
        border = _least(size_mm * (1 + 0.2 * ragged + 0.07 * texture) - distance, head.depth_mm)
        swelling = border + size_mm * (0.2 + 0.8 * lesion.oedema) * (1 + 0.3 * ragged)
        image = image - 0.19 * _inside(swelling, 7) * head.white
        necrosis = _inside(border - (2.5 + 0.16 * size_mm) * (1 + 0.3 * texture), 3)
        rim = 0.62 + 0.3 * lesion.contrast + 0.07 * texture
        value = rim + (0.30 - 0.1 * lesion.contrast - rim) * necrosis
        weight = _inside(border, 2.5) * head.brain
    elif lesion.kind == "meningioma":
        border = size_mm * (1 + 0.04 * ragged) - distance
        swelling = border + size_mm * (lesion.oedema - 0.4)
        image = image - (0.15 if lesion.oedema > 0.6 else 0) * _inside(swelling, 7) * head.white
        cleft = _inside(border + 1.5, 2.5) * _inside(head.depth_mm, 3)
        tail = _inside(1.4 - np.abs(head.depth_mm + 1), 2)
        tail *= np.exp(-((distance / (1.4 * size_mm)) ** 2))
        image = np.maximum(image + (0.2 - image) * 0.6 * cleft, 0.9 * tail)
        value = 0.62 + 0.3 * lesion.contrast + 0.02 * texture
        weight = _inside(border, 1.5) * head.brain
    else:
        border = size_mm * (1 + 0.1 * ragged) - distance
        if lesion.kind == "infarct":
            side = math.copysign(1, lesion.x_mm)
            # Territories of the middle, anterior, and posterior artery about the hemisphere's axis.
            territory = rng.choice(3, p=(0.7, 0.12, 0.18))
            axis_rad = (rng.uniform(-0.9, 0.9), -1.3, 1.25)[territory]
            turn = np.abs(np.arctan2(d_y, side * d_x) - axis_rad)
            wedge = distance * (size_mm / 40 - turn)
            border = _least(wedge, distance - rng.uniform(4, 24)) + 2.5 * ragged
            border = _least(border, side * x - 1.5)
        value = image + (0.14 + 0.2 * lesion.contrast) * (1 + 0.15 * texture)
        weight = _inside(border, 6) * head.brain * (1 - head.fluid)
    # A small lesion on a coarse grid fills half of no pixel, but still has a place.
    return image + (value - image) * weight, weight > min(0.5, 0.9 * float(weight.max()))


def _blur(image: _Map, sigma_px: float) -> _Map:
    """Gaussian blur, by rolling: there is only air at the edges."""
    offsets = range(-math.ceil(3 * sigma_px), math.ceil(3 * sigma_px) + 1)
    weights = [math.exp(-0.5 * (offset / sigma_px) ** 2) for offset in offsets]
    for axis in (0, 1):
        shifted = (w * np.roll(image, k, axis) for k, w in zip(offsets, weights, strict=True))
        image = sum(shifted, np.zeros_like(image)) / sum(weights)
    return image


def render_slice(
    label: str, *, patient_seed: int, slice_index: int, slices_per_patient: int, image_size_px: int
) -> PhantomSlice:
    """Draw one axial slice.

    Args:
        label: One of `CLASSES`: the sequence and the lesion, on the same head for each class.
        patient_seed: Decides everything else about the patient and the scan.
        slice_index: From 0, the lowest slice, to `slices_per_patient` - 1.
        slices_per_patient: Slices that the stack is cut into.
        image_size_px: Height and width.

    Returns:
        The image and its lesion mask.
    """
    patient = _Patient(patient_seed)
    slice_mm = _STACK_MM * ((slice_index + 0.5) / slices_per_patient - 0.5)
    z_mm = patient.middle_z_mm + slice_mm
    pixel_mm = _FIELD_OF_VIEW_MM / image_size_px
    axis_mm = ((np.arange(image_size_px) + 0.5) * pixel_mm - _FIELD_OF_VIEW_MM / 2).astype("f4")
    across, down = axis_mm[None, :] - patient.shift_mm[0], axis_mm[:, None] - patient.shift_mm[1]
    cos, sin = math.cos(patient.tilt_rad), math.sin(patient.tilt_rad)
    x, y = cos * across + sin * down, cos * down - sin * across
    at = (x, y, z_mm)

    if label.startswith("no_"):
        image = _draw_head(patient, _sequence(label), at, at).image
        mask = np.zeros(image.shape, bool)
    else:
        lesion = _place_lesion(label, patient, slice_mm)
        d_x, d_y = x - lesion.x_mm, y - lesion.y_mm
        relative = _length(d_x, d_y) / lesion.radius_mm
        pull = lesion.push / (relative + 0.1) * np.exp(-((relative / 2.4) ** 2))
        displaced_at = (x - pull * d_x, y - pull * d_y, z_mm)
        head = _draw_head(patient, _sequence(label), at, displaced_at)
        image, mask = _paint_lesion(lesion, head, at)

    scan = np.random.default_rng((patient_seed, 3))
    image = _blur(image, scan.uniform(0.5, 1.1) / pixel_mm)
    image *= np.exp(0.10 * _waves(scan, at, 240)) * scan.uniform(0.7, 1.05)
    # The magnitude of a complex signal: Rician noise, so that air is not black.
    noise = np.random.default_rng((patient_seed, 4, slice_index)).standard_normal((2, *x.shape))
    noise *= scan.uniform(0.012, 0.045)
    image = _length(image + noise[0], noise[1])
    return PhantomSlice((255 * np.clip(image, 0, 1)).astype(np.uint8), mask)


def _sequence(label: str) -> str:
    return "FLAIR" if label.endswith("stroke") else "T1CE"


def write_phantoms(settings: PhantomSettings, folder: Path) -> Path:
    """Write images, masks, and a manifest, all or nothing.

    Args:
        settings: What to simulate.
        folder: Where to; left alone where it already holds the data of these settings.

    Returns:
        The path of the manifest; its `split` column is empty.

    Raises:
        InputError: The folder holds something else.
    """
    record = json.dumps({"generator": _GENERATOR_VERSION, **asdict(settings)})
    if not _is_complete(folder, record):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
            draft = Path(temporary) / "draft"
            _write_files(settings, draft)
            (draft / "phantom.json").write_text(record)
            try:
                draft.rename(folder)
            except OSError:
                # Another process may have been faster; its files are the same bytes.
                if not _is_complete(folder, record):
                    raise
    return folder / "manifest.csv"


def _is_complete(folder: Path, record: str) -> bool:
    """Whether the folder holds the data of this record; False where it is absent or empty."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    found = folder / "phantom.json"
    if (folder / "manifest.csv").is_file() and found.is_file() and found.read_text() == record:
        return True
    raise InputError(
        f"phantom folder must be empty or hold the same settings, found other files in {folder}; "
        "delete it or name another folder"
    )


def _write_files(settings: PhantomSettings, folder: Path) -> None:
    rows = []
    for index in range(settings.num_patients):
        label, group_id = CLASSES[index % len(CLASSES)], f"p{index + 1:04d}"
        patient_seed = int(np.random.SeedSequence((settings.seed, index)).generate_state(1)[0])
        kinds = ("images",) if label.startswith("no_") else ("images", "masks")
        for kind in kinds:
            (folder / kind / label).mkdir(parents=True, exist_ok=True)
        for slice_index in range(settings.slices_per_patient):
            result = render_slice(
                label,
                patient_seed=patient_seed,
                slice_index=slice_index,
                slices_per_patient=settings.slices_per_patient,
                image_size_px=settings.image_size_px,
            )
            name, sequence = f"{label}/{group_id}_s{slice_index}.png", _sequence(label)
            mask = f"masks/{name}" if "masks" in kinds else ""
            Image.fromarray(result.image).save(folder / "images" / name)
            if mask:
                Image.fromarray(result.lesion_mask.astype(np.uint8) * 255).save(folder / mask)
            source = f"phantom_{sequence.lower()}"
            rows.append((f"images/{name}", label, group_id, source, "", sequence, mask))
    with (folder / "manifest.csv").open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows([_COLUMNS, *rows])
