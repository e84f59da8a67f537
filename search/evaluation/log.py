"""How often test images were looked at: once is a result, more often is tuning.

A bundle has a log of its own, which travels with it; a sweep has one of all that was made of it.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_modules.errors import InputError
from search.study.sweep_files import LocalFiles, SweepFiles

LOG_FILE = "evaluations.json"

_MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Run:
    """Which evaluation this is.

    Attributes:
        on_these_images: 1 for the first on this manifest or on these images, of this bundle or any
            other of its sweep; 2 for the second.
        of_this_bundle: The same of this bundle alone, on whatever images.
        earlier: When these images were looked at before; ISO 8601, UTC.
    """

    on_these_images: int
    of_this_bundle: int
    earlier: tuple[str, ...]


def log_evaluation(folder: Path, entry: dict[str, Any], sweep: SweepFiles | None = None) -> Run:
    """Append an evaluation to a bundle's log, and to its sweep's.

    Args:
        folder: The bundle.
        entry: ``date``, ``manifest_digest``, ``images_digest``, ``model_digest``, and whatever
            else is to be kept. An earlier one is of the same images if either of the first two
            digests is equal.
        sweep: The files of the sweep whose test images they are, if it is at hand. Two evaluations
            at once are both logged there if it is a folder; an object storage has no locks.

    Returns:
        Which evaluation it is.

    Raises:
        InputError: If a log cannot be read or written.
    """
    bundle = LocalFiles(str(folder))
    with contextlib.ExitStack() as held:
        for files in (bundle, sweep):
            if isinstance(files, LocalFiles):
                held.enter_context(_locked(files.folder))
        own, of_sweep = read_looks(bundle), [] if sweep is None else read_looks(sweep)
        # One look may stand in both, and a baseline's is one with its rival's.
        known = {earlier.get("date") for earlier in of_sweep}
        is_baseline = entry.get("as") == "baseline"
        unknown = [look for look in own if look.get("date") not in known and _is_same(look, entry)]
        looks = [
            look
            for look in of_sweep
            if _is_same(look, entry) and not (is_baseline and look.get("date") == entry["date"])
        ]
        dates = sorted(str(look.get("date")) for look in (*unknown, *looks))
        run = Run(len(dates) + 1, len(own) + 1, tuple(dates))
        logged = {**entry, "run": run.on_these_images}
        if sweep is not None:
            _write(sweep, [*of_sweep, *unknown, *([] if is_baseline else [logged])])
        _write(bundle, [*own, logged])
    return run


def read_log(folder: Path) -> list[dict[str, Any]]:
    """Return a bundle's evaluations, first to last; none if it was never evaluated.

    Raises:
        InputError: If the log is not what was written.
    """
    return read_looks(LocalFiles(str(folder)))


def read_looks(files: SweepFiles) -> list[dict[str, Any]]:
    """Return the evaluations that a bundle, or a sweep, has logged; as `read_log`."""
    try:
        if isinstance(files, LocalFiles):
            path = files.folder / LOG_FILE
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise ValueError("it is no file")
        with files.open(LOG_FILE) as log:
            content = log.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError("it is larger than 16 MiB")
        entries = json.loads(content.decode())
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError("it is no list of evaluations")
        if not all(isinstance(entry.get("date", ""), str) for entry in entries):
            raise ValueError("a date is no text")
        json.dumps(entries, ensure_ascii=False).encode()  # as it is written again
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(
            f"{files.location}/{LOG_FILE} must list the evaluations of a bundle, or of a sweep's; "
            f"{error!s:.200}: restore it, or export the bundle again"
        ) from error
    return entries


def _is_same(look: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Tell whether a look was at the same test images."""
    return any(look.get(key) == entry[key] for key in ("manifest_digest", "images_digest"))


def _write(files: SweepFiles, entries: list[dict[str, Any]]) -> None:
    text = json.dumps(entries, indent=2, ensure_ascii=False)
    try:
        files.write(LOG_FILE, f"{text}\n".encode())
    except OSError as error:
        raise InputError(
            f"an evaluation is logged in bundle and sweep; {files.location}/{LOG_FILE}: "
            f"{error.strerror or error}: free space, or copy it to where it can be written"
        ) from error


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
