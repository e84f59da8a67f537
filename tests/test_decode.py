import contextlib
import hashlib
import io
import re
import resource
import struct
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lightning_modules.data.decode import decode_file, decode_image
from lightning_modules.errors import InputError


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(value: int, width_px: int = 8, height_px: int = 8) -> bytes:
    return encoded(Image.new("L", (width_px, height_px), value))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width_px: int, height_px: int) -> bytes:
    """A PNG that claims a size, with hardly any pixels."""
    size = struct.pack(">IIBBBBB", width_px, height_px, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 9))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + pixels + chunk(b"IEND", b"")


def tiff_header(tags: dict[int, int]) -> bytes:
    """An 8-bit deflated TIFF with integer tags and no valid pixels."""
    tags = {258: 8, 259: 8, 262: 1, 277: 1, **tags}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 64


# Decoding: expected values by hand; luminance is (299 R + 587 G + 114 B) / 1000


def shaded(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)  # type: ignore[arg-type]


def palette(index: int, **info: object) -> Image.Image:
    image = Image.new("P", (8, 8), index)
    image.putpalette([0, 0, 0, 255, 0, 0, 255, 255, 255])
    image.info.update(info)
    return image


MODES = {
    "1": (encoded(shaded("1", 1)), 255),
    "L": (encoded(shaded("L", 77)), 77),
    "L with a transparent value": (encoded(shaded("L", 77), transparency=77), 0),
    "LA half transparent": (encoded(shaded("LA", (200, 128))), 100),  # 200 * 128 / 255 = 100.4
    "LA opaque": (encoded(shaded("LA", (200, 255))), 200),
    "P red": (encoded(palette(1)), 76),
    "P white, transparent": (encoded(palette(2, transparency=2)), 0),
    "P white, a fifth opaque": (encoded(palette(2, transparency=b"\xff\xff\x33")), 51),
    "RGB red": (encoded(shaded("RGB", (255, 0, 0))), 76),  # 76.2
    "RGB green": (encoded(shaded("RGB", (0, 255, 0))), 150),  # 149.7
    "RGB blue": (encoded(shaded("RGB", (0, 0, 255))), 29),  # 29.1
    "RGBA red, transparent": (encoded(shaded("RGBA", (255, 0, 0, 0))), 0),
    "RGBA white, a fifth opaque": (encoded(shaded("RGBA", (255, 255, 255, 51))), 51),
    "CMYK white": (encoded(shaded("CMYK", (0, 0, 0, 0)), "TIFF"), 255),
    "CMYK black": (encoded(shaded("CMYK", (0, 0, 0, 255)), "TIFF"), 0),
    "CMYK JPEG red": (encoded(shaded("CMYK", (0, 255, 255, 0)), "JPEG", quality=100), 76),
    "YCbCr grey": (encoded(shaded("YCbCr", (99, 128, 128)), "TIFF"), 99),
    "JPEG grey": (encoded(shaded("L", 77), "JPEG", quality=100), 77),
}


@pytest.mark.parametrize(("data", "expected"), MODES.values(), ids=MODES.keys())
def test_a_mode_decodes_to_its_luminance_on_black(data: bytes, expected: int) -> None:
    got = decode_image(data, 8)
    assert got.dtype == np.uint8
    assert (got == expected).all()


# 201 values: the percentile p lies exactly at value number 2 p, so 0.5 -> [1] and 99.5 -> [199].
RAMP = np.arange(201) * 100 + 1000


def ramp(kind: str) -> bytes:
    """The ramp in 201 x 8 pixels; eight equal rows leave the percentiles nearly where they are."""
    if kind == "I;16B":
        deep = np.tile(RAMP, (8, 1)).astype(">u2")
        return encoded(Image.frombytes("I;16B", (201, 8), deep.tobytes()), "TIFF")
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[kind]
    return encoded(Image.fromarray(np.tile(RAMP, (8, 1)).astype(dtype)), "TIFF")


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "F"])
def test_a_deep_gradient_is_windowed_between_its_percentiles(kind: str) -> None:
    image = decode_image(ramp(kind), 201)
    row = image[100]  # eight rows in the middle of a black square: 96 above, 97 below
    assert not image[:96].any()
    assert not image[104:].any()
    # 1608 sorted pixels: 0.5 % of 1607 is place 8.035, 99.5 % is 1598.965; each value fills eight
    # places, so the window is [1100, 20900] and 1100 + 99 * 100 is its middle.
    assert row[0] == row[1] == 0
    assert row[199] == row[200] == 255
    assert row[100] == 128  # 127.5, to even
    assert row[50] == 63  # 49 / 198 * 255 = 63.1


def test_a_16_bit_png_is_windowed_too() -> None:
    deep = np.tile(np.array([100, 300], dtype=np.uint16), (8, 4))
    assert decode_image(encoded(Image.fromarray(deep)), 8)[0].tolist() == [0, 255] * 4


def test_a_constant_deep_image_is_black() -> None:
    deep = np.full((8, 8), 5000, dtype=np.uint16)
    assert not decode_image(encoded(Image.fromarray(deep)), 8).any()


