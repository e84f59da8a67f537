"""Which checkpoint files of a sweep are whole, and which may go; none is opened as a checkpoint."""

from collections.abc import Iterable
from pathlib import Path

from lightning_modules.files import sha256_of
from search.study.recorded import CheckpointFile, Epoch


def is_whole(folder: Path, checkpoint: CheckpointFile) -> bool:
    """Tell whether a checkpoint is there, is no link, and is the one that was recorded."""
    path = folder / checkpoint.path
    return path.is_file() and not path.is_symlink() and sha256_of(path) == checkpoint.digest


def newest_whole(folder: Path, epochs: tuple[Epoch, ...]) -> Epoch | None:
    """Return the latest epoch whose checkpoints to go on from are whole; none to start over."""
    for epoch in reversed(epochs):
        files = [file for file in (epoch.last, epoch.best) if file is not None]
        if epoch.last is not None and all(is_whole(folder, file) for file in files):
            return epoch
    return None


def remove_all_but(folder: Path, keep: Iterable[Path]) -> None:
    """Delete a trial's checkpoints except the given ones, and the folder if it is left empty."""
    kept = set(keep)
    for path in folder.glob("*"):
        if path not in kept:
            path.unlink(missing_ok=True)
    if not kept and folder.is_dir():
        folder.rmdir()
