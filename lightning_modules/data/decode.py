"""Image files as 8-bit grey squares: one way for every pack, and for every prediction."""

import contextlib
import hashlib
import io
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import (
    ExifTags,
    Image,
    JpegImagePlugin,  # noqa: F401  (imported here, once, and not by several threads at a time)
    PngImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
)

from lightning_modules.errors import InputError

MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 64 * 10**6
MAX_SIDE_PX = 16_384  # the square around it has four times MAX_PIXELS
MIN_SIDE_PX = 8

# Of a JPEG: each goes over all of the image, and takes a few bytes. Encoders write about ten.
MAX_SCANS = 64

DECODER_VERSION = 1  # raise it with any change to a decoded pixel: every pack is then built anew

_LARGE_BYTES = _LARGE_PIXELS = 16 * 2**20

_UPRIGHT = {  # EXIF orientation: what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_DEEP_MODES = ("I;16", "I;16B", "I", "F")  # more than 8 bits a pixel
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")

Pixels = npt.NDArray[np.uint8]

# Large images go one at a time: 128 threads with 64 megapixels each would need 100 GiB.
_large = threading.RLock()


def decode_image(data: bytes, image_size_px: int) -> Pixels:
    """Decode one PNG, JPEG or TIFF file as every image of a pack is decoded.

    The first frame, upright by its EXIF orientation, transparency on black, luminance by ITU-R
    601; deeper than 8 bits, linearly from its 0.5th percentile (0) to its 99.5th (255). Then
    padded to a square with black and resized, with antialiasing where it shrinks.

    Args:
        data: The file: at most 256 MiB and 64 megapixels, sides from 8 to 16,384 px.
        image_size_px: Side of the result; an image of that size comes back exactly.

    Returns:
        Array of shape (image_size_px, image_size_px).

    Raises:
        InputError: If the file breaks a limit, or is damaged; the message does not name it.
    """
    _check_size(len(data))
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "TIFF")) as image:
            _check_header(image)
            if image.format == "JPEG":
                check_scans(data)
            large = image.width * image.height > _LARGE_PIXELS
            with _large if large else contextlib.nullcontext():
                image.load()
                grey = _luminance(_upright(image))
                side_px = max(grey.size)
                square = Image.new("L", (side_px, side_px))
                square.paste(grey, ((side_px - grey.width) // 2, (side_px - grey.height) // 2))
                if side_px != image_size_px:
                    size = (image_size_px, image_size_px)
                    square = square.resize(size, Image.Resampling.BILINEAR)
                return np.array(square, dtype=np.uint8)
    except InputError:
        raise
    except UnidentifiedImageError as error:
        raise InputError("is not a PNG, JPEG or TIFF file") from error
    except Exception as error:  # Pillow raises a dozen kinds on damaged files, some undocumented
        raise InputError(f"cannot be decoded: {one_line(error)}") from error


def decode_file(path: Path, image_size_px: int) -> tuple[Pixels, bytes]:
    """Return a file's pixels as `decode_image` does, and its sha256; too large a file is not read.

    Raises:
        InputError: As `decode_image`.
        OSError: If the file cannot be read.
    """
    size = path.stat().st_size
    _check_size(size)
    with _large if size > _LARGE_BYTES else contextlib.nullcontext():
        data = path.read_bytes()
        return decode_image(data, image_size_px), hashlib.sha256(data).digest()


def check_scans(data: bytes, *, num_images: int = 1) -> None:
    """Refuse JPEG images that would take hours to decode.

    Raises:
        InputError: If they have more scans than images have.
    """
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS * num_images:
        raise InputError(f"has {scans} JPEG scans, more than {MAX_SCANS} an image")


def one_line(error: BaseException) -> str:
    """Return what an error says in one line of at most 150 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:150] or type(error).__name__


def _check_size(n_bytes: int) -> None:
    if n_bytes > MAX_FILE_BYTES:
        raise InputError(f"has {n_bytes} bytes, more than {MAX_FILE_BYTES}")


def _check_header(image: Image.Image) -> None:
    """Refuse what would take too much memory before a pixel is decoded."""
    width_px, height_px = image.size
    if width_px * height_px > MAX_PIXELS or max(image.size) > MAX_SIDE_PX:
        raise InputError(
            f"is {width_px} x {height_px} px, more than {MAX_PIXELS} pixels or {MAX_SIDE_PX} a side"
        )
    if min(image.size) < MIN_SIDE_PX:
        raise InputError(f"is {width_px} x {height_px} px, less than {MIN_SIDE_PX} a side")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # libtiff allocates whole tiles, however small the image.
        tile_px = int(image.tag_v2.get(322, 0)) * int(image.tag_v2.get(323, 0))
        if tile_px > MAX_PIXELS:
            raise InputError(f"has tiles of {tile_px} pixels, more than {MAX_PIXELS}")


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged EXIF in a sound image; viewers show it as it lies
        return image
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _luminance(image: Image.Image) -> Image.Image:
    """Return 8-bit grey of any mode but the exotic ones of TIFF."""
    if image.mode in _DEEP_MODES:
        return Image.fromarray(_windowed(np.asarray(image, dtype=np.float64)))
    if image.mode not in _MODES:
        raise InputError(
            f"has mode {image.mode}, which is not one of {', '.join(_MODES + _DEEP_MODES)}"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image)
    if image.mode not in ("1", "L", "RGB"):
        image = image.convert("RGB")
    return image.convert("L")


def _windowed(values: npt.NDArray[np.float64]) -> Pixels:
    if not np.isfinite(values).all():
        raise InputError("holds NaN or infinite values")
    low, high = (float(bound) for bound in np.percentile(values, (0.5, 99.5)))
    if high <= low:
        return np.zeros(values.shape, dtype=np.uint8)
    scaled = (np.clip(values, low, high) - low) * (255.0 / (high - low))
    return np.rint(scaled).astype(np.uint8)
