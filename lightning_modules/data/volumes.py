"""The slices of any file that can be classified, as the 8-bit grey squares of a pack."""

import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from lightning_modules.data.decode import Pixels, decode_image
from lightning_modules.errors import InputError

MAX_FILE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Slice:
    """One slice of a file.

    Attributes:
        number: Counted from 0; none where the file holds one picture only.
        pixels: Shape ``(S, S)``, uint8 grey.
    """

    number: int | None
    pixels: Pixels


def read_file(path: Path) -> bytes:
    """Read a file of at most 512 MiB.

    Raises:
        InputError: If it is larger, or a folder, pipe, or device; the message does not name it.
        OSError: If it cannot be read.
    """
    if path.exists() and not path.is_file():
        raise InputError("is not a plain file")
    with path.open("rb") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise InputError(f"has more than {MAX_FILE_BYTES} bytes")
    return data


def decode_slices(data: bytes, image_size_px: int, *, only: int | None = None) -> Iterator[Slice]:
    """Decode a PNG, JPEG, TIFF, DICOM, or NIfTI file; what it is its first bytes say, not its name.

    Slices go through `decode_image`, so that a scanner's and a converted image come out alike: 8
    bits as they are, deeper ones linearly from the slice's own 0.5th percentile to its 99.5th.

    Args:
        data: The file.
        image_size_px: Side of the squares.
        only: The one slice to decode; all if none.

    Yields:
        A DICOM file's frames in order; a volume's axial slices from the lowest to the highest.

    Raises:
        InputError: If the file is none of these, is damaged, breaks a limit, or has no such slice;
            the message does not name it.
    """
    # Imported where they are needed: a second for the two, and most images are PNG or JPEG.
    if data[128:132] == b"DICM":
        from lightning_modules.data.dicom import DicomFrames

        frames = DicomFrames(data)
        numbers = _numbers(len(frames), only)
        for number, frame in zip(numbers, frames.read(numbers), strict=True):
            yield Slice(number if len(frames) > 1 else None, _squared(frame, image_size_px))
    elif _is_nifti(data):
        from lightning_modules.data.nifti import NiftiSlices

        volume = NiftiSlices(data)
        for number in _numbers(len(volume), only):
            yield Slice(number, _squared(volume.read(number), image_size_px))
    else:
        _numbers(1, only)
        try:
            yield Slice(None, decode_image(data, image_size_px))
        except InputError as error:
            text = str(error).replace("PNG, JPEG or TIFF", "PNG, JPEG, TIFF, DICOM, or NIfTI")
            raise InputError(text) from error


def _is_nifti(data: bytes) -> bool:
    if data.startswith(b"\x1f\x8b"):
        try:
            data = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(data, 348)
        except zlib.error:
            return False
    # In one file; a pair of header and voxels has other marks.
    return data[344:348] == b"n+1\0" or data[4:8] == b"n+2\0"


def _numbers(num_slices: int, only: int | None) -> range:
    if only is None:
        return range(num_slices)
    if not 0 <= only < num_slices:
        raise InputError(f"has slices 0 to {num_slices - 1}, not {only}")
    return range(only, only + 1)


def _squared(values: npt.NDArray[Any], image_size_px: int) -> Pixels:
    """Bring a slice to a square by the one way there is, which takes files."""
    if values.dtype != np.uint8:
        # What is windowed may be shifted: single precision then holds differences of large values.
        with np.errstate(over="ignore", invalid="ignore"):  # refused by what follows
            values = (values - values.min()).astype(np.float32)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(values)).save(file, "TIFF")
    return decode_image(file.getvalue(), image_size_px)
