import contextlib
import errno
import io
import json
import multiprocessing
import os
import re
import resource
import struct
import threading
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile

from lightning_modules.data import pack as pack_module
from lightning_modules.data.manifest import Manifest, read_manifest
from lightning_modules.data.pack import Pack, build_pack, decode_image, default_cache_dir
from lightning_modules.errors import InputError

MINI = (
    Path(os.environ.get("NEUROSWEEP_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    / "data/ci-mri5-mini"
)
Grey = npt.NDArray[np.uint8]


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


def data_set(root: Path, files: dict[str, bytes]) -> Manifest:
    """Class folders with these files, read as a manifest."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return read_manifest(root)


FOUR = {"a/1.png": grey(10), "a/2.png": grey(20), "b/3.png": grey(30), "b/4.png": grey(40)}


def packed(manifest: Manifest, cache: Path, *, skip: bool = False) -> tuple[Pack, Manifest]:
    return build_pack(manifest, image_size_px=8, cache_dir=cache, skip_bad_images=skip)


def values(pack: Pack) -> list[int]:
    """The value of every image of one value."""
    images = pack.images()
    assert (images == images[:, :1, :1]).all()
    return [int(image[0, 0]) for image in images]


def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an image was opened")

    monkeypatch.setattr(Image, "open", refuse)


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


def test_a_file_over_the_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    with (tmp_path / "data/a/1.png").open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(InputError, match=r"'a/1.png' \(has 268435457 bytes, more than 268435456"):
        packed(manifest, tmp_path / "cache")
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


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


# Packs


def test_row_i_of_the_pack_is_row_i_of_the_manifest(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    pack, kept = packed(manifest, tmp_path / "cache")
    assert pack.images().shape == (4, 8, 8)
    assert values(pack) == [10, 20, 30, 40]
    assert pack.skipped == ()
    assert kept.digest == manifest.digest
    reverse = Manifest(manifest.root, manifest.frame[::-1].reset_index(drop=True))
    turned, _ = packed(reverse, tmp_path / "cache")
    assert values(turned) == [40, 30, 20, 10]
    assert turned.digest != pack.digest


def test_images_cannot_be_written_to(tmp_path: Path) -> None:
    pack, _ = packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")
    images = pack.images()
    assert isinstance(images, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 1


def test_a_second_start_opens_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    first, _ = packed(manifest, tmp_path / "cache")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a file was read")

    forbid_decoding(monkeypatch)
    monkeypatch.setattr(pack_module, "_load", refuse)
    monkeypatch.setattr(pack_module, "_sha256", refuse)
    second, kept = packed(manifest, tmp_path / "cache")
    assert second == first
    assert kept.digest == manifest.digest


def test_a_changed_file_gives_another_pack(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    first, _ = packed(manifest, tmp_path / "cache")
    (tmp_path / "data/a/2.png").write_bytes(grey(99))
    second, _ = packed(manifest, tmp_path / "cache")
    assert second.digest != first.digest
    assert values(second) == [10, 99, 30, 40]
    assert values(first) == [10, 20, 30, 40]


def test_a_file_that_changes_during_the_build_is_not_recorded(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    changed = tmp_path / "data/a/1.png"
    build_pack(
        manifest,
        image_size_px=8,
        cache_dir=tmp_path / "cache",
        progress=lambda *_: changed.write_bytes(grey(99)) and None,
    )
    assert not list((tmp_path / "cache").glob("*.json"))
    assert values(packed(manifest, tmp_path / "cache")[0]) == [99, 20, 30, 40]


def test_another_size_or_code_version_gives_another_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    digests = {packed(manifest, tmp_path / "cache")[0].digest}
    digests.add(build_pack(manifest, image_size_px=9, cache_dir=tmp_path / "cache")[0].digest)
    monkeypatch.setattr(pack_module, "_VERSION", 10**6)
    digests.add(packed(manifest, tmp_path / "cache")[0].digest)
    assert len(digests) == 3


@pytest.mark.parametrize("how", ["touched", "copied"])
def test_equal_content_reuses_the_pack_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    first, _ = packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")
    manifest = data_set(tmp_path / ("data" if how == "touched" else "other"), FOUR)
    for path in manifest.frame["path"]:
        os.utime(manifest.root / path, ns=(1, 1))
    forbid_decoding(monkeypatch)
    assert packed(manifest, tmp_path / "cache")[0] == first
    monkeypatch.setattr(pack_module, "_sha256", None)  # and the new times are recorded
    assert packed(manifest, tmp_path / "cache")[0] == first


@pytest.mark.parametrize("change", ["shorter", "longer", "empty", "gone", "text", "other shape"])
def test_a_torn_pack_is_built_anew(tmp_path: Path, change: str) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    pack, _ = packed(manifest, tmp_path / "cache")
    data = pack.path.read_bytes()
    pack.path.write_bytes(
        {
            "shorter": data[:-1],
            "longer": data + b"x",
            "text": b"hello" * 99,
            "other shape": data.replace(b"(4, 8, 8)", b"(8, 8, 4)"),
        }.get(change, b"")
    )
    if change == "gone":
        pack.path.unlink()
    again, _ = packed(manifest, tmp_path / "cache")
    assert again == pack
    assert pack.path.read_bytes() == data


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"digest": 1, "bad": {}}', b"\xff"])
def test_a_torn_record_is_passed_over(tmp_path: Path, record: bytes) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    pack, _ = packed(manifest, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.json")
    file.write_bytes(record)
    assert packed(manifest, tmp_path / "cache")[0] == pack
    assert json.loads(file.read_bytes())["digest"] == pack.digest


def test_a_lost_pack_is_an_input_error_when_used(tmp_path: Path) -> None:
    pack, _ = packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")
    pack.path.unlink()
    with pytest.raises(InputError, match="No such file or directory; start again to rebuild it"):
        pack.images()


def test_a_killed_build_leaves_nothing_for_good(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age_s in (("old", 90_000), ("new", 0)):
        (cache / f".pack-{name}.tmp").touch()
        os.utime(cache / f".pack-{name}.tmp", (time.time() - age_s,) * 2)
    packed(data_set(tmp_path / "data", FOUR), cache)
    assert [file.name for file in cache.glob(".pack-*")] == [".pack-new.tmp"]


def test_progress_is_called_from_the_calling_thread_up_to_the_total(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    calls: list[tuple[int, int, int]] = []
    build_pack(
        manifest,
        image_size_px=8,
        cache_dir=tmp_path / "cache",
        progress=lambda done, total: calls.append((done, total, threading.get_ident())),
    )
    assert calls[-1] == (4, 4, threading.get_ident())
    assert {call[2] for call in calls} == {threading.get_ident()}


def build_and_log(root: Path, cache: Path, log: Path, start: float) -> None:
    """Packs a data set in a process of its own and appends to the log how many were decoded."""
    decoded: list[int] = []
    time.sleep(max(0.0, start - time.time()))
    pack, _ = build_pack(
        read_manifest(root),
        image_size_px=8,
        cache_dir=cache,
        progress=lambda done, _: decoded.append(done),
    )
    with log.open("a") as file:
        file.write(f"{pack.digest} {max(decoded, default=0)}\n")


def test_two_processes_at_once_decode_once_and_give_one_pack(tmp_path: Path) -> None:
    files = {f"{'ab'[i % 2]}/{i}.png": grey(i, 128, 128) for i in range(120)}
    data_set(tmp_path / "data", files)
    fork = multiprocessing.get_context("fork")  # spawn would import everything twice
    arguments = (tmp_path / "data", tmp_path / "cache", tmp_path / "log", time.time() + 0.2)
    processes = [fork.Process(target=build_and_log, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    (one, n_one), (two, n_two) = (
        line.split() for line in (tmp_path / "log").read_text().splitlines()
    )
    assert one == two
    assert {n_one, n_two} == {"120", "0"}
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1


def test_a_node_without_locks_still_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pack_module.fcntl, "flock", no_locks)
    assert values(packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")[0])


# Bad images in a pack

TRUNCATED = encoded(Image.effect_noise((32, 32), 50))[:-100]
BROKEN = {**FOUR, "a/5.png": b"", "b/6.png": TRUNCATED, "b/7.jpg": b"junk"}


def test_all_bad_images_are_listed_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        packed(data_set(tmp_path / "data", BROKEN), tmp_path / "cache")
    message = str(caught.value)
    assert "got 3 of 7 that are not: 'a/5.png' (is not a PNG" in message
    assert "'b/6.png' (cannot be decoded" in message
    assert "'b/7.jpg' (is not" in message
    assert message.endswith("or leave them out with --skip-bad-images")
    assert len(message.splitlines()) == 1
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_of_many_bad_images_ten_are_listed(tmp_path: Path) -> None:
    files = {**FOUR, **{f"a/bad{i:02d}.png": b"" for i in range(12)}}
    with pytest.raises(InputError, match=r"got 12 of 16 .*bad09.png' \([^)]*\) and 2 more;"):
        packed(data_set(tmp_path / "data", files), tmp_path / "cache")


def test_skipped_images_leave_pack_and_manifest_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_set(tmp_path / "data", {**BROKEN, "a/0.png": b"first"})
    pack, kept = packed(manifest, tmp_path / "cache", skip=True)
    assert pack.skipped == ("a/0.png", "a/5.png", "b/6.png", "b/7.jpg")
    assert kept.frame["path"].tolist() == ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]
    assert kept.frame.index.tolist() == [0, 1, 2, 3]
    assert values(pack) == [10, 20, 30, 40]
    # Equal pixels, equal digest: the data set without the bad files has the same pack.
    assert packed(kept, tmp_path / "other")[0].digest == pack.digest
    forbid_decoding(monkeypatch)
    again, kept_again = packed(manifest, tmp_path / "cache", skip=True)
    assert again == pack
    assert kept_again.digest == kept.digest
    with pytest.raises(InputError, match=r"got 4 of 8 that are not: 'a/0.png' \(is not a PNG"):
        packed(manifest, tmp_path / "cache")


def test_a_class_that_would_vanish_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    files = {"a/1.png": grey(1), "b/2.png": b"", "c/3.png": grey(1)}
    with pytest.raises(InputError, match="only images that cannot be decoded for 'b'; repair"):
        packed(data_set(tmp_path / "data", files), tmp_path / "cache", skip=True)


def test_images_all_bad_are_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 2 of 2 that are not"):
        packed(data_set(tmp_path / "data", {"a/1.png": b"", "b/2.png": b""}), tmp_path, skip=True)


def test_an_unreadable_file_is_skipped_for_this_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    read_bytes = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "2.png":
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(InputError, match=r"'a/2.png' \(Permission denied\)"):
            packed(manifest, tmp_path / "cache")
        assert packed(manifest, tmp_path / "cache", skip=True)[0].skipped == ("a/2.png",)
    assert packed(manifest, tmp_path / "cache", skip=True)[0].skipped == ()


def test_an_image_that_went_missing_is_an_error(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    (tmp_path / "data/a/1.png").unlink()
    with pytest.raises(InputError, match=r"No such file or directory for 'a/1.png'; add it"):
        packed(manifest, tmp_path / "cache")


# The cache


def test_a_full_disk_is_noticed_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 4 * 8 * 8 - 1})
    monkeypatch.setattr(pack_module.shutil, "disk_usage", lambda _: usage)
    forbid_decoding(monkeypatch)
    with pytest.raises(InputError, match=r"got 0.0 GiB free of 0.0 GiB needed in .*NEUROSWEEP"):
        packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")


def test_a_disk_that_fills_up_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pack_module.os, "fsync", full)
    with pytest.raises(InputError, match=r"got No space left on device in .*; free space, or"):
        packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="got Not a directory in "):
        packed(data_set(tmp_path / "data", FOUR), tmp_path / "file/cache")


def test_a_new_cache_is_for_its_user_alone(tmp_path: Path) -> None:
    packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("size_px", [7, 0, -1, 4097])
def test_an_image_size_out_of_range_is_an_error(tmp_path: Path, size_px: int) -> None:
    with pytest.raises(InputError, match=r"image_size_px lies in \[8, 4096\]; got "):
        build_pack(Manifest(tmp_path, pd.DataFrame()), image_size_px=size_px, cache_dir=tmp_path)


def test_the_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    monkeypatch.setenv("NEUROSWEEP_CACHE", "/fast")
    assert default_cache_dir() == Path("/fast")
    monkeypatch.setenv("NEUROSWEEP_CACHE", "")
    assert default_cache_dir() == Path("/xdg/neurosweep")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path("/home/x/.cache/neurosweep")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path("/home/x/.cache/neurosweep")


# Real images


@pytest.mark.skipif(not MINI.is_dir(), reason="needs the project's shared data")
def test_the_mini_set_packs_at_its_own_size_exactly(tmp_path: Path) -> None:
    manifest = read_manifest(MINI)
    pack, kept = build_pack(manifest, image_size_px=96, cache_dir=tmp_path)
    assert pack.images().shape == (140, 96, 96)
    assert np.bincount(kept.labels()).tolist() == [28] * 5
    for row in (0, 70, 139):
        with Image.open(MINI / manifest.frame["path"][row]) as image:
            assert np.array_equal(pack.images()[row], np.asarray(image.convert("L")))