def test_the_first_frame_of_a_tiff_counts() -> None:
    pages = [shaded("L", 20), shaded("L", 200)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert (decode_image(data, 8) == 20).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation_turns_the_image_upright(kind: str) -> None:
    stored = np.zeros((16, 16), dtype=np.uint8)
    stored[0:8, 0:8] = 255  # as stored, top left; orientation 6 is shown turned right
    exif = Image.Exif()
    exif[0x0112] = 6
    got = decode_image(encoded(Image.fromarray(stored), kind, exif=exif), 16)
    assert (got[:8, 8:] > 250).all()
    assert (got[:, :8] < 5).all()
    assert (got[8:] < 5).all()


def test_damaged_exif_does_not_cost_the_image() -> None:
    data = encoded(shaded("L", 77), "JPEG", quality=100, exif=b"Exif\0\0no such thing as this")
    assert (decode_image(data, 8) == 77).all()


def test_an_oblong_image_is_centred_on_black() -> None:
    # 8 x 11 in a square of 11: one black column before, two after.
    got = decode_image(grey(50, 8, 11), 11)
    assert got[5].tolist() == [0] + [50] * 8 + [0] * 2
    assert decode_image(grey(50, 11, 8), 11)[:, 5].tolist() == [0] + [50] * 8 + [0] * 2


def test_an_image_of_the_right_size_comes_back_exactly() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    assert np.array_equal(decode_image(encoded(Image.fromarray(pixels)), 16), pixels)


def test_shrinking_averages_instead_of_dropping_pixels() -> None:
    # Every second column white: without antialiasing, quarter size would be all white or black.
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (64, 32))
    got = decode_image(encoded(Image.fromarray(stripes)), 16)
    assert np.abs(got[:, 1:-1].astype(int) - 127).max() <= 2


def test_a_result_is_writable_and_shaped() -> None:
    got = decode_image(grey(9, 30, 20), 12)
    assert got.shape == (12, 12)
    assert got.flags.writeable


# Damaged and hostile files

NAN = np.full((8, 8), np.nan, dtype=np.float32)
BAD = {
    "empty": (b"", "is not a PNG, JPEG or TIFF file"),
    "text": (b"hello", "is not a PNG, JPEG or TIFF file"),
    "GIF": (encoded(shaded("L", 0), "GIF"), "is not a PNG, JPEG or TIFF file"),
    "truncated PNG": (grey(7, 64, 64)[:-30], "cannot be decoded: "),
    "truncated JPEG": (
        encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-500],
        "cannot be decoded: image file is truncated",
    ),
    "truncated TIFF": (encoded(shaded("L", 0), "TIFF")[:-30], "cannot be decoded: "),
    "7 px wide": (grey(0, 7, 20), "is 7 x 20 px, less than 8 a side"),
    "NaN": (encoded(Image.fromarray(NAN), "TIFF"), "holds NaN or infinite values"),
    "LAB": (encoded(shaded("LAB", (0, 0, 0)), "TIFF"), "has mode LAB, which is not one of 1, L,"),
    "65 megapixels": (png_header(10_000, 6_500), "is 10000 x 6500 px, more than 64000000 pixels"),
    "bomb beyond Pillow's limit": (png_header(60_000, 60_000), "decompression bomb"),
    "thin strip": (png_header(8, 20_000), "is 8 x 20000 px, more than 64000000 pixels or 16384"),
    "huge tiles": (
        tiff_header({256: 100, 257: 100, 322: 60_000, 323: 60_000, 324: 64, 325: 64}),
        "has tiles of 3600000000 pixels",
    ),
}


@pytest.mark.parametrize(("data", "fragment"), BAD.values(), ids=BAD.keys())
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bad_image_is_refused_with_its_reason(data: bytes, fragment: str) -> None:
    with pytest.raises(InputError, match=re.escape(fragment)) as caught:
        decode_image(data, 224)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["65 megapixels", "bomb beyond Pillow's limit", "huge tiles"])
def test_an_image_bomb_is_refused_from_its_header(name: str) -> None:
    def peak_mib() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    before_mib, start_s = peak_mib(), time.monotonic()
    with pytest.raises(InputError):
        decode_image(BAD[name][0], 224)
    assert time.monotonic() - start_s < 1
    assert peak_mib() - before_mib < 20


def test_a_file_over_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "1.png").open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(InputError, match=r"^has 268435457 bytes, more than 268435456$"):
        decode_file(tmp_path / "1.png", 8)
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_a_file_comes_with_the_digest_of_what_was_decoded(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(grey(7))
    pixels, sha256 = decode_file(tmp_path / "1.png", 8)
    assert (pixels == 7).all()
    assert sha256 == hashlib.sha256(grey(7)).digest()


def test_no_global_setting_of_pillow_is_changed() -> None:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3


PREFIXES = [b"", b"\x89PNG\r\n\x1a\n", b"II*\0\x08\0\0\0", b"MM\0*", b"\xff\xd8\xff\xe0", b"II+\0"]


@given(prefix=st.sampled_from(PREFIXES), data=st.binary(max_size=300))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_random_bytes_raise_nothing_but_input_errors(prefix: bytes, data: bytes) -> None:
    with pytest.raises(InputError):
        decode_image(prefix + data, 16)


SOUND = [encoded(Image.effect_noise((20, 20), 60), kind) for kind in ("PNG", "JPEG", "TIFF")]
SOUND.append(encoded(Image.effect_noise((20, 20), 60), "TIFF", compression="tiff_lzw"))


@given(data=st.sampled_from(SOUND), place=st.floats(0, 0.999), junk=st.binary(max_size=6))
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_image_gives_pixels_or_an_input_error(
    data: bytes, place: float, junk: bytes
) -> None:
    at = int(place * len(data))
    try:
        got = decode_image(data[:at] + junk + data[at + len(junk) :], 16)
    except InputError:
        return
    assert got.shape == (16, 16)


@pytest.mark.parametrize("data", SOUND, ids=["PNG", "JPEG", "TIFF", "TIFF LZW"])
@pytest.mark.filterwarnings("ignore")
def test_truncation_never_changes_pixels_silently(data: bytes) -> None:
    whole = decode_image(data, 20)
    for n_bytes in range(0, len(data), 7):  # the last few may hold no pixels
        with contextlib.suppress(InputError):
            assert np.array_equal(decode_image(data[:n_bytes], 20), whole)
