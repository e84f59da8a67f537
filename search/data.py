"""A sweep's images: found or simulated, split, and packed, the same way every time."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_modules.data.audit import clusters_with_several, group_duplicates
from lightning_modules.data.duplicates import Duplicates, duplicates_of
from lightning_modules.data.manifest import Manifest, read_manifest, some_of, with_splits_of
from lightning_modules.data.pack import Pack, build_pack, default_cache_dir
from lightning_modules.data.phantom import write_phantoms
from lightning_modules.data.splits import assign_splits
from lightning_modules.errors import InputError
from search.sweep import Sweep

Progress = Callable[[str, int, int], None]


def prepare_data(sweep: Sweep, progress: Progress | None = None) -> tuple[Manifest, Pack]:
    """Return a sweep's manifest with its splits, and its pack; built once, then found.

    Where the manifest has no splits, images that show one picture are put into one, unless the
    sweep allows them to be torn apart. A sweep that was launched has the splits that it recorded.

    Args:
        sweep: Its data settings and seed.
        progress: Called with what is done, steps done, and steps in all.

    Raises:
        InputError: If the images cannot be used as they are.
    """
    settings = sweep.data
    if settings.phantom is not None:
        path = write_phantoms(settings.phantom, _phantom_folder(sweep))
    else:
        assert settings.path is not None  # noqa: S101  config has checked it; narrows the type
        path = Path(settings.path)
    manifest = read_manifest(path, group_pattern=settings.group_pattern)
    pack, manifest = build_pack(
        manifest,
        image_size_px=settings.image_size_px,
        cache_dir=default_cache_dir(),
        skip_bad_images=settings.skip_bad_images,
        progress=progress and functools.partial(progress, "decoding images"),
    )
    if sweep.files.has("sweep.yaml"):
        # Launched before: which images are copies is a matter of rounding at the margin.
        with sweep.files.local("manifest.csv") as written:
            return with_splits_of(manifest, written), pack
    has_splits = bool(manifest.frame["split"].any())
    if settings.duplicates == "group" or (settings.duplicates == "refuse" and not has_splits):
        manifest = group_duplicates(manifest, _duplicates(pack, progress))
    elif progress is not None:
        _duplicates(pack, progress)  # for ``check_leakage``, which finds them then
    manifest = assign_splits(
        manifest,
        val_fraction=settings.val_fraction,
        test_fraction=settings.test_fraction,
        seed=sweep.seed,
    )
    return manifest, pack


def check_leakage(sweep: Sweep, manifest: Manifest, pack: Pack) -> dict[str, int]:
    """Refuse images that show one picture in two splits, unless the sweep allows it.

    Args:
        sweep: Says what becomes of them.
        manifest: With its splits.
        pack: Its images.

    Returns:
        For the record: ``pictures`` that lie in two splits, and the ``images`` of them; empty if
        there are none.

    Raises:
        InputError: If there are any; it names the first.
    """
    leaks = clusters_with_several(manifest, _duplicates(pack).near, "split")
    if not leaks:
        return {}
    if sweep.data.duplicates != "allow":
        shown = some_of([describe_cluster(manifest, rows, "split") for rows in leaks], limit=5)
        raise InputError(
            "an image's copies must lie in one split, or a score is of memory; got "
            f"{len(leaks)} picture(s) in two: {shown}: look with `neurosweep audit`, launch with "
            "--group-duplicates to move them together, or with --allow-leakage, which every result "
            "then says"
        )
    return {"pictures": len(leaks), "images": sum(map(len, leaks))}


def describe_cluster(manifest: Manifest, rows: Sequence[int], column: str) -> str:
    """Return one image for each value of a column that a picture has, by file name."""
    members = manifest.frame.iloc[list(rows)].drop_duplicates(column)
    return " = ".join(
        f"{Path(path).name} ({value})"
        for path, value in zip(members["path"], members[column], strict=True)
    )


def check_same_data(facts: Mapping[str, Any], manifest: Manifest, pack: Pack) -> None:
    """Refuse images that are not the ones a sweep was launched on.

    Args:
        facts: The record's.
        manifest: As it is now.
        pack: As it is now.

    Raises:
        InputError: If either differs.
    """
    for name, now in (("manifest_digest", manifest.digest), ("pack_digest", pack.digest)):
        then = facts[name]
        if then != now:
            raise InputError(
                f"a sweep goes on with the images it was launched on; {name} was {then[:12]} and "
                f"is {now[:12]}: restore them, or launch a new sweep"
            )


def _duplicates(pack: Pack, progress: Progress | None = None) -> Duplicates:
    told = progress and functools.partial(progress, "comparing images")
    return duplicates_of(pack, default_cache_dir(), told)


def _phantom_folder(sweep: Sweep) -> Path:
    assert sweep.data.phantom is not None  # noqa: S101  narrows the type
    settings = json.dumps(dataclasses.asdict(sweep.data.phantom), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return default_cache_dir() / "phantoms" / digest
