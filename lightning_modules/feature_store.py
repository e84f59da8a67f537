"""Computed features as files on the node: mapped by every worker, bounded in size, never torn."""

import contextlib
import errno
import fcntl
import json
import math
import mmap
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

# Before the values: a line of JSON that says what they are; a page, so that the values are aligned.
HEADER_BYTES = 4096
SUFFIX = ".features"
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file of features holds.

    Attributes:
        shape: Images first, channels last.
        dtype: torch's name of it.
        worth_s: What computing them took, to weigh against what reading them takes.
        boot: Which start of the system they were written under. Files are not fsynced, which would
            cost more than computing them again: after a power cut they may have holes.
    """

    shape: tuple[int, ...]
    dtype: str
    worth_s: float
    boot: str

    @property
    def num_bytes(self) -> int:
        """Length of the values."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Moment:
    """A time that does not change when the time of day is set.

    Attributes:
        boot: Which start of which system it is a time of.
        s: On that one's monotonic clock, which all its processes share.
    """

    boot: str
    s: float


class FeatureStore:
    """A folder of feature files, each known by a key that says everything it depends on.

    Several workers of a node may use it at once: a file appears whole, under a lock that one of
    them holds while it computes, and what is mapped stays readable when its file is removed. Of an
    equal folder on a network each node would see the others' files; locks work there too, but
    reading is what it is for: keep it on a disk of the node.

    Args:
        folder: Where the files lie; made if it does not exist, for this user alone.
        limit_bytes: All files together stay below it.
        since: When this sweep began; for nodes that it did not begin on, now. Files used later are
            not removed for files that are worth less a byte.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, since: Moment) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self._boot = current_boot()
        self.since_s = since.s if since.boot == self._boot else time.monotonic()

    def find(self, key: str) -> Tensor | None:
        """Return what is stored under a key, mapped and read-only by convention; none if nothing.

        A file that is torn, or written before the system was last started, counts as nothing.
        """
        path = self.path_of(key)
        try:
            with path.open("rb") as file:
                header = _read_header(file)
                if not self._is_whole(file, header):
                    return None
                # Private and writable, so that torch takes it; nobody writes, so nothing is copied.
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            _mark_used(path)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        values = torch.frombuffer(mapped, dtype=DTYPES[header.dtype], offset=HEADER_BYTES)
        return values.view(header.shape)

    def has(self, key: str) -> bool:
        """Tell whether ``find`` would find something; it does not count as used by that."""
        try:
            with self.path_of(key).open("rb") as file:
                return self._is_whole(file, _read_header(file))
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _is_whole(self, file: IO[bytes], header: Header) -> bool:
        num_bytes = os.fstat(file.fileno()).st_size
        return num_bytes == HEADER_BYTES + header.num_bytes and header.boot == self._boot

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator["Claim | None"]:
        """Hold a key while its features are computed; none if another worker holds it.

        A worker that dies lets go of it, and leaves nothing that could be taken for features.

        Raises:
            OSError: If the folder cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # the images are patients'
        path = self.folder / f".{key}.tmp"
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise
                yield None
                return
            try:
                # Whoever held it before may have renamed or removed the file that is locked here.
                yield Claim(self, key, path, file) if _is_at(file, path) else None
            finally:
                if _is_at(file, path):
                    path.unlink()

    def time_round_trip(self, block: Tensor, device: torch.device) -> float:
        """Return the seconds that it takes to write a block, and to read it back to a device."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        path = self.folder / f".{uuid.uuid4().hex}.trial"
        try:
            start_s = time.perf_counter()
            with path.open("xb") as file:
                file.write(block.cpu().view(torch.uint8).numpy().data)
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            torch.frombuffer(mapped, dtype=torch.uint8).to(device, copy=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            return time.perf_counter() - start_s
        finally:
            path.unlink(missing_ok=True)

    def path_of(self, key: str) -> Path:
        """Return where a key's features lie."""
        return self.folder / f"{key}{SUFFIX}"

    def remove_for(
        self, claim: "Claim", num_bytes: int, *, worth_s: float, only_free: bool
    ) -> bool:
        """Remove what is worth less than a claim's features; nothing if that is not enough."""
        others = [entry for entry in self._files() if entry.path != claim.path]
        excess = sum(entry.num_bytes for entry in others) + num_bytes - self.limit_bytes
        if only_free:
            return excess <= 0
        # The longest unused of earlier sweeps first, then what is soonest computed again.
        idle = [entry for entry in others if entry.used_s < self.since_s]
        cheap = [
            entry
            for entry in others
            if entry.used_s >= self.since_s and entry.worth_s_per_byte < worth_s / num_bytes
        ]
        idle.sort(key=lambda entry: entry.used_s)
        cheap.sort(key=lambda entry: entry.worth_s_per_byte)
        going = []
        for entry in idle + cheap:
            if excess <= 0:
                break
            going.append(entry)
            excess -= entry.num_bytes
        if excess > 0:
            return False
        for entry in going:
            entry.path.unlink(missing_ok=True)
        return True

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Be the only worker of the node that counts and makes room."""
        with (self.folder / "room.lock").open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _files(self) -> Iterator["_Entry"]:
        """Yield every file that takes room; remove those whose writer is gone, or that are torn."""
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another worker was faster
                status = path.stat()
                if path.suffix == ".tmp":
                    with path.open("rb") as file:
                        if _is_free(file):
                            path.unlink()
                            continue
                    yield _Entry(path, status.st_size, math.inf, math.inf)
                elif path.suffix == SUFFIX:
                    with path.open("rb") as file:
                        header = _header_or_none(file)
                    if header is None or header.boot != self._boot:
                        path.unlink()
                        continue
                    worth = header.worth_s / status.st_size
                    yield _Entry(path, status.st_size, status.st_mtime, worth)


@dataclass(frozen=True)
class Claim:
    """A key that one worker computes features for, and the file that they go into.

    Attributes:
        store: Where it was claimed.
        key: What it will be found under.
        path: Where it lies until it is whole.
        file: Locked.
    """

    store: FeatureStore
    key: str
    path: Path
    file: IO[bytes]

    def reserve(self, num_bytes: int, *, worth_s: float, only_free: bool = False) -> bool:
        """Set room aside, removing other files that are worth less.

        Files not used since the sweep began go first, the longest unused before the others; then
        those that took fewer seconds a byte to compute.

        Args:
            num_bytes: Length of the values to be written.
            worth_s: What computing them takes.
            only_free: Remove nothing: of use to others, perhaps, is no reason to.

        Returns:
            Whether there is room; if not, nothing was removed.
        """
        needed = num_bytes + HEADER_BYTES
        with self.store.alone():
            if not self.store.remove_for(self, needed, worth_s=worth_s, only_free=only_free):
                return False
            self.file.truncate(needed)  # counted by others from now on
        return True

    def write(self, blocks: Iterable[Tensor], *, worth_s: float) -> None:
        """Write features block by block; they can be found when it returns.

        Args:
            blocks: Shape ``(B, ...)``, contiguous, on the CPU, one after another.
            worth_s: What computing them takes.

        Raises:
            OSError: If the disk is full; nothing is left of it.
        """
        num_images, shape, dtype = 0, torch.Size(), torch.float32
        self.file.seek(HEADER_BYTES)
        for block in blocks:
            self.file.write(block.view(torch.uint8).numpy().data)
            num_images, shape, dtype = num_images + len(block), block.shape[1:], block.dtype
        header = Header(
            shape=(num_images, *shape), dtype=str(dtype), worth_s=worth_s, boot=current_boot()
        )
        self.file.truncate()
        self.file.seek(0)
        self.file.write(json.dumps(asdict(header)).encode().ljust(HEADER_BYTES))
        self.file.flush()
        _mark_used(self.path)
        self.path.rename(self.store.path_of(self.key))


@dataclass(frozen=True)
class _Entry:
    path: Path
    num_bytes: int
    used_s: float
    worth_s_per_byte: float


def _mark_used(path: Path) -> None:
    """Say in a file's times that it is in use, on the clock of ``Moment``.

    The system's own follow the time of day; what was written under another start goes anyway.
    """
    now_s = time.monotonic()
    os.utime(path, (now_s, now_s))


def _read_header(file: IO[bytes]) -> Header:
    header = Header(**json.loads(file.read(HEADER_BYTES)))
    return Header(**{**asdict(header), "shape": tuple(header.shape)})


def _header_or_none(file: IO[bytes]) -> Header | None:
    try:
        return _read_header(file)
    except (ValueError, KeyError, TypeError):
        return None


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Tell whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_free(file: IO[bytes]) -> bool:
    """Tell whether nobody holds a file's lock."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def current_moment() -> Moment:
    """Return what time it is on this system."""
    return Moment(current_boot(), time.monotonic())


def current_boot() -> str:
    """Return what is different after the system is started anew; empty where it does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
