"""How often a bundle was scored on test images: once is a result, more often is tuning."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically

LOG_FILE = "evaluations.json"

_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Run:
    """Which evaluation of a bundle this is.

    Attributes:
        on_these_images: 1 for the first on this manifest or on these images, 2 for the second.
        of_this_bundle: The same, on whatever images.
        earlier: When it was evaluated on these images before; ISO 8601, UTC.
    """

    on_these_images: int
    of_this_bundle: int
    earlier: tuple[str, ...]


def log_evaluation(folder: Path, entry: dict[str, Any]) -> Run:
    """Append an evaluation to a bundle's log.

    Args:
        folder: The bundle.
        entry: ``date``, ``manifest_digest``, ``images_digest``, ``model_digest``, and whatever
            else is to be kept. An earlier one is of the same images if either of the first two
            digests is equal.

    Returns:
        Which evaluation it is.

    Raises:
        InputError: If the log cannot be read or written.
    """
    with _locked(folder):
        entries = read_log(folder)
        same = [
            earlier
            for earlier in entries
            if any(earlier.get(key) == entry[key] for key in ("manifest_digest", "images_digest"))
        ]
        run = Run(len(same) + 1, len(entries) + 1, tuple(str(e.get("date")) for e in same))
        text = json.dumps(
            [*entries, {**entry, "run": run.on_these_images}], indent=2, ensure_ascii=False
        )
        try:
            write_atomically(folder / LOG_FILE, f"{text}\n".encode())
        except OSError as error:
            raise InputError(
                f"an evaluation is logged in the bundle; {folder / LOG_FILE}: {error.strerror}: "
                "free space, or copy the bundle to where it can be written"
            ) from error
    return run


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return a bundle's evaluations, first to last; none if it was never evaluated.

    Raises:
        InputError: If the log is not what was written.
    """
    path = folder / LOG_FILE
    if not path.exists() and not path.is_symlink():
        return []
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MAX_BYTES:
            raise ValueError("it is no file of at most 16 MiB")
        entries = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it is no list of evaluations")
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"{path} must list the bundle's evaluations; {error!s:.200}: restore it, or export the "
            "bundle again"
        ) from error
    return entries


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder, so that two evaluations at once are both logged."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
