"""The audit as a command: what is said about a set of images, and what is written."""

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from lightning_modules.data.audit import Audit, audit_images, group_duplicates
from lightning_modules.data.duplicates import Clusters, duplicates_of
from lightning_modules.data.manifest import EXTENSIONS, SPLITS, Manifest, hashed, read_manifest
from lightning_modules.data.pack import Pack, build_pack, default_cache_dir
from lightning_modules.data.splits import assign_splits
from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from search.data import Progress, describe_cluster
from search.sweep import DataSettings

# Enough to tell pictures apart, and to look at them.
AUDIT_SIDE_PX = 128

MAX_SHOWN = 10
MAX_SHEET_ROWS = 60
MAX_SHEET_COLUMNS = 8


def audit_folder(
    images: Path,
    *,
    group_pattern: str | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, Audit]:
    """Audit the images of a manifest, of class folders, or of a folder without classes.

    Args:
        images: The manifest, or the folder.
        group_pattern: As in a sweep's data.
        progress: Called with what is done, steps done, and steps in all.

    Returns:
        The manifest, with the groups and splits that a sweep of seed 0 would make where it has no
        splits, and what was found.

    Raises:
        InputError: If the manifest breaks a rule, or a class has no readable image.
    """
    tell = progress or (lambda what, done, total: None)
    manifest = _unlabelled(images) or read_manifest(images, group_pattern=group_pattern)
    pack, manifest = build_pack(
        manifest,
        image_size_px=AUDIT_SIDE_PX,
        cache_dir=default_cache_dir(),
        skip_bad_images=True,
        progress=lambda done, total: tell("decoding images", done, total),
    )
    has_splits = bool(manifest.frame["split"].any())
    if len(manifest.classes) > 1 and not has_splits:
        settings = DataSettings()
        told = functools.partial(tell, "comparing images")
        duplicates = duplicates_of(pack, default_cache_dir(), told)
        manifest = assign_splits(
            group_duplicates(manifest, duplicates),
            val_fraction=settings.val_fraction,
            test_fraction=settings.test_fraction,
            seed=0,
        )
    audit = audit_images(
        manifest,
        pack,
        default_cache_dir(),
        functools.partial(tell, "comparing images"),
    )
    return manifest, audit


def print_audit(console: Console, manifest: Manifest, audit: Audit) -> None:
    """Say what was found."""
    near = audit.duplicates.near
    frame = manifest.frame
    splits = ", ".join(f"{count} {split}" for split, count in _counts_by_split(manifest).items())
    console.print(
        f"{audit.num_images} images{splits and f' ({splits})'}, {len(manifest.classes)} "
        f"class{'es' if len(manifest.classes) > 1 else ''}, {frame['group_id'].nunique()} groups"
    )
    _print_some(
        console,
        f"{len(audit.unreadable)} cannot be read",
        [f"{Path(path).name}: {reason}" for path, reason in audit.unreadable.items()],
    )
    exact = audit.duplicates.exact
    console.print(
        f"{len(exact)} pictures are there several times to the pixel ({sum(map(len, exact))} "
        f"images); altered copies, and scans of one position, counted: {len(near)} "
        f"({sum(map(len, near))} images)",
        soft_wrap=True,
    )
    _print_some(
        console,
        f"{len(audit.leaks)} pictures lie in several splits",
        [describe_cluster(manifest, rows, "split") for rows in audit.leaks],
    )
    _print_some(
        console,
        f"{len(audit.conflicts)} pictures have several labels",
        [describe_cluster(manifest, rows, "label") for rows in audit.conflicts],
    )
    _print_some(
        console,
        f"{len(audit.outliers)} images are unlike the others",
        [f"{_name(manifest, row)}: {why}" for row, why in audit.outliers.items()],
    )
    if audit.macro_f1:
        _print_counts(console, audit)
        console.print(
            "macro-F1 on val that takes no network: always one class "
            f"{audit.macro_f1['constant']:.3f}, a linear model of the source alone "
            f"{audit.macro_f1['source']:.3f}, of 16 x 16 pixels {audit.macro_f1['thumbnail']:.3f}",
            soft_wrap=True,
        )


def write_audit(manifest: Manifest, audit: Audit, out: Path) -> None:
    """Write ``audit.json``, and a sheet of pictures for each thing to look at.

    Groups are hashed, and folders left out: both may name patients. The sheets show the images.

    Raises:
        InputError: If the folder cannot be written.
    """
    pack = build_pack(
        manifest, image_size_px=AUDIT_SIDE_PX, cache_dir=default_cache_dir(), skip_bad_images=True
    )[0]
    try:
        out.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_as_json(manifest, audit), indent=2, ensure_ascii=False)
        write_atomically(out / "audit.json", text.encode())
        for name, clusters in (
            ("leaks", audit.leaks),
            ("conflicts", audit.conflicts),
            ("duplicates", audit.duplicates.near),
        ):
            if clusters:
                _sheet(pack, clusters).save(out / f"{name}.png")
    except OSError as error:
        raise InputError(
            f"--out must be a folder that can be written; {out}: {error.strerror}: give another"
        ) from error


