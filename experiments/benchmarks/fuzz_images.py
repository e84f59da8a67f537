"""Pictures, DICOM files, and volumes to be fuzzed."""

import gzip
import io
import warnings
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
from fuzz_mutation import (
    Target,
    by_bytes,
)
from PIL import Image
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
)

from lightning_modules.data.decode import decode_image
from lightning_modules.data.volumes import decode_slices

SIDE_PX = 16


def _pixels(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


# Images


def _pictures(folder: Path) -> list[bytes]:
    grey = Image.fromarray(_pixels(40, 30))
    deep = Image.fromarray(_pixels(40, 30, dtype=np.uint16))
    colour = Image.fromarray(_pixels(20, 24, 3))
    exif = Image.Exif()
    exif[274] = 6
    cases: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (grey, "PNG", {}),
        (deep, "PNG", {}),
        (colour.quantize(16), "PNG", {"transparency": 0}),
        (grey, "PNG", {"exif": exif}),
        (colour.convert("RGBA"), "PNG", {}),
        (grey, "JPEG", {}),
        (colour, "JPEG", {"exif": exif}),
        (grey, "JPEG", {"progressive": True}),
        (grey, "TIFF", {}),
        (deep, "TIFF", {}),
        (colour, "TIFF", {"exif": exif}),
        (Image.fromarray(_pixels(20, 20).astype(np.float32)), "TIFF", {}),
        (grey, "TIFF", {"save_all": True, "append_images": [grey] * 3}),
        *(
            (grey, "TIFF", {"compression": c})
            for c in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
        ),
        (colour, "TIFF", {"compression": "jpeg"}),
        (grey.convert("1"), "TIFF", {"compression": "group4"}),
    ]
    return [_saved(image, kind, **options) for image, kind, options in cases]


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


# Volumes


def _dicoms(folder: Path) -> list[bytes]:
    deep = _pixels(24, 20, dtype=np.uint16)
    jpeg = pydicom.encaps.encapsulate([_saved(Image.fromarray(_pixels(24, 20)), "JPEG")])
    return [
        _dicom(deep),
        _dicom(deep, ImplicitVRLittleEndian),
        _dicom(_pixels(24, 20)),
        _dicom(_pixels(3, 24, 20), NumberOfFrames=3),
        _dicom(deep, RLELossless),
        _dicom(_pixels(24, 20), JPEGBaseline8Bit, PixelData=jpeg),
        _dicom(
            _pixels(24, 20, 3),
            SamplesPerPixel=3,
            PhotometricInterpretation="RGB",
            PlanarConfiguration=0,
            Rows=24,
            Columns=20,
        ),
        _dicom(
            deep.astype(np.int16), PixelRepresentation=1, RescaleSlope="2", RescaleIntercept="-9"
        ),
    ]


def _dicom(pixels: Any, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    stored = ExplicitVRLittleEndian if syntax == RLELossless else syntax
    dataset.file_meta.TransferSyntaxUID = stored
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PatientName = "Doe^Ann"
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit, dataset.PixelRepresentation = dataset.BitsStored - 1, 0
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax == RLELossless:
        dataset.compress(RLELossless)
    dataset["PixelData"].is_undefined_length = syntax in (RLELossless, JPEGBaseline8Bit)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def _niftis(folder: Path) -> list[bytes]:
    kinds = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    values = [_pixels(12, 10, 4), _pixels(12, 10, 4).astype(np.int16), _pixels(9, 8, 3) / 7.0]
    plain = [bytes(kind(value, np.eye(4)).to_bytes()) for kind in kinds for value in values]
    return [*plain, gzip.compress(plain[0])]


def _read_slices(data: bytes, folder: Path) -> None:
    for item in decode_slices(data, SIDE_PX):
        assert item.pixels.shape == (SIDE_PX, SIDE_PX)


def _read_image(data: bytes, folder: Path) -> None:
    assert decode_image(data, SIDE_PX).shape == (SIDE_PX, SIDE_PX)


TARGETS = {
    "image": Target(inputs=40_000, prepare=_pictures, change=by_bytes, read=_read_image),
    "dicom": Target(inputs=15_000, prepare=_dicoms, change=by_bytes, read=_read_slices),
    "nifti": Target(inputs=15_000, prepare=_niftis, change=by_bytes, read=_read_slices),
}
