"""Files that are whole or absent, and known by their digest."""

import hashlib
import os
import struct
import uuid
from pathlib import Path
from types import ModuleType

from lightning_modules.errors import InputError

MAX_HEADER_BYTES = 2**24


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file whole or not at all: temporary name in the same folder, fsync, rename.

    Raises:
        OSError: If the file cannot be written; the temporary file is gone by then.
    """
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fsync_folder(folder: Path) -> None:
    """Have the names that a folder holds on disk, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def code_digest_of(*modules: ModuleType) -> str:
    """Return what changes with the code of some modules."""
    digests = [sha256_of(Path(str(module.__file__))) for module in modules]
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def check_header(path: Path) -> None:
    """Refuse a safetensors file whose header would take minutes to look through.

    Raises:
        InputError: If it is larger than a network's; the message does not name the file.
    """
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) == 8 and struct.unpack("<Q", head)[0] > MAX_HEADER_BYTES:
        raise InputError(f"must have a header of at most {MAX_HEADER_BYTES} bytes")
