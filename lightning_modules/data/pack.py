"""All images of a manifest, decoded once into a memory-mapped uint8 array keyed by content.

A first start reads and decodes every file; a second one only asks for sizes and times. A file
rewritten with its old size and modification time goes unnoticed: `touch` it, or empty the cache.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from lightning_modules.data.decode import (
    DECODER_VERSION,
    MIN_SIDE_PX,
    Pixels,
    decode_file,
    one_line,
)
from lightning_modules.data.manifest import Manifest, some_of
from lightning_modules.errors import InputError
from lightning_modules.files import write_atomically

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pack:
    """Decoded images on disk; row i belongs to row i of the manifest that came with it.

    Attributes:
        path: A .npy file of shape (N, image_size_px, image_size_px), uint8 luminance.
        digest: Sha256, in hex, over image size and the images' files in row order.
        image_size_px: Side of every image.
        skipped: Relative paths of the images left out, and why they could not be decoded.
    """

    path: Path
    digest: str
    image_size_px: int
    skipped: Mapping[str, str] = field(compare=False)  # a mapping has no hash

    def images(self) -> np.memmap[tuple[int, ...], np.dtype[np.uint8]]:
        """Return all images, mapped: pages come in as they are touched, shared by all processes.

        What is written to the array stays in this process; nobody should.

        Raises:
            InputError: If the file is gone or torn.
        """
        try:
            # Private and writable: torch warns of arrays that it could not write to.
            return np.lib.format.open_memmap(self.path, mode="c")
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path}: the pack of decoded images must stay in the cache; got "
                f"{one_line(error)}; start again to rebuild it"
            ) from error


def default_cache_dir() -> Path:
    """Return $NEUROSWEEP_CACHE, else $XDG_CACHE_HOME/neurosweep, else ~/.cache/neurosweep.

    Raises:
        InputError: If neither is set and the user has no home folder.
    """
    if own := os.environ.get("NEUROSWEEP_CACHE"):
        return Path(own).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if xdg.is_absolute():  # the XDG specification: anything else is ignored
        return xdg / "neurosweep"
    try:
        return Path.home() / ".cache" / "neurosweep"
    except RuntimeError as error:
        raise InputError(
            "the cache needs a folder; got no home folder; set NEUROSWEEP_CACHE"
        ) from error


def build_pack(
    manifest: Manifest,
    *,
    image_size_px: int,
    cache_dir: Path,
    skip_bad_images: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Pack, Manifest]:
    """Find the pack of a manifest in the cache, or decode the images into a new one.

    Processes of one node wait for each other; those of several nodes may decode twice, and the
    last one's equal file stays.

    Args:
        manifest: Which images, in which order.
        image_size_px: Side that every image is padded and resized to, in [8, 4096].
        cache_dir: Where packs lie; made, for this user alone, if it does not exist.
        skip_bad_images: Leave images out that cannot be decoded, instead of refusing.
        progress: Called with (done, total) in this thread while images are decoded, at most ten
            times a second.

    Returns:
        The pack, and the manifest without the rows that were left out.

    Raises:
        InputError: If images cannot be decoded, all of a class would be left out, or the cache
            cannot be written.
    """
    if not MIN_SIDE_PX <= image_size_px <= 4096:
        raise InputError(
            f"image_size_px lies in [{MIN_SIDE_PX}, 4096]; got {image_size_px}; use 224 if in doubt"
        )
    cache_dir = cache_dir.expanduser().absolute()  # workers start elsewhere
    root, paths = manifest.root, manifest.frame["path"].tolist()
    key = _stat_key(root, paths, image_size_px)
    look_up = functools.partial(_look_up, cache_dir, key, len(paths), image_size_px)
    try:
        if (found := look_up()) is None:
            cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)  # the images are patients'
            with _locked(cache_dir / f"{key}.lock"):
                if (found := look_up()) is None:
                    digest, bad, lasting = _build(
                        manifest,
                        image_size_px,
                        cache_dir,
                        skip_bad_images,
                        _now_and_then(progress),
                    )
                    found = digest, bad
                    # Not if a file changed meanwhile: the old times would name the new content.
                    if lasting and _stat_key(root, paths, image_size_px) == key:
                        record = json.dumps({"digest": digest, "bad": bad})
                        write_atomically(cache_dir / f"{key}.json", record.encode())
    except OSError as error:  # of images they are caught where they are read
        raise InputError(
            "the cache is a folder that can be written to and has room; got "
            f"{one_line(error)} in {cache_dir}; free space, or set NEUROSWEEP_CACHE"
        ) from error
    digest, bad = found
    if bad and not skip_bad_images:
        raise _bad_images(bad, manifest)
    kept = manifest.frame[~manifest.frame["path"].isin(list(bad))].reset_index(drop=True)
    if lost := sorted(set(manifest.classes) - set(kept["label"])):
        raise InputError(
            f"every class keeps at least one image; got only images that cannot be decoded for "
            f"{some_of([repr(label) for label in lost])}; repair them, or leave the class out"
        )
    path = _pack_path(cache_dir, len(kept), image_size_px, digest)
    return Pack(path, digest, image_size_px, bad), Manifest(manifest.root, kept)


@dataclass(frozen=True)
class _Row:
    """One file of a pack to be: its sha256, and its pixels or why there are none."""

    sha256: bytes
    pixels: Pixels | None
    reason: str = ""
    lasting: bool = True  # False: the same file may be readable next time


def _load(path: Path, image_size_px: int) -> _Row:
    try:
        pixels, sha256 = decode_file(path, image_size_px)
    except InputError as error:
        lasting = not isinstance(error.__cause__, MemoryError)
        return _Row(b"", None, str(error), lasting)
    except OSError as error:
        return _Row(b"", None, one_line(error), lasting=False)
    return _Row(sha256, pixels)


def _sha256(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _in_order(
    function: Callable[[Item], Result], items: Sequence[Item]
) -> Generator[Result, None, None]:
    """Yield like map, in threads (Pillow lets others run while it decodes), a few items ahead."""
    workers = os.cpu_count() or 1
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) >= 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _content_key(image_size_px: int, hashes: list[bytes]) -> str:
    return hashlib.sha256(
        f"{DECODER_VERSION} {image_size_px} ".encode() + b"".join(hashes)
    ).hexdigest()


def _stat_key(root: Path, paths: list[str], image_size_px: int) -> str:
    """Return a key that changes whenever a file may have changed; open none."""
    states: list[object] = [DECODER_VERSION, image_size_px, str(root.resolve())]
    for row, path in enumerate(paths, start=1):
        try:
            status = os.stat(f"{root}/{path}")  # noqa: PTH116  (with Path, twice the time)
        except OSError as error:
            raise InputError(
                f"every image of the manifest exists; got {error.strerror} for "
                f"{Path(path).name!r:.200} in row {row}; add it or remove its row"
            ) from error
        states += [path, status.st_size, status.st_mtime_ns]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _pack_path(cache_dir: Path, n_images: int, image_size_px: int, digest: str) -> Path:
    return cache_dir / f"pack-{n_images}x{image_size_px}px-{digest}.npy"


def _intact(path: Path, n_images: int, image_size_px: int) -> bool:
    try:
        images = np.lib.format.open_memmap(path, mode="r")
        size = path.stat().st_size
    except (OSError, ValueError):  # absent, torn, or something else altogether
        return False
    shape = (n_images, image_size_px, image_size_px)
    whole = images.offset + images.nbytes == size
    return whole and images.shape == shape and images.dtype == np.uint8


def _look_up(
    cache_dir: Path, key: str, n_rows: int, image_size_px: int
) -> tuple[str, dict[str, str]] | None:
    """Return the digest of unchanged files, and why some are bad; None if no pack is whole."""
    try:
        record = json.loads((cache_dir / f"{key}.json").read_bytes())
        digest, bad = record["digest"], dict(record["bad"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    path = _pack_path(cache_dir, n_rows - len(bad), image_size_px, digest)
    return (digest, bad) if _intact(path, n_rows - len(bad), image_size_px) else None


def _build(
    manifest: Manifest,
    image_size_px: int,
    cache_dir: Path,
    skip_bad_images: bool,
    progress: Callable[[int, int], None],
) -> tuple[str, dict[str, str], bool]:
    """Return digest, bad images' reasons, and whether these last; raise the cache's OSErrors."""
    paths = manifest.frame["path"].tolist()
    files = [manifest.root / path for path in paths]
    # The same images may have been packed before, under another root or with other times. Hashing
    # is far cheaper than decoding, but reads everything once more, so only where such a pack is.
    if any(cache_dir.glob(f"pack-{len(files)}x{image_size_px}px-*.npy")):
        with contextlib.suppress(OSError):  # of an image: decoding reports it, with its path
            digest = _content_key(image_size_px, list(_in_order(_sha256, files)))
            pack = _pack_path(cache_dir, len(files), image_size_px, digest)
            if _intact(pack, len(files), image_size_px):
                return digest, {}, True
    hashes: list[bytes] = []
    bad: dict[str, str] = {}
    lasting = True
    temporary = cache_dir / f".pack-{uuid.uuid4().hex}.tmp"
    # Made and locked while nobody else looks for what was left behind.
    with _locked(cache_dir / "room.lock"):
        _make_room(cache_dir, len(files) * image_size_px**2)
        # Written, not mapped: on a full disk a store to a mapped page kills the process (SIGBUS).
        file = temporary.open("xb")
        _lock(file)
    rows = _in_order(functools.partial(_load, image_size_px=image_size_px), files)
    try:
        with file, contextlib.closing(rows):
            _write_header(file, len(files), image_size_px)
            for done, (path, row) in enumerate(zip(paths, rows, strict=True), start=1):
                if row.pixels is None:
                    bad[path] = row.reason
                    lasting &= row.lasting
                else:
                    hashes.append(row.sha256)
                    file.write(row.pixels.data)
                progress(done, len(files))
            if bad and not (skip_bad_images and hashes):
                raise _bad_images(bad, manifest)
            file.seek(0)
            _write_header(file, len(hashes), image_size_px)
            file.flush()
            os.fsync(file.fileno())
        digest = _content_key(image_size_px, hashes)
        temporary.replace(_pack_path(cache_dir, len(hashes), image_size_px, digest))
    finally:
        temporary.unlink(missing_ok=True)
    return digest, bad, lasting


def _write_header(file: BinaryIO, n_images: int, image_size_px: int) -> None:
    """Write a header of the same length for any number of images: it can be rewritten."""
    shape = (n_images, image_size_px, image_size_px)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _make_room(cache_dir: Path, needed: int) -> None:
    """Remove what killed processes left, and fail early where the pack cannot fit."""
    for left in cache_dir.glob(".pack-*.tmp"):
        # Whoever writes one holds its lock; where there are no locks, nobody can tell.
        with contextlib.suppress(OSError), left.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()
    if (free := shutil.disk_usage(cache_dir).free) < needed:
        gib = f"{free / 2**30:.1f} GiB free of {needed / 2**30:.1f} GiB needed"
        raise OSError(errno.ENOSPC, gib)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as file:
        _lock(file)
        yield


def _lock(file: BinaryIO) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: nodes decode twice
        fcntl.flock(file, fcntl.LOCK_EX)


def _now_and_then(progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
    last_s = 0.0

    def call(done: int, total: int) -> None:
        nonlocal last_s
        if progress and (done == total or time.monotonic() - last_s >= 0.1):
            last_s = time.monotonic()
            progress(done, total)

    return call


def _bad_images(bad: Mapping[str, str], manifest: Manifest) -> InputError:
    # All of them: who repairs a collection wants the whole list, up to what a terminal can hold.
    paths = manifest.frame["path"].tolist()
    lines = [f"{manifest.name(row)} ({bad[path]})" for row, path in enumerate(paths) if path in bad]
    return InputError(
        f"every image is a readable PNG, JPEG or TIFF file; got {len(bad)} of {len(paths)} that "
        f"are not: {some_of(lines, limit=1000)}; repair or remove them, or leave them out with "
        "--skip-bad-images"
    )
