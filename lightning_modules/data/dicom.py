"""Frames of a DICOM file as grey or colour arrays; nothing else of the file is looked at.

A header holds names, dates, and numbers of patients. Only the elements of ``_PIXEL_ELEMENTS`` are
read, and no message repeats a word of any of them, nor of what pydicom says about them.
"""

import io
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from PIL import Image
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import iter_pixels
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
)

from lightning_modules.data.decode import MAX_PIXELS, MAX_SIDE_PX, check_scans
from lightning_modules.errors import InputError

MAX_FRAMES = 4096
MAX_TOTAL_PIXELS = 2**31  # compressed, a file of a few bytes may say that it has any number

_PIXEL_ELEMENTS = (
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "PlanarConfiguration",
    "NumberOfFrames",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
    "RescaleIntercept",
    "RescaleSlope",
    "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
    "FloatPixelData",
    "DoubleFloatPixelData",
    "PixelData",
)

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit)

_PREAMBLE_BYTES = 128
_PREFIX = b"DICM"


class DicomFrames:
    """The frames of a DICOM file, decoded one at a time.

    Grey values are what the scanner meant: rescaled, and inverted where MONOCHROME1 says that high
    is dark. The windows that a header proposes are left out, since they differ by scanner and
    reader. Colours are RGB.

    Args:
        data: The file.

    Raises:
        InputError: If it holds no pixels that can be read; the message does not name it.
    """

    def __init__(self, data: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # pydicom quotes what it finds strange
            try:
                self._dataset = _read(data)
                self._check()
                if self._dataset.file_meta.TransferSyntaxUID in _JPEG:
                    check_scans(data, num_images=self._num_frames)
            except InputError:
                raise
            except Exception:  # of many kinds; their words are the header's
                raise InputError("is a damaged DICOM file") from None

    def __len__(self) -> int:
        return self._num_frames

    def read(self, numbers: range) -> Iterator[npt.NDArray[Any]]:
        """Yield some of the frames: 8-bit grey or RGB as they are, deeper grey as float64.

        Raises:
            InputError: If one is damaged, or its compression is not supported.
        """
        for number in numbers:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                try:
                    [frame] = iter_pixels(self._dataset, indices=[number])
                    values = self._grey(frame) if frame.ndim == 2 else frame
                except Exception:  # as above
                    raise InputError("has pixels that are damaged, or fewer than it says") from None
            yield values

    def _check(self) -> None:
        dataset = self._dataset
        syntax = dataset.file_meta.TransferSyntaxUID
        try:
            is_supported = not syntax.is_compressed or get_decoder(syntax).is_available
        except (NotImplementedError, ValueError):  # ValueError: it is no transfer syntax
            is_supported = False
        if not is_supported:
            # Only the names of the standard: a UID may be anything.
            name = "an unknown transfer syntax" if syntax.name == syntax else syntax.name
            raise InputError(
                f"is compressed as {name}, which is not supported: convert it to "
                f"{ExplicitVRLittleEndian.name}, such as by gdcmconv --raw or dcmdjpeg"
            )
        if not any(name.endswith("PixelData") and name in dataset for name in _PIXEL_ELEMENTS):
            raise InputError("is a DICOM file without pixels")
        self._num_frames = int(dataset.get("NumberOfFrames") or 1)
        if not 1 <= self._num_frames <= MAX_FRAMES:
            raise InputError(f"must have 1 to {MAX_FRAMES} frames; got {self._num_frames}")
        height_px, width_px = int(dataset.Rows), int(dataset.Columns)
        if height_px * width_px > MAX_PIXELS or max(height_px, width_px) > MAX_SIDE_PX:
            raise InputError(
                f"is {width_px} x {height_px} px, more than {MAX_PIXELS} pixels or {MAX_SIDE_PX} "
                "a side"
            )
        if (total := self._num_frames * height_px * width_px) > MAX_TOTAL_PIXELS:
            raise InputError(f"has {total} pixels in all, more than {MAX_TOTAL_PIXELS}")
        kind = dataset.PhotometricInterpretation
        is_colour = kind in _COLOURS and dataset.SamplesPerPixel == 3 and dataset.BitsAllocated == 8
        is_grey = kind in ("MONOCHROME1", "MONOCHROME2") and dataset.SamplesPerPixel == 1
        if not is_colour and not is_grey:
            raise InputError("must be MONOCHROME1, MONOCHROME2, or 8-bit RGB or YBR")

    def _grey(self, frame: npt.NDArray[Any]) -> npt.NDArray[Any]:
        dataset = self._dataset
        slope = float(dataset.get("RescaleSlope") or 1.0)
        intercept = float(dataset.get("RescaleIntercept") or 0.0)
        is_inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
        is_plain = frame.dtype == np.uint8 and dataset.BitsStored == 8
        if is_plain and (slope, intercept) == (1.0, 0.0):
            return 255 - frame if is_inverted else frame
        values = frame.astype(np.float64) * slope + intercept
        return -values if is_inverted else values


def _read(data: bytes) -> pydicom.Dataset:
    # pydicom would inflate it in memory, to a thousand times its size, before anything is checked.
    meta = io.BytesIO(data)
    meta.seek(_PREAMBLE_BYTES + len(_PREFIX))
    head = pydicom.filereader.read_dataset(
        meta, is_implicit_VR=False, is_little_endian=True, stop_when=_is_past_meta
    )
    if head.TransferSyntaxUID == DeflatedExplicitVRLittleEndian:
        raise InputError(
            f"is compressed as {DeflatedExplicitVRLittleEndian.name}, which is not supported: "
            f"convert it to {ExplicitVRLittleEndian.name}"
        )
    return pydicom.dcmread(io.BytesIO(data), specific_tags=list(_PIXEL_ELEMENTS))


def _is_past_meta(tag: Any, vr: str | None, length: int) -> bool:
    return bool(tag.group != 2)