def write_grouped(
    images: Path, audit: Audit, path: Path, *, group_pattern: str | None = None
) -> None:
    """Write a manifest in which images that show one picture are of one group, and in one split.

    Where the images have no splits, none are written.

    Args:
        images: What was audited.
        audit: What was found.
        path: A new file beside the images.
        group_pattern: As for ``audit_folder``.

    Raises:
        InputError: If it would not lie beside the images, or exists.
    """
    manifest = read_manifest(images, group_pattern=group_pattern)
    readable = ~manifest.frame["path"].isin(list(audit.unreadable))
    kept = Manifest(manifest.root, manifest.frame[readable].reset_index(drop=True))
    if path.resolve().parent != manifest.root:
        raise InputError(
            f"a manifest lies where its paths start; got {path}: give a name in {manifest.root}"
        )
    if path.exists():
        raise InputError(f"a grouped manifest is a new file; {path} exists: give another name")
    group_duplicates(kept, audit.duplicates).write(path)


def _unlabelled(folder: Path) -> Manifest | None:
    """Return the images that lie in a folder itself; none if there are none, or a manifest."""
    if not folder.is_dir() or (folder / "manifest.csv").exists():
        return None
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS)
    if not names or any(path.is_dir() for path in folder.iterdir()):
        return None
    unlabelled = {"path": names, "label": "unlabelled", "group_id": names}
    frame = pd.DataFrame({**unlabelled, "source": "folder", "split": ""}, dtype="str")
    return Manifest(folder.resolve(), frame)


def _counts_by_split(manifest: Manifest) -> dict[str, int]:
    counts = {split: len(manifest.rows(split)) for split in SPLITS}
    return counts if any(counts.values()) else {}


def _print_some(console: Console, headline: str, lines: list[str]) -> None:
    console.print(headline + (":" if lines else ""))
    for line in lines[:MAX_SHOWN]:
        console.print(f"  {line}", soft_wrap=True)
    if len(lines) > MAX_SHOWN:
        console.print(f"  and {len(lines) - MAX_SHOWN} more; `--out DIR` lists all")


def _print_counts(console: Console, audit: Audit) -> None:
    table = Table(box=box.SIMPLE_HEAD, title="images by source and class", title_justify="left")
    table.add_column("source")
    for label in audit.counts.columns:
        table.add_column(str(label), justify="right")
    for source, row in audit.counts.iterrows():
        table.add_row(str(source), *(str(count) for count in row))
    console.print(table)
    confounded = [label for label in audit.counts.columns if (audit.counts[label] > 0).sum() == 1]
    if len(audit.counts) > 1 and confounded:
        console.print(
            f"from one source only: {', '.join(map(str, confounded))}; a network may learn the "
            "source instead of the class",
            soft_wrap=True,
        )


def _as_json(manifest: Manifest, audit: Audit) -> dict[str, Any]:
    def described(clusters: Clusters) -> list[list[dict[str, Any]]]:
        return [[_image(manifest, row) for row in rows] for rows in clusters]

    return {
        "manifest_digest": manifest.digest,
        "num_images": audit.num_images,
        "unreadable": [
            {"file": Path(path).name, "reason": reason} for path, reason in audit.unreadable.items()
        ],
        "exact_duplicates": described(audit.duplicates.exact),
        "near_duplicates": described(audit.duplicates.near),
        "leaks": described(audit.leaks),
        "conflicts": described(audit.conflicts),
        "outliers": [
            {**_image(manifest, row), "reason": why} for row, why in audit.outliers.items()
        ],
        "images_by_source_and_class": json.loads(audit.counts.to_json(orient="index")),
        "macro_f1_on_val": audit.macro_f1,
    }


def _image(manifest: Manifest, row: int) -> dict[str, Any]:
    cells = manifest.frame.iloc[row]
    return {
        "row": row + 1,
        "file": Path(cells["path"]).name,
        "label": cells["label"],
        "split": cells["split"],
        "source": cells["source"],
        "group": hashed(cells["group_id"]),
    }


def _name(manifest: Manifest, row: int) -> str:
    return Path(manifest.frame["path"].iloc[row]).name


def _sheet(pack: Pack, clusters: Clusters) -> Image.Image:
    """Return one row of pictures a cluster."""
    shown = [rows[:MAX_SHEET_COLUMNS] for rows in clusters[:MAX_SHEET_ROWS]]
    step_px = AUDIT_SIDE_PX + 4
    sheet = Image.new("L", (max(map(len, shown)) * step_px, len(shown) * step_px), 96)
    images = pack.images()
    for line, rows in enumerate(shown):
        for column, row in enumerate(rows):
            sheet.paste(Image.fromarray(images[row]), (column * step_px, line * step_px))
    return sheet
