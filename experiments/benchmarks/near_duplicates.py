"""How many altered copies of real slices does the audit find, and what else does it join?

    uv run python experiments/benchmarks/near_duplicates.py --data MANIFEST.csv --out out.json

Each of ``--copies`` slices is altered in a dozen ways and put back into its set, one way at a time;
recall is the share that ends in one cluster with its original. What the set joins without them is
counted by groups: a cluster within one group (a patient's slices) is expected, one across groups is
to be looked at (``neurosweep audit --out`` draws them). 64-bit perceptual and difference hashes,
written out below as libraries have them, are compared at the distance at which they find as many.
"""

import argparse
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measurement import SHARED, provenance
from PIL import Image, ImageEnhance, ImageFilter
from scipy.fft import dctn

from lightning_modules.data.decode import decode_file
from lightning_modules.data.duplicates import find_duplicates
from lightning_modules.data.manifest import read_manifest

SIDE_PX = 128
Alteration = Callable[[Image.Image], Image.Image]


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert("L")


def crop(image: Image.Image, side: float, left: float, top: float) -> Image.Image:
    px = image.width
    box = (left * px, top * px, (left + side) * px, (top + side) * px)
    return image.resize(image.size, Image.Resampling.BILINEAR, box)


ALTERATIONS: dict[str, Alteration] = {
    "brighter (x 1.6 + 20)": lambda image: image.point(lambda grey: min(255, int(1.6 * grey) + 20)),
    "darker (x 0.4)": lambda image: image.point(lambda grey: int(0.4 * grey)),
    "gamma 0.5": lambda image: image.point(lambda grey: int(255 * (grey / 255) ** 0.5)),
    "contrast x 2": lambda image: ImageEnhance.Contrast(image).enhance(2.0),
    "sharpened": lambda image: image.filter(ImageFilter.UnsharpMask(2, 250)),
    "blurred": lambda image: image.filter(ImageFilter.GaussianBlur(1.5)),
    "JPEG, quality 20": lambda image: jpeg(image, 20),
    "cropped to 95 %": lambda image: crop(image, 0.95, 0.04, 0.01),
    "cropped to 90 %, centre": lambda image: crop(image, 0.90, 0.05, 0.05),
    "cropped to 90 %, corner": lambda image: crop(image, 0.90, 0.0, 0.10),
    "cropped to 85 %": lambda image: crop(image, 0.85, 0.10, 0.05),
    "mirrored": lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "brighter, sharpened, cropped, mirrored, JPEG": lambda image: jpeg(
        crop(image.point(lambda grey: min(255, int(1.3 * grey) + 10)), 0.96, 0.03, 0.01)
        .filter(ImageFilter.UnsharpMask(2, 150))
        .transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        50,
    ),
}


def perceptual_hash(image: np.ndarray) -> np.ndarray:
    """64 bits: the signs of the 8 x 8 lowest DCT coefficients of 32 x 32 pixels, above median."""
    small = np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.LANCZOS), float)
    lowest = dctn(small, norm="ortho")[:8, :8].ravel()
    return np.asarray(lowest > np.median(lowest[1:]))


def difference_hash(image: np.ndarray) -> np.ndarray:
    """64 bits: whether each of 8 x 9 pixels is brighter than the one to its left."""
    small = np.asarray(Image.fromarray(image).resize((9, 8), Image.Resampling.LANCZOS), float)
    return np.asarray(small[:, 1:] > small[:, :-1]).ravel()


def recall(images: np.ndarray, picked: np.ndarray, copies: np.ndarray) -> float:
    clusters = find_duplicates(np.concatenate([images, copies])).near
    cluster_of = {row: index for index, rows in enumerate(clusters) for row in rows}
    together = [
        cluster_of.get(int(row), -1) == cluster_of.get(len(images) + place, -2)
        for place, row in enumerate(picked)
    ]
    return float(np.mean(together))


def compare_hash(
    hash_of: Callable[[np.ndarray], np.ndarray],
    images: np.ndarray,
    picked: np.ndarray,
    copies: dict[str, np.ndarray],
    strangers: np.ndarray,
) -> dict[str, Any]:
    """What a hash joins at the distance at which it finds nine in ten of upright copies."""
    bits = np.stack([hash_of(image) for image in images]).astype(np.float32)
    distances: dict[str, np.ndarray] = {}
    for name, altered in copies.items():
        theirs = np.stack([hash_of(image) for image in altered]).astype(np.float32)
        distances[name] = np.abs(theirs - bits[picked]).sum(axis=1)
    upright = [name for name in copies if "mirrored" not in name and "upside" not in name]
    distance = int(np.percentile(np.concatenate([distances[name] for name in upright]), 90))
    signs = 2 * bits - 1
    apart = (signs.shape[1] - signs @ signs.T) / 2
    joined = np.triu(apart <= distance, 1) & strangers
    return {
        "distance": distance,
        "recall": {name: float((values <= distance).mean()) for name, values in distances.items()},
        "pairs_across_groups": int(joined.sum()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "dev-mri5" / "manifest.csv")
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    manifest = read_manifest(options.data)
    paths = [manifest.root / path for path in manifest.frame["path"]]
    images = np.stack([decode_file(path, SIDE_PX)[0] for path in paths])
    groups = manifest.frame["group_id"].to_numpy()
    start_s = time.perf_counter()
    clusters = find_duplicates(images).near
    seconds = time.perf_counter() - start_s
    across = [rows for rows in clusters if len(set(groups[list(rows)])) > 1]
    picked = np.random.default_rng(0).choice(len(images), options.copies, replace=False)
    copies = {
        name: np.stack([np.asarray(alter(Image.fromarray(images[row]))) for row in picked])
        for name, alter in ALTERATIONS.items()
    }
    ours = {name: recall(images, picked, altered) for name, altered in copies.items()}
    strangers = groups[:, None] != groups[None, :]
    hashes = {
        "perceptual hash": compare_hash(perceptual_hash, images, picked, copies, strangers),
        "difference hash": compare_hash(difference_hash, images, picked, copies, strangers),
    }
    print(
        f"{len(images)} images in {seconds:.1f} s; {len(clusters)} clusters, {len(across)} of them"
    )
    print(f"across groups, with {sum(map(len, across))} images")
    for name, value in hashes.items():
        print(f"{name}: distance {value['distance']}, {value['pairs_across_groups']} pairs across")
    print(f"{'recall':46} ours  " + "  ".join(hashes))
    for name, found in ours.items():
        theirs = "  ".join(f"{value['recall'][name]:15.3f}" for value in hashes.values())
        print(f"{name:46} {found:.3f} {theirs}")
    if options.out:
        record = {
            **provenance("numpy", "pillow", "scipy"),
            "num_images": len(images),
            "seconds": seconds,
            "clusters": len(clusters),
            "clusters_across_groups": len(across),
            "images_across_groups": sum(map(len, across)),
            "recall": ours,
            "hashes": hashes,
        }
        options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
