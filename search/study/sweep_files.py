"""A sweep's files, by name, in a folder or in an object storage: whole or absent either way.

Not through pathlib-like layers: there a file that cannot be looked at counts as absent, and a trial
whose checkpoint is absent starts over. Here what is not there is an empty list or a
``FileNotFoundError``, and a storage that does not answer is a ``StorageError``.
"""

import contextlib
import errno
import functools
import io
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lightning_modules.errors import InputError
from lightning_modules.files import fsync_folder, write_atomically

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

# What obstore does for us; Azure's would do, too, but nobody has tried it.
OBJECT_STORAGE = re.compile(r"(s3|gs)://[a-z0-9][a-z0-9._-]{1,62}(/[A-Za-z0-9._-]+)*")

# How long a request is tried again, which a busy storage asks for now and then. One that is away
# for longer is waited for by who has something to lose, see ``patience``.
RETRY_S = 5

# An object below this size is one request; a larger one goes up in parts, and appears at the last.
PART_BYTES = 16 * 2**20


class StorageError(OSError):
    """The object storage does not answer; by this name a worker's fault is known."""


class StorageRefusedError(StorageError):
    """It answers, and refuses: the bucket is not there, the key is wrong or has expired."""


def is_object_storage(location: str) -> bool:
    """Tell whether a location is an address, and no folder."""
    return "://" in location


class LocalFiles:
    """Files in a folder that every process of the sweep sees.

    Args:
        location: The folder.
    """

    def __init__(self, location: str) -> None:
        self.location = location
        self.folder = Path(location)

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading.

        Raises:
            FileNotFoundError: If there is none, or a link, which may lead anywhere.
        """
        path = self.folder / name
        if path.is_symlink():
            raise FileNotFoundError(errno.ENOENT, "a link is no file of a sweep", str(path))
        return path.open("rb")

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Return the path of a file, which may not be there."""
        yield self.folder / name

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file to a temporary name, fsync it, rename it, and fsync its folder.

        A folder in the sweep's is made if need be, but no folder in that: where a mount has
        vanished, they would be made beneath it.
        """
        path = self.folder / name
        if path.parent != self.folder:
            path.parent.mkdir(exist_ok=True)
        write_atomically(path, content)
        fsync_folder(path.parent)

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name."""
        return (self.folder / name).is_file()

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, in order; none if there is no folder."""
        found = (self.folder / folder).rglob("*")
        return sorted(
            path.relative_to(self.folder).as_posix() for path in found if not path.is_dir()
        )

    def remove(self, names: Iterable[str]) -> None:
        """Delete files, which may be gone already, and the folders that this leaves empty."""
        for name in names:
            path = self.folder / name
            path.unlink(missing_ok=True)
            if path.parent != self.folder:
                with suppress(OSError):
                    path.parent.rmdir()


class ObjectFiles:
    """Files in an object storage, below a prefix; seen from everywhere.

    What the environment says is how it is reached: ``AWS_ACCESS_KEY_ID``,
    ``AWS_SECRET_ACCESS_KEY``, ``AWS_SESSION_TOKEN``, ``AWS_REGION``, ``AWS_ENDPOINT_URL``, or
    ``GOOGLE_APPLICATION_CREDENTIALS``, or the machine's own role. Each process reads its own, so
    that nothing of it is written or sent anywhere.

    Args:
        location: Scheme, bucket, and prefix.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    def open(self, name: str) -> IO[bytes]:
        """Read a file into memory.

        Raises:
            FileNotFoundError: If there is none.
            StorageError: If that cannot be known.
        """
        import obstore

        try:
            return io.BytesIO(obstore.get(self._store, name).bytes())
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._fault(error) from None
            raise FileNotFoundError(f"{self.location}/{name}") from None
        except _faults() as error:
            raise self._fault(error) from None

    @contextlib.contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """Return the path of a copy, for a while; of nothing if there is no such file.

        Raises:
            StorageError: If that cannot be known.
        """
        with tempfile.TemporaryDirectory(prefix="neurosweep-") as folder:
            path = Path(folder) / Path(name).name
            with suppress(FileNotFoundError):
                path.write_bytes(self.open(name).read())
            yield path

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Put a file, whole or not at all.

        Raises:
            StorageError: If the storage does not take it.
        """
        import obstore

        try:
            obstore.put(self._store, name, content, chunk_size=PART_BYTES)
        except FileNotFoundError as error:  # of the bucket
            raise self._fault(error) from None
        except _faults() as error:
            raise self._fault(error) from None

    def has(self, name: str) -> bool:
        """Tell whether there is a file of that name; it is read, so better be small.

        Raises:
            StorageError: If that cannot be known.
        """
        try:
            self.open(name)
        except FileNotFoundError:
            return False
        return True

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, in order; none if there is no folder.

        Raises:
            StorageError: If that cannot be known.
        """
        import obstore

        try:
            return sorted(found["path"] for found in obstore.list(self._store, folder).collect())
        except _faults() as error:
            raise self._fault(error) from None

    def remove(self, names: Iterable[str]) -> None:
        """Delete files, which may be gone already.

        Raises:
            StorageError: If the storage refuses.
        """
        import obstore

        with suppress(FileNotFoundError):
            try:
                obstore.delete(self._store, list(names))
            except _faults() as error:
                raise self._fault(error) from None

    @property
    def _store(self) -> "ObjectStore":
        return _connect(self.location)

    def _fault(self, error: Exception) -> StorageError:
        kind = StorageRefusedError if _is_refusal(error) else StorageError
        return kind(f"{self.location}: {reason_of(error)}")


