"""What is wrong with a set of images before anything is trained on it.

Copies, copies in two splits or under two labels, odd files, and how much of the task is solved by
where an image comes from. Nothing here looks at a network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image

from lightning_modules.data.duplicates import Clusters, Duplicates, duplicates_of
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack

THUMBNAIL_PX = 16

# An outlier's longer side is this many times the median's, or the other way round; its aspect this
# many times the median aspect; its mode rarer than this share of the images.
SIZE_FACTOR = 3.0
ASPECT_FACTOR = 1.5
RARE_MODE = 0.01


@dataclass(frozen=True)
class Audit:
    """What was found; rows are the manifest's.

    Attributes:
        num_images: Images that could be read.
        unreadable: Relative paths of the others, and why.
        duplicates: Clusters of images that show one picture.
        leaks: Those clusters that lie in more than one split.
        conflicts: Those clusters that have more than one label.
        outliers: Why a row is one.
        counts: Images of each label (columns) from each source (rows).
        macro_f1: On val, without a network: ``constant`` of one answer always, ``source`` of a
            linear model that sees the source alone, ``thumbnail`` of one that sees 16 x 16 pixels,
            which a network has to beat. Empty if images have no labels.
    """

    num_images: int
    unreadable: dict[str, str]
    duplicates: Duplicates
    leaks: Clusters
    conflicts: Clusters
    outliers: dict[int, str]
    counts: pd.DataFrame
    macro_f1: dict[str, float]


def audit_images(
    manifest: Manifest,
    pack: Pack,
    cache_dir: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Audit:
    """Look for everything that ``Audit`` holds.

    Args:
        manifest: With a split in every row, if it has labels.
        pack: Its images; of any size, 128 px are enough.
        cache_dir: Where packs lie; what takes long is kept there.
        progress: Called with steps done and steps in all.
    """
    duplicates = duplicates_of(pack, cache_dir, progress)
    images = pack.images()
    thumbnails = np.stack([_thumbnail(image) for image in images])
    macro_f1 = {}
    if len(manifest.classes) > 1:
        sources = pd.get_dummies(manifest.frame["source"]).to_numpy(np.float64)
        macro_f1 = {
            "constant": _constant_macro_f1(manifest),
            "source": _linear_macro_f1(manifest, sources),
            "thumbnail": _linear_macro_f1(manifest, thumbnails),
        }
    return Audit(
        num_images=len(manifest.frame),
        unreadable=dict(pack.skipped),
        duplicates=duplicates,
        leaks=clusters_with_several(manifest, duplicates.near, "split"),
        conflicts=clusters_with_several(manifest, duplicates.near, "label"),
        outliers=_outliers(manifest, thumbnails),
        counts=pd.crosstab(manifest.frame["source"], manifest.frame["label"]),
        macro_f1=macro_f1,
    )


def clusters_with_several(manifest: Manifest, clusters: Clusters, column: str) -> Clusters:
    """Return the clusters whose rows differ in a column."""
    values = manifest.frame[column].to_numpy()
    return tuple(rows for rows in clusters if len(set(values[list(rows)])) > 1)


def group_duplicates(manifest: Manifest, duplicates: Duplicates) -> Manifest:
    """Return a manifest in which images that show one picture are of one group.

    Groups that share a picture become one, under the name of the first. Where splits are given,
    a group that then lies in several goes to train if any of it was there, else to val: no image is
    learned from and tested on.

    Args:
        manifest: With a split in every row, or in none.
        duplicates: The images' clusters.
    """
    frame = manifest.frame
    groups = frame["group_id"].to_numpy(dtype=object)
    above: dict[str, str] = {}

    def first_name(group: str) -> str:
        while group in above:
            group = above[group]
        return group

    for rows in duplicates.near:
        names = list(dict.fromkeys(first_name(groups[row]) for row in rows))
        above.update(dict.fromkeys(names[1:], names[0]))
    joined = pd.Series([first_name(group) for group in groups], index=frame.index, dtype="str")
    splits = frame["split"].groupby(joined).agg(_one_split)
    return Manifest(
        manifest.root,
        frame.assign(group_id=joined, split=joined.map(splits).astype("str")),
    )


def _one_split(splits: "pd.Series[str]") -> str:
    found = set(splits)
    if len(found) == 1:
        return str(splits.iloc[0])
    return "train" if "train" in found else "val"


def _outliers(manifest: Manifest, thumbnails: npt.NDArray[np.float64]) -> dict[int, str]:
    headers = [_header(manifest.root / path) for path in manifest.frame["path"]]
    sides_px = np.array([max(size) for size, _ in headers], dtype=float)
    aspects = np.array([max(size) / min(size) for size, _ in headers])
    modes = pd.Series([mode for _, mode in headers])
    median_px, median_aspect = float(np.median(sides_px)), float(np.median(aspects))
    share_of = modes.map(modes.value_counts(normalize=True)).to_numpy()
    outliers = {}
    for row, ((width_px, height_px), mode) in enumerate(headers):
        why = []
        if not 1 / SIZE_FACTOR <= sides_px[row] / median_px <= SIZE_FACTOR:
            why.append(f"{width_px} x {height_px} px where {median_px:.0f} px are usual")
        if aspects[row] > ASPECT_FACTOR * median_aspect:
            why.append(f"aspect {aspects[row]:.2f} where {median_aspect:.2f} is usual")
        if share_of[row] < RARE_MODE:
            why.append(f"mode {mode}, as {share_of[row]:.1%} of the images")
        if np.ptp(thumbnails[row]) < 0.02:
            why.append("nothing to see")
        if why:
            outliers[row] = "; ".join(why)
    return outliers


def _header(path: Path) -> tuple[tuple[int, int], str]:
    with Image.open(path, formats=("PNG", "JPEG", "TIFF")) as image:
        return image.size, image.mode


def _thumbnail(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    small = Image.fromarray(image).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel() / 255


def _linear_macro_f1(manifest: Manifest, features: npt.NDArray[np.float64]) -> float:
    """Fit a linear model to train, and return its macro-F1 on val."""
    # Imported here: it takes a second.
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels, train, val = manifest.labels(), manifest.rows("train"), manifest.rows("val")
    linear = LogisticRegression(class_weight="balanced", C=0.01, max_iter=1000)
    model = make_pipeline(StandardScaler(), linear)
    model.fit(features[train], labels[train])
    return float(
        f1_score(
            labels[val],
            model.predict(features[val]),
            average="macro",
            labels=range(len(manifest.classes)),
            zero_division=0,
        )
    )


def _constant_macro_f1(manifest: Manifest) -> float:
    """Return the macro-F1 of answering val's most frequent class: one class's F1 over all."""
    labels = manifest.labels()[manifest.rows("val")]
    share = float(np.bincount(labels).max()) / len(labels)
    return 2 * share / (1 + share) / len(manifest.classes)
