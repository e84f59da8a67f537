"""Write the report of sweeps: read them, check that they can stand on one page, draw, write."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from search.report.bundles import BundleFindings, is_made_of, read_bundle
from search.report.findings import Findings, read_findings
from search.report.page import write_page
from search.study.record import Record


def write_report(
    records: Sequence[Record], out: Path, *, bundles: Sequence[Path] = (), with_images: bool = False
) -> Path:
    """Write one page on one sweep, or on several of the same images.

    Args:
        records: The sweeps'; they may still run.
        out: The file, which is replaced if it is there.
        bundles: Made of the sweeps: their evaluations and explanations are shown.
        with_images: Show overlays of the bundles' explanations, which are images of the data.

    Returns:
        The file.

    Raises:
        InputError: If the sweeps cannot be compared, a bundle is not of one of them, a trial is
            still missing, or the file cannot be written.
    """
    _check_out(out)
    _check_comparable(records)
    read = [read_bundle(folder, with_images=with_images) for folder in bundles]
    for bundle in read:
        if not any(is_made_of(bundle, record) for record in records):
            names = ", ".join(record.sweep.name for record in records)
            raise InputError(
                f"a report shows bundles of its own sweeps, {names}; {bundle.name} was not made of "
                "their trials and images: leave it out, or name its sweep"
            )
    sweeps = [_read(record, read) for record in records]
    written = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, neurosweep {version('neurosweep')}"
    page = write_page(sweeps, written)
    try:
        write_atomically(out, page.encode("utf-8", "replace"))
        out.chmod(0o644)
    except OSError as error:
        raise InputError(
            f"a report must be written; {out}: {error.strerror}: free space, or give another file "
            "with --out"
        ) from error
    return out


def _read(record: Record, bundles: Sequence[BundleFindings]) -> Findings:
    return read_findings(record, [bundle for bundle in bundles if is_made_of(bundle, record)])


def _check_out(out: Path) -> None:
    """Refuse, before anything is computed, what cannot be written or must not be replaced."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"a report is a page; got {out}: give a name that ends in .html")
    if out.is_dir() or out.is_symlink():
        raise InputError(f"a report is a file; {out} is none: give another with --out")
    folder = out.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(
            f"a report goes into a folder that can be written; {folder} is none: give another "
            "with --out"
        )


def _check_comparable(records: Sequence[Record]) -> None:
    first = records[0]
    if len({record.sweep.location for record in records}) < len(records):
        raise InputError("a report names each sweep once; got one twice: name it once")
    for record in records[1:]:
        for name, of in (("manifest_digest", "images and splits"), ("pack_digest", "pixels")):
            one, other = (str(r.facts.get(name)) for r in (first, record))
            if one != other:
                raise InputError(
                    f"sweeps on one page are of the same {of}, or their values do not compare; "
                    f"{first.sweep.name} has {name} {one[:12]} and {record.sweep.name} "
                    f"{other[:12]}: write a report of each"
                )
        if record.sweep.metric != first.sweep.metric:
            raise InputError(
                "sweeps on one page rank by the same metric, or their values do not compare; "
                f"{first.sweep.name} by {first.sweep.metric}, {record.sweep.name} by "
                f"{record.sweep.metric}: write a report of each"
            )
