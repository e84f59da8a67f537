"""Axial slices of a NIfTI volume; its header's text is not looked at."""

import math
import zlib
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
from nibabel import orientations

from lightning_modules.errors import InputError

MAX_VOLUME_BYTES = 512 * 2**20
MAX_SIDE_VOXELS = 4096
MAX_PIXEL_ASPECT = 1.5

_GZIP = b"\x1f\x8b"


class NiftiSlices:
    """The axial slices of a NIfTI volume, from the lowest to the highest.

    Turned to the nearest axes as DICOM shows a slice: the patient's right on the left, the front
    on top. Not interpolated: an oblique volume's slices stay oblique.

    Args:
        data: The file, gzipped or not; at most 512 MiB inflated.

    Raises:
        InputError: If it is not one grey volume, or larger; the message does not name it.
    """

    def __init__(self, data: bytes) -> None:
        try:
            data = _inflated(data)
            is_first = data[344:348] == b"n+1\0"
            header_class: Any = nibabel.Nifti1Header if is_first else nibabel.Nifti2Header
            header = header_class(data[: header_class.sizeof_hdr], check=False)
            self._voxels = _map_voxels(data, header)
            slope, intercept = header.get_slope_inter()
            turn = _turn(header)
            zooms_mm = np.abs(np.asarray(header.get_zooms()[:3], np.float64))
        except InputError:
            raise
        except Exception:  # nibabel's and numpy's, of many kinds, on damaged headers
            raise InputError("is a damaged NIfTI file") from None
        self._slope = 1.0 if slope is None else float(slope)
        self._intercept = 0.0 if intercept is None else float(intercept)
        width_mm, height_mm = zooms_mm[_sources(turn)[:2]]
        if not max(width_mm, height_mm) <= MAX_PIXEL_ASPECT * min(width_mm, height_mm):
            raise InputError(
                f"has axial pixels of {width_mm:.3g} x {height_mm:.3g} mm, which would be "
                "distorted: resample the volume to square ones"
            )
        self._voxels = orientations.apply_orientation(self._voxels, turn)

    def __len__(self) -> int:
        return int(self._voxels.shape[2])

    def read(self, number: int) -> npt.NDArray[Any]:
        """Return a slice, shape ``(H, W)``: 8-bit as it is, else as float64."""
        plane = self._voxels[:, :, number].T
        if plane.dtype == np.uint8 and (self._slope, self._intercept) == (1.0, 0.0):
            return np.asarray(plane)
        with np.errstate(over="ignore", invalid="ignore"):  # infinities are refused later
            return np.asarray(plane.astype(np.float64) * self._slope + self._intercept)


def _inflated(data: bytes) -> bytes:
    if not data.startswith(_GZIP):
        return data
    gzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        inflated = gzip.decompress(data, MAX_VOLUME_BYTES + 1)
    except zlib.error:
        raise InputError("is a damaged gzip file") from None
    if len(inflated) > MAX_VOLUME_BYTES:
        raise InputError(f"has more than {MAX_VOLUME_BYTES} bytes when inflated")
    return inflated


def _map_voxels(data: bytes, header: Any) -> npt.NDArray[Any]:
    """Return the voxels as an array of three axes that shares the file's memory."""
    shape = tuple(int(side) for side in header.get_data_shape())
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3):
        raise InputError(f"must be one volume; it has {len(shape)} dimensions")
    shape = (*shape, 1)[:3]
    if not all(1 <= side <= MAX_SIDE_VOXELS for side in shape):
        raise InputError(f"must have 1 to {MAX_SIDE_VOXELS} voxels a side; got {shape}")
    dtype = header.get_data_dtype()
    if dtype.kind not in "uif":
        raise InputError("must hold grey values, not colours or complex numbers")
    offset, needed = int(header.get_data_offset()), math.prod(shape) * dtype.itemsize
    if offset < header.sizeof_hdr or offset + needed > len(data):
        raise InputError(f"is cut short: {needed} bytes of voxels are {len(data) - offset}")
    flat = np.frombuffer(data, dtype, math.prod(shape), offset)
    return flat.reshape(shape, order="F")


def _turn(header: Any) -> npt.NDArray[np.float64]:
    """Return how the axes are to be turned to left, posterior, superior (LPS)."""
    stored = orientations.io_orientation(header.get_best_affine())
    if not np.isfinite(stored).all():
        raise InputError("does not say how it is oriented")
    lps = orientations.axcodes2ornt(("L", "P", "S"))
    return np.asarray(orientations.ornt_transform(stored, lps))


def _sources(turn: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Return which stored axis each turned axis was."""
    return np.argsort(turn[:, 0])
