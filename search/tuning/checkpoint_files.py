"""Which checkpoint files of a sweep are whole, and which may go; none is opened as a checkpoint."""

import hashlib
from collections.abc import Iterable

from search.study.recorded import CheckpointFile, Epoch
from search.study.sweep_files import SweepFiles


def is_whole(files: SweepFiles, checkpoint: CheckpointFile) -> bool:
    """Tell whether a checkpoint is there and is the one that was recorded."""
    try:
        with files.open(checkpoint.path) as file:
            # An object storage's is in memory, which is no file to the type checker.
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    except FileNotFoundError:
        return False
    return digest.hexdigest() == checkpoint.digest


def newest_whole(files: SweepFiles, epochs: tuple[Epoch, ...]) -> Epoch | None:
    """Return the latest epoch whose checkpoints to go on from are whole; none to start over."""
    for epoch in reversed(epochs):
        needed = [file for file in (epoch.last, epoch.best) if file is not None]
        if epoch.last is not None and all(is_whole(files, file) for file in needed):
            return epoch
    return None


def folder_of(number: int) -> str:
    """Return the folder of a trial's checkpoints, among the sweep's files."""
    return f"trials/{number:05d}"


def remove_all_but(files: SweepFiles, number: int, keep: Iterable[str]) -> None:
    """Delete a trial's checkpoints except the given ones."""
    kept = set(keep)
    files.remove(name for name in files.names(folder_of(number)) if name not in kept)
