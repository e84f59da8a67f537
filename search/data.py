"""A sweep's images: found or simulated, split, and packed, the same way every time."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_modules.data.manifest import Manifest, read_manifest
from lightning_modules.data.pack import Pack, build_pack, default_cache_dir
from lightning_modules.data.phantom import write_phantoms
from lightning_modules.data.splits import assign_splits
from lightning_modules.errors import InputError
from search.sweep import Sweep


def prepare_data(
    sweep: Sweep, progress: Callable[[int, int], None] | None = None
) -> tuple[Manifest, Pack]:
    """Return a sweep's manifest with its splits, and its pack; built once, then found.

    Args:
        sweep: Its data settings and seed.
        progress: Called with images done and images in all, while decoding.

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
        progress=progress,
    )
    manifest = assign_splits(
        manifest,
        val_fraction=settings.val_fraction,
        test_fraction=settings.test_fraction,
        seed=sweep.seed,
    )
    return manifest, pack


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


def _phantom_folder(sweep: Sweep) -> Path:
    assert sweep.data.phantom is not None  # noqa: S101  narrows the type
    settings = json.dumps(dataclasses.asdict(sweep.data.phantom), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return default_cache_dir() / "phantoms" / digest
