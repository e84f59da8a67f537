"""What a bundle is evaluated on: test rows of its own data, and all of an external set."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from lightning_modules.data.manifest import Manifest, read_manifest, some_of
from lightning_modules.data.pack import build_pack, default_cache_dir
from lightning_modules.errors import InputError

if TYPE_CHECKING:  # a bundle is evaluated without Optuna, if no sweep is given
    from search.sweep import Sweep

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images to be classified, decoded.

    Attributes:
        pixels: Shape ``(N, H, H)``, uint8 grey, mapped.
        labels: Shape ``(N,)``, indices into the bundle's classes.
        groups: Shape ``(N,)``; may be patients' names.
        sources: Shape ``(N,)``.
        manifest_digest: Of the manifest that was given, with all its rows.
        images_digest: Of the content of the N files.
        num_skipped: Rows left out because they could not be decoded.
    """

    pixels: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[np.str_]
    sources: npt.NDArray[np.str_]
    manifest_digest: str
    images_digest: str
    num_skipped: int


def read_manifest_or_sweep(path: Path | str) -> Manifest:
    """Return a manifest; of a sweep's folder the sweep's, with the splits that it has assigned.

    Args:
        path: As for `read_manifest`, or a sweep's folder, or, as text, its address.
    """
    sweep = sweep_at(path)
    if sweep is None:
        return read_manifest(Path(path))
    from search.data import prepare_data

    return prepare_data(sweep)[0]


def sweep_at(path: Path | str) -> "Sweep | None":
    """Return the sweep that a path or an address is of; none if it is a manifest or a folder."""
    if isinstance(path, Path) and not (path / "sweep.yaml").is_file():
        return None
    from search.results import open_sweep

    return open_sweep(str(path), "sweeps")


def read_own(path: Path | str, classes: tuple[str, ...]) -> Manifest:
    """Return the manifest that a bundle was trained with, all rows.

    Args:
        path: As for `read_manifest`, or the folder or address of the sweep that it came from, which
            knows the splits it has assigned.
        classes: The bundle's.

    Raises:
        InputError: If the classes are not the bundle's, or no row is a test row.
    """
    manifest = read_manifest_or_sweep(path)
    if set(manifest.classes) != set(classes):
        raise InputError(
            f"{path}: the classes are the bundle's, {some_of([*map(repr, classes)])}; got "
            f"{some_of([*map(repr, manifest.classes)])}; give the manifest that it was trained "
            "with, or evaluate other images with --external"
        )
    if not len(manifest.rows("test")):
        got = sorted(set(manifest.frame["split"]) - {""})
        remedy = (
            "mark the locked images"
            if got
            else "the sweep has assigned them: give its folder, such as sweeps/NAME, instead"
        )
        raise InputError(
            f"{path}: the column split marks the test rows; got "
            f"{'only ' + ' and '.join(got) if got else 'no splits'}; {remedy}"
        )
    return manifest


def take_test_rows(manifest: Manifest) -> Manifest:
    """Return the test rows alone, numbered anew."""
    frame = manifest.frame.iloc[manifest.rows("test")].reset_index(drop=True)
    return Manifest(manifest.root, frame)


def read_external(path: Path, classes: tuple[str, ...]) -> Manifest:
    """Return a data set from elsewhere, all rows, whatever their split.

    Raises:
        InputError: If it has classes that the bundle has not.
    """
    manifest = read_manifest(path)
    if foreign := sorted(set(manifest.classes) - set(classes)):
        raise InputError(
            f"{path}: the classes of an external set are among the bundle's, "
            f"{some_of([*map(repr, classes)])}; got {some_of([*map(repr, foreign)])}; rename them, "
            "or leave them out"
        )
    return manifest


def count_named_alike(external: Manifest, own: Manifest) -> int:
    """Return how many groups of an external set have the name of a group of a bundle's own data.

    Groups that are named by their image's path are not counted: folders are named alike often.
    """

    def names(manifest: Manifest) -> set[str]:
        frame = manifest.frame
        return set(frame["group_id"][frame["group_id"] != frame["path"]])

    return len(names(external) & names(own))


def decode(
    rows: Manifest,
    digest: str,
    *,
    classes: tuple[str, ...],
    image_size_px: int,
    skip_bad_images: bool = False,
    progress: Progress,
) -> ImageSet:
    """Decode the images of a manifest, or find them decoded in the cache.

    Args:
        rows: What is to be classified.
        digest: Of the whole manifest that they are from.
        classes: The bundle's, in the order of its logits.
        image_size_px: The bundle's.
        skip_bad_images: Leave images out that cannot be decoded.
        progress: Called with what is done, how many, and of how many.

    Raises:
        InputError: If images cannot be decoded.
    """
    pack, kept = build_pack(
        rows,
        image_size_px=image_size_px,
        cache_dir=default_cache_dir(),
        skip_bad_images=skip_bad_images,
        progress=lambda done, total: progress("decoding", done, total),
    )
    frame = kept.frame
    labels = pd.Categorical(frame["label"], categories=list(classes)).codes
    return ImageSet(
        pixels=pack.images(),
        labels=np.asarray(labels, dtype=np.int64),
        groups=frame["group_id"].to_numpy(dtype=np.str_),
        sources=frame["source"].to_numpy(dtype=np.str_),
        manifest_digest=digest,
        images_digest=pack.digest,
        num_skipped=len(pack.skipped),
    )
