"""Checkpoints that are whole or absent: written aside, fsynced, renamed, and known by digest."""

import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning_fabric.plugins import CheckpointIO

from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically
from lightning_modules.state_dicts import refuse_bombs


class AtomicCheckpointIO(CheckpointIO):
    """Writes Lightning's checkpoints atomically and reads them without unpickling objects.

    Lightning's own renames too, but without fsync, and reports success when it was not permitted
    to write (Lightning issue 21800).

    Attributes:
        last_digest: SHA-256 of the file written last.
    """

    def __init__(self) -> None:
        self.last_digest = ""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint to a temporary name, fsync it, and rename it.

        Its folder has to be there: one that has vanished must not be made anew beneath a mount.
        """
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        self.last_digest = hashlib.sha256(content).hexdigest()
        target = Path(path)
        write_atomically(target, content)
        _fsync_folder(target.parent)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint; tensors and plain values only, whatever is asked for.

        Raises:
            InputError: If it is none, or holds anything else.
        """
        try:
            refuse_bombs(Path(path))
            loaded = torch.load(Path(path), map_location=map_location or "cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # as of files of weights, of many kinds
            raise InputError(
                f"checkpoint {path} must hold tensors and plain values; use the trial's own file"
            ) from error
        if not isinstance(loaded, dict):
            raise InputError(f"checkpoint {path} must hold a mapping; use the trial's own file")
        return loaded

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint that may be gone already."""
        Path(path).unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
