"""Checkpoints that are whole or absent, wherever a sweep's files are, and known by digest."""

import hashlib
import io
import logging
from collections.abc import Callable
from typing import IO, Any

import torch
from lightning_fabric.plugins import CheckpointIO

from lightning_modules.errors import InputError
from lightning_modules.pickled_bombs import refuse_bombs
from search.study.recorded import CheckpointFile
from search.study.sweep_files import StorageError, SweepFiles
from search.tuning.patience import patiently


class AtomicCheckpointIO(CheckpointIO):
    """Writes Lightning's checkpoints atomically and reads them without unpickling objects.

    Its paths are names among a sweep's files.

    Lightning's own renames too, but without fsync, and reports success when it was not permitted
    to write (Lightning issue 21800).

    Args:
        files: The sweep's.

    Attributes:
        last_digest: SHA-256 of the file written last.
    """

    def __init__(self, files: SweepFiles) -> None:
        self._files = files
        self.last_digest = ""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        content = buffer.getbuffer()
        self.last_digest = hashlib.sha256(content).hexdigest()
        self._files.write(str(path), content)

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
        file = patiently(
            lambda: self._files.open(str(path)),
            (StorageError,),
            tell=logging.getLogger(__name__).warning,
        )
        with file:
            return _load(file, str(path), map_location)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint that may be gone already."""
        self._files.remove([str(path)])


def read_checkpoint(files: SweepFiles, checkpoint: CheckpointFile) -> dict[str, Any] | None:
    """Read a checkpoint that is the one that was recorded; none if it is gone.

    Raises:
        InputError: If it is another, or torn.
    """
    try:
        with files.open(checkpoint.path) as file:
            content = file.read()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content).hexdigest() != checkpoint.digest:
        raise InputError(
            f"a checkpoint must be the one that was recorded; {files.location}/{checkpoint.path} "
            "is torn or changed: export another trial with `--trial`"
        )
    return _load(io.BytesIO(content), checkpoint.path)


def _load(
    file: IO[bytes], name: str, map_location: Callable[..., Any] | None = None
) -> dict[str, Any]:
    try:
        refuse_bombs(file)
        loaded = torch.load(file, map_location=map_location or "cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # as of files of weights, of many kinds
        raise InputError(
            f"checkpoint {name} must hold tensors and plain values; use the trial's own file"
        ) from error
    if not isinstance(loaded, dict):
        raise InputError(f"checkpoint {name} must hold a mapping; use the trial's own file")
    return loaded