SweepFiles = LocalFiles | ObjectFiles


def files_at(location: str) -> SweepFiles:
    """Return the files below a folder, or below a prefix of an object storage."""
    return ObjectFiles(location) if is_object_storage(location) else LocalFiles(location)


def check_object_storage(location: str) -> None:
    """Write, read, and delete a file: what a sweep will do.

    Raises:
        InputError: If any of it fails; it says why, and what to do.
    """
    files = ObjectFiles(location)
    probe = f".probe-{os.urandom(8).hex()}"
    try:
        files.write(probe, b"probe")
        if files.open(probe).read() != b"probe" or probe not in files.names(""):
            raise StorageError(f"{location}: what was written is not what is read")
        files.remove([probe])
    except OSError as error:
        raise InputError(
            "storage must be one that can be written, read, and deleted from; "
            f"{error}: {remedy_for(str(error))}"
        ) from error


def remedy_for(said: str) -> str:
    """Return what a user can do about what an object storage said."""
    if "NoSuchBucket" in said:
        return "create the bucket, or give another with `--storage`"
    if "no credentials" in said:
        return "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if "HTTP error" in said:
        return "check AWS_ENDPOINT_URL and the network"
    if "edirect" in said:
        return "set AWS_REGION to the bucket's"
    return "check the credentials in the environment, AWS_ACCESS_KEY_ID and the like"


def reason_of(error: Exception) -> str:
    """Return in one line why a request failed, without what was tried how often."""
    line = " ".join(str(error).partition("\n\nDebug source")[0].split())
    if "169.254.169.254" in line or "metadata.google" in line:
        return "there are no credentials in the environment, nor has the machine a role"
    code = re.search(r"<Code>([^<]*)</Code>", line)
    if code is not None:
        said = re.search(r"<Message>([^<]*?)\.?</Message>", line)
        return f"{code[1]}: {said[1]}" if said is not None else code[1]
    if "HTTP error" in line:
        return f"HTTP error{line.rpartition('HTTP error')[2]}"
    return line[:300]


def _is_refusal(error: Exception) -> bool:
    """Tell whether a storage has answered, and asking again is of no use: obstore has not."""
    said = str(error)
    return isinstance(error, PermissionError) or (
        "status code" in said and re.search(r"after \d+ retries", said) is None
    )


def _faults() -> tuple[type[Exception], ...]:
    from obstore.exceptions import BaseError

    # PermissionError: a credentials file that may not be read.
    return BaseError, PermissionError


@functools.lru_cache(maxsize=64)
def _connect(location: str) -> "ObjectStore":
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise InputError(
            f"storage {location} needs the package obstore; it is not installed: "
            "install the extra, `pip install '.[object-storage]'`"
        ) from error
    options: ClientConfig = {
        # Whoever names an endpoint without TLS means it: a server on loopback, mostly.
        "allow_http": os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://"),
        "connect_timeout": "5s",
        "read_timeout": "30s",
        "timeout": "1h",  # of a whole request: large files take their time
    }
    retry: RetryConfig = {
        "max_retries": 1000,
        "retry_timeout": timedelta(seconds=RETRY_S),
        "backoff": {"max_backoff": timedelta(seconds=1)},
    }
    try:
        return from_url(location, client_options=options, retry_config=retry)
    except (BaseError, ValueError) as error:
        raise InputError(
            f"storage must be reachable with what the environment says; {location}: "
            f"{reason_of(error)}: check AWS_* or GOOGLE_APPLICATION_CREDENTIALS"
        ) from error
