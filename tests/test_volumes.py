"""DICOM and NIfTI files come out as the images of a pack do; damaged ones end in one line."""

import gzip
import io
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import nibabel
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nibabel import orientations
from PIL import Image
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
)

from lightning_modules.data import dicom, nifti, volumes
from lightning_modules.data.decode import decode_image
from lightning_modules.data.volumes import decode_slices
from lightning_modules.errors import InputError

Array = npt.NDArray[Any]
SIZE_PX = 32
SURNAME = "Featherstonehaugh"


def noise(dtype: str, *shape: int, high: int = 255) -> Array:
    return np.random.default_rng(0).integers(0, high + 1, shape).astype(dtype)


def dicom_file(pixels: Array, *, syntax: str = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    """A file of one frame (H, W), of several (N, H, W), or of a colour (H, W, 3)."""
    is_colour = pixels.shape[-1] == 3
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    dataset.PatientName = f"{SURNAME}^Ann"
    dataset.StudyDescription = f"head of {SURNAME}"
    dataset.SamplesPerPixel = 3 if is_colour else 1
    dataset.PhotometricInterpretation = "RGB" if is_colour else "MONOCHROME2"
    if is_colour:
        dataset.PlanarConfiguration = 0
    *frames, rows, columns = pixels.shape[:2] if is_colour else pixels.shape
    if frames:
        dataset.NumberOfFrames = frames[0]
    dataset.Rows, dataset.Columns = rows, columns
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    if syntax == RLELossless:
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        dataset.compress(RLELossless)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that are wrong on purpose
        pydicom.dcmwrite(file, dataset, enforce_file_format=True)
    return file.getvalue()


def nifti_file(values: Array, axes: str = "LPS", zooms_mm: Any = (1, 1, 1)) -> bytes:
    """A volume given in LPS order, stored in another."""
    lps = np.diag([-zooms_mm[0], -zooms_mm[1], zooms_mm[2], 1.0])
    stored = nibabel.Nifti1Image(values, lps)
    turn = orientations.ornt_transform(
        orientations.axcodes2ornt(("L", "P", "S")), orientations.axcodes2ornt(tuple(axes))
    )
    return bytes(stored.as_reoriented(turn).to_bytes())


def picture(values: Array) -> Array:
    """What a pack makes of the same values, saved as a file that Pillow writes."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return decode_image(file.getvalue(), SIZE_PX)


def only_slice(data: bytes) -> Array:
    [item] = decode_slices(data, SIZE_PX)
    return item.pixels


def message_of(data: bytes, only: int | None = None) -> str:
    with pytest.raises(InputError) as caught:
        list(decode_slices(data, SIZE_PX, only=only))
    assert str(caught.value).isprintable()  # no line break is
    assert SURNAME not in str(caught.value)
    return str(caught.value)


# DICOM


@pytest.mark.parametrize(
    "pixels",
    [noise("u1", 40, 28), noise("u2", 40, 28, high=4000), noise("u1", 28, 40, 3)],
    ids=["8-bit", "16-bit", "colour"],
)
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless])
def test_a_dicom_file_comes_out_as_the_png_of_its_pixels(pixels: Array, syntax: str) -> None:
    assert (only_slice(dicom_file(pixels, syntax=syntax)) == picture(pixels)).all()


def test_stored_bits_below_a_byte_are_windowed() -> None:
    pixels = noise("u1", 32, 32, high=15)
    found = only_slice(dicom_file(pixels, BitsStored=4, HighBit=3))
    assert (found == picture(pixels.astype("u2"))).all()
    assert found.max() == 255


def test_monochrome1_is_the_negative() -> None:
    plain = noise("u1", 32, 32)
    inverted = only_slice(dicom_file(plain, PhotometricInterpretation="MONOCHROME1"))
    assert (inverted == 255 - plain).all()
    deep = noise("u2", 32, 32, high=4000)
    positive = only_slice(dicom_file(deep)).astype(int)
    negative = only_slice(dicom_file(deep, PhotometricInterpretation="MONOCHROME1")).astype(int)
    assert abs(positive + negative - 255).max() <= 1  # rounding of halves


def test_rescaling_and_signs_change_nothing_but_a_negative_slope_inverts() -> None:
    pixels = noise("u2", 32, 32, high=4000)
    expected = only_slice(dicom_file(pixels))
    rescaled = only_slice(dicom_file(pixels, RescaleSlope="2.0", RescaleIntercept="-1024"))
    assert (rescaled == expected).all()
    signed = (pixels.astype(int) - 2000).astype("i2")
    assert (only_slice(dicom_file(signed)) == expected).all()
    negative = only_slice(dicom_file(pixels, RescaleSlope="-1"))
    assert abs(negative.astype(int) + expected - 255).max() <= 1


def test_the_window_that_a_header_proposes_does_not_matter() -> None:
    pixels = noise("u2", 32, 32, high=4000)
    found = only_slice(dicom_file(pixels, WindowCenter="10", WindowWidth="5"))
    assert (found == only_slice(dicom_file(pixels))).all()


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_frames_are_numbered_and_can_be_read_alone(syntax: str) -> None:
    pixels = noise("u1", 3, 32, 32)
    data = dicom_file(pixels, syntax=syntax)
    found = list(decode_slices(data, SIZE_PX))
    assert [item.number for item in found] == [0, 1, 2]
    assert all((item.pixels == frame).all() for item, frame in zip(found, pixels, strict=True))
    [second] = decode_slices(data, SIZE_PX, only=1)
    assert second.number == 1
    assert (second.pixels == pixels[1]).all()
    assert message_of(data, only=3) == "has slices 0 to 2, not 3"


def test_one_frame_or_picture_has_no_number() -> None:
    assert [item.number for item in decode_slices(dicom_file(noise("u1", 32, 32)), SIZE_PX)] == [
        None
    ]
    file = io.BytesIO()
    Image.new("L", (32, 32)).save(file, "PNG")
    assert [item.number for item in decode_slices(file.getvalue(), SIZE_PX, only=0)] == [None]
    assert message_of(file.getvalue(), only=1) == "has slices 0 to 0, not 1"


def relabelled(data: bytes, syntax: str) -> bytes:
    """The same file under another transfer syntax of the same length."""
    padded = [uid + "\0" * (len(uid) % 2) for uid in (ExplicitVRLittleEndian, syntax)]
    old, new = (uid.encode() for uid in padded)
    length = len(old).to_bytes(2, "little") + old
    assert data.count(length) == 1
    return data.replace(length, len(new).to_bytes(2, "little") + new)


def test_a_compression_that_is_not_supported_is_named() -> None:
    for syntax, name in (
        (JPEGLSLossless, JPEGLSLossless.name),
        ("1.2.99", "an unknown transfer syntax"),
    ):
        data = relabelled(dicom_file(noise("u1", 32, 32)), syntax)
        assert message_of(data).startswith(f"is compressed as {name}, which is not supported: ")


def test_nothing_is_inflated_before_it_is_checked() -> None:
    data = dicom_file(noise("u1", 32, 32), syntax=DeflatedExplicitVRLittleEndian)
    assert message_of(data).startswith("is compressed as Deflated Explicit VR Little Endian")


@pytest.mark.parametrize(
    ("elements", "line"),
    [
        ({"Rows": 65535, "Columns": 65535}, "is 65535 x 65535 px, more than 64000000 pixels"),
        ({"Rows": 65, "Columns": 64}, "has pixels that are damaged, or fewer than it says"),
        ({"Rows": 0}, "has pixels that are damaged"),
        ({"NumberOfFrames": 2_000_000_000}, "must have 1 to 4096 frames; got 2000000000"),
        ({"NumberOfFrames": -1}, "must have 1 to 4096 frames; got -1"),
        ({"NumberOfFrames": 7}, "has pixels that are damaged, or fewer than it says"),
        (
            {"PhotometricInterpretation": SURNAME[:16].upper()},
            "must be MONOCHROME1, MONOCHROME2, or 8-bit",
        ),
        ({"SamplesPerPixel": 4}, "must be MONOCHROME1, MONOCHROME2, or 8-bit"),
        ({"BitsAllocated": 7}, "has pixels that are damaged"),
        ({"RescaleSlope": "1e999"}, "holds NaN or infinite values"),
    ],
)
def test_a_header_that_lies_is_refused(elements: dict[str, Any], line: str) -> None:
    assert message_of(dicom_file(noise("u1", 32, 32), **elements)).startswith(line)


def test_frames_that_would_take_hours_are_refused() -> None:
    line = message_of(dicom_file(noise("u1", 8, 8), NumberOfFrames=4096, Rows=4000, Columns=4000))
    assert line == "has 65536000000 pixels in all, more than 2147483648"
    file = io.BytesIO()
    Image.fromarray(noise("u1", 40, 28)).save(file, "JPEG", progressive=True)
    jpeg = file.getvalue()
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    frame = pydicom.encaps.encapsulate([jpeg[:-2] + 100 * scan + jpeg[-2:]])
    data = dicom_file(noise("u1", 40, 28), syntax=JPEGBaseline8Bit, PixelData=frame)
    assert message_of(data).endswith(" JPEG scans, more than 64 an image")


def test_a_dicom_file_without_pixels_is_refused() -> None:
    data = dicom_file(noise("u1", 32, 32))
    dataset = pydicom.dcmread(io.BytesIO(data))
    del dataset.PixelData
    file = io.BytesIO()
    dataset.save_as(file)
    assert message_of(file.getvalue()) == "is a DICOM file without pixels"


DAMAGED = (
    dicom_file(noise("u1", 16, 16)),
    dicom_file(noise("u1", 2, 16, 16), syntax=RLELossless),
    nifti_file(noise("i2", 16, 16, 2)),
    gzip.compress(nifti_file(noise("i2", 16, 16, 2))),
)


@settings(max_examples=150, deadline=None)
@given(
    data=st.sampled_from(DAMAGED),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
def test_damage_ends_in_squares_or_one_line_without_a_word_of_the_header(
    data: bytes, cut: float, changes: list[tuple[float, int]]
) -> None:
    damaged = bytearray(data[: max(1, round(cut * len(data)))])
    for place, value in changes:
        damaged[int(place * min(len(damaged), 700))] = value  # most of it in the header
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # they would quote the header
        squares, line = outcome_of(bytes(damaged))
    assert line.isprintable()
    assert SURNAME not in line
    assert all(square.shape == (SIZE_PX, SIZE_PX) for square in squares)


def outcome_of(data: bytes) -> tuple[list[Array], str]:
    try:
        return [item.pixels for item in decode_slices(data, SIZE_PX)], ""
    except InputError as error:
        return [], str(error)


# NIfTI


ALL_AXES = [
    "".join(axes)
    for order in itertools.permutations(("RL", "AP", "SI"))
    for axes in itertools.product(*order)
]


@pytest.mark.parametrize("axes", ALL_AXES)
def test_slices_are_axial_with_the_right_on_the_left_and_the_front_on_top(axes: str) -> None:
    volume = np.zeros((24, 24, 3), np.uint8)  # towards left, back, top
    volume[2:6, 4:6, 0] = 255
    found = [item.pixels for item in decode_slices(nifti_file(volume, axes), 24)]
    rows, columns = np.nonzero(found[0])
    # Four wide, two high; right and in front, in the lowest slice.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 5, 2, 5)
    assert [bool(square.any()) for square in found] == [True, False, False]


@pytest.mark.parametrize("dtype", ["i2", "u2", "f4", "f8", ">i2"])
def test_a_deep_slice_is_windowed_by_itself_as_a_deep_picture_is(dtype: str) -> None:
    values = noise("i4", 32, 32, 2, high=4000)
    values[..., 1] //= 3
    found = list(decode_slices(nifti_file(values.astype(dtype)), SIZE_PX))
    assert [item.number for item in found] == [0, 1]
    for item in found:
        assert (item.pixels == picture(values[..., item.number].T.astype("u2"))).all()


def test_an_8_bit_volume_stays_as_it_is_and_gzip_changes_nothing() -> None:
    values = noise("u1", 32, 32, 2, high=99)
    data = nifti_file(values)
    plain, packed = (list(decode_slices(d, SIZE_PX)) for d in (data, gzip.compress(data)))
    for number in range(2):
        assert (plain[number].pixels == values[..., number].T).all()
        assert (packed[number].pixels == plain[number].pixels).all()


def test_one_slice_can_be_read_alone() -> None:
    values = noise("u1", 32, 32, 5)
    [item] = decode_slices(nifti_file(values), SIZE_PX, only=4)
    assert item.number == 4
    assert (item.pixels == values[..., 4].T).all()
    assert message_of(nifti_file(values), only=5) == "has slices 0 to 4, not 5"


def edited(change: Callable[[Any], None], values: Array | None = None) -> bytes:
    """A volume whose header was changed after its voxels were written."""
    data = nifti_file(noise("i2", 32, 32, 2) if values is None else values)
    header = nibabel.Nifti1Header(data[:348], check=False)
    change(header)
    return bytes(header.binaryblock) + data[348:]


def setting(name: str, value: Any) -> Callable[[Any], None]:
    def change(header: Any) -> None:
        header[name] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("dim", [3, 4096, 4096, 4096, 1, 1, 1, 1], "is cut short: 137438953472 bytes of voxels"),
        ("dim", [3, 32, 32, 3, 1, 1, 1, 1], "is cut short: 6144 bytes of voxels are 4096"),
        ("dim", [3, -32, 32, 2, 1, 1, 1, 1], "must have 1 to 4096 voxels a side; got (-32, 32, 2)"),
        ("dim", [4, 32, 32, 1, 2, 1, 1, 1], "must be one volume; it has 4 dimensions"),
        ("dim", [99, 32, 32, 2, 1, 1, 1, 1], "must be one volume; it has 7 dimensions"),
        ("vox_offset", np.nan, "is a damaged NIfTI file"),
        ("vox_offset", -1e9, "is cut short"),
        ("datatype", 128, "must hold grey values, not colours or complex numbers"),
        ("datatype", 32, "must hold grey values, not colours or complex numbers"),
        ("datatype", 12345, "is a damaged NIfTI file"),
        ("srow_x", [np.nan] * 4, "is a damaged NIfTI file"),
        ("srow_x", [0.0] * 4, "does not say how it is oriented"),
    ],
)
def test_a_volume_whose_header_lies_is_refused(name: str, value: Any, line: str) -> None:
    assert message_of(edited(setting(name, value))).startswith(line)


def test_a_volume_of_thick_sagittal_slices_is_refused() -> None:
    line = message_of(nifti_file(noise("i2", 32, 32, 2), "ASL", (5, 1, 1)))
    assert line.startswith("has axial pixels of 5 x 1 mm, which would be distorted: resample")


def test_a_volume_with_nan_is_refused() -> None:
    values = np.ones((32, 32, 2), np.float32)
    values[3, 3, 1] = np.nan
    assert message_of(nifti_file(values)) == "holds NaN or infinite values"


def test_a_gzip_bomb_is_not_inflated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti, "MAX_VOLUME_BYTES", 100_000)
    bomb = gzip.compress(nifti_file(np.zeros((256, 256, 2), np.uint8)))
    assert len(bomb) < 1000
    assert message_of(bomb) == "has more than 100000 bytes when inflated"


@pytest.mark.parametrize(
    "data",
    [b"", b"\x1f\x8b", gzip.compress(b"text", mtime=0), b"\0" * 128 + b"DICX"],
    ids=["empty", "gzip cut", "gzip of text", "almost DICOM"],
)
def test_another_file_is_said_to_be_none_of_these(data: bytes) -> None:
    assert message_of(data) == "is not a PNG, JPEG, TIFF, DICOM, or NIfTI file"


def test_a_large_file_is_not_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volumes, "MAX_FILE_BYTES", 10)
    (tmp_path / "a").write_bytes(bytes(11))
    with pytest.raises(InputError, match="has more than 10 bytes"):
        volumes.read_file(tmp_path / "a")
    with pytest.raises(InputError, match="is not a plain file"):
        volumes.read_file(tmp_path)


def test_only_elements_of_the_pixels_are_read() -> None:
    frames = dicom.DicomFrames(dicom_file(noise("u1", 32, 32)))
    assert "PatientName" not in frames._dataset
    assert "StudyDescription" not in frames._dataset
