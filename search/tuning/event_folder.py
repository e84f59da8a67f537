"""A folder that TensorBoard's writer can append to, wherever a sweep's files are."""

import tempfile
import time
from contextlib import suppress
from pathlib import Path

from search.study.sweep_files import LocalFiles, StorageError, SweepFiles

# Each time, the whole of a growing file goes up: this many times as long passes until the next.
REST = 20.0


class EventFolder:
    """A run's event files: in the sweep's folder, or on their way into its object storage.

    Objects cannot be appended to. A worker that is killed may lose the curves of its last epochs,
    but not what the record holds of them.

    Args:
        files: The sweep's.
        name: The folder's, among them.

    Attributes:
        path: Where to write.
    """

    def __init__(self, files: SweepFiles, name: str) -> None:
        self._files = files
        self._name = name
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        # How much of each file is there.
        self._sizes: dict[str, int] = {}
        self._next_s = 0.0
        if isinstance(files, LocalFiles):
            self.path = files.folder / name
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="neurosweep-events-")
            self.path = Path(self._scratch.name)

    def fetch(self) -> None:
        """Bring here what earlier writers have put there, to be read.

        Raises:
            StorageError: If the storage does not answer.
        """
        if self._scratch is None:
            return
        for name in self._files.names(self._name):
            with self._files.open(name) as file:
                content = file.read()
            path = self.path / Path(name).name
            path.write_bytes(content)
            self._sizes[path.name] = len(content)

    def publish(self) -> None:
        """Put what was written where others see it, if it was not done, or tried, just now."""
        if time.monotonic() < self._next_s:
            return
        start_s = time.monotonic()
        with suppress(StorageError):
            self.upload()
        end_s = time.monotonic()
        self._next_s = end_s + REST * (end_s - start_s)

    def upload(self) -> None:
        """Put what was written where others see it, at once.

        Raises:
            StorageError: If the storage does not take it.
        """
        if self._scratch is None:
            return
        for path in self.path.iterdir():
            content = path.read_bytes()
            if len(content) != self._sizes.get(path.name):
                self._files.write(f"{self._name}/{path.name}", content)
                self._sizes[path.name] = len(content)

    def close(self) -> None:
        """Put everything where others see it; nothing fails for curves."""
        with suppress(StorageError):
            self.upload()
        if self._scratch is not None:
            self._scratch.cleanup()
