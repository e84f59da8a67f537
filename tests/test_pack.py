import errno
import fcntl
import io
import json
import multiprocessing
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd
import pytest
from PIL import Image

from lightning_modules.data import pack as pack_module
from lightning_modules.data.manifest import Manifest, read_manifest
from lightning_modules.data.pack import Pack, build_pack, default_cache_dir
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


# Packs


def test_row_i_of_the_pack_is_row_i_of_the_manifest(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    pack, kept = packed(manifest, tmp_path / "cache")
    assert pack.images().shape == (4, 8, 8)
    assert values(pack) == [10, 20, 30, 40]
    assert tuple(pack.skipped) == ()
    assert kept.digest == manifest.digest
    reverse = Manifest(manifest.root, manifest.frame[::-1].reset_index(drop=True))
    turned, _ = packed(reverse, tmp_path / "cache")
    assert values(turned) == [40, 30, 20, 10]
    assert turned.digest != pack.digest


def test_what_is_written_to_images_reaches_neither_the_file_nor_other_readers(
    tmp_path: Path,
) -> None:
    pack, _ = packed(data_set(tmp_path / "data", FOUR), tmp_path / "cache")
    before, other = pack.path.read_bytes(), pack.images()
    images = pack.images()
    assert isinstance(images, np.memmap)
    images[:] = 1
    images.flush()
    assert values(pack) == [10, 20, 30, 40]
    assert not np.array_equal(other, images)
    assert pack.path.read_bytes() == before


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
    monkeypatch.setattr(pack_module, "DECODER_VERSION", 10**6)
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
    for name in ("left", "written"):
        (cache / f".pack-{name}.tmp").touch()
    with (cache / ".pack-written.tmp").open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        packed(data_set(tmp_path / "data", FOUR), cache)
    assert [file.name for file in cache.glob(".pack-*")] == [".pack-written.tmp"]


def test_what_is_being_built_is_locked(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    refused = []

    def look(done: int, total: int) -> None:
        [path] = cache.glob(".pack-*.tmp")
        with path.open("r+b") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refused.append(path)

    build_pack(data_set(tmp_path / "data", FOUR), image_size_px=8, cache_dir=cache, progress=look)
    assert refused
    assert not list(cache.glob(".pack-*.tmp"))


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
    assert "got 3 of 7 that are not: '5.png' in class 'a' (is not a PNG" in message
    assert "'6.png' in class 'b' (cannot be decoded" in message
    assert "'7.jpg' in class 'b' (is not" in message
    assert message.endswith("or leave them out with --skip-bad-images")
    assert len(message.splitlines()) == 1
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".lock"}


def test_many_bad_images_are_all_listed(tmp_path: Path) -> None:
    files = {**FOUR, **{f"a/bad{i:02d}.png": b"" for i in range(12)}}
    with pytest.raises(
        InputError, match=r"got 12 of 16 .*'bad09.png' in .*'bad11.png' in class 'a' \([^)]*\);"
    ):
        packed(data_set(tmp_path / "data", files), tmp_path / "cache")


def test_skipped_images_leave_pack_and_manifest_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_set(tmp_path / "data", {**BROKEN, "a/0.png": b"first"})
    pack, kept = packed(manifest, tmp_path / "cache", skip=True)
    assert tuple(pack.skipped) == ("a/0.png", "a/5.png", "b/6.png", "b/7.jpg")
    assert kept.frame["path"].tolist() == ["a/1.png", "a/2.png", "b/3.png", "b/4.png"]
    assert kept.frame.index.tolist() == [0, 1, 2, 3]
    assert values(pack) == [10, 20, 30, 40]
    # Equal pixels, equal digest: the data set without the bad files has the same pack.
    assert packed(kept, tmp_path / "other")[0].digest == pack.digest
    forbid_decoding(monkeypatch)
    again, kept_again = packed(manifest, tmp_path / "cache", skip=True)
    assert again == pack
    assert kept_again.digest == kept.digest
    with pytest.raises(
        InputError, match=r"got 4 of 8 that are not: '0.png' in class 'a' \(is not a PNG"
    ):
        packed(manifest, tmp_path / "cache")


def test_a_class_that_would_vanish_is_an_error_even_when_skipping(tmp_path: Path) -> None:
    files = {"a/1.png": grey(1), "b/2.png": b"", "c/3.png": grey(1)}
    with pytest.raises(InputError, match="only images that cannot be decoded for 'b'; repair"):
        packed(data_set(tmp_path / "data", files), tmp_path / "cache", skip=True)


def test_images_all_bad_are_an_error_even_when_skipping(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got 2 of 2 that are not"):
        packed(data_set(tmp_path / "data", {"a/1.png": b"", "b/2.png": b""}), tmp_path, skip=True)


def test_a_file_over_the_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    with (tmp_path / "data/a/1.png").open("wb") as file:
        file.truncate(256 * 2**20 + 1)  # sparse: takes no room
    tracemalloc.start()
    with pytest.raises(
        InputError, match=r"'1.png' in class 'a' \(has 268435457 bytes, more than 268435456"
    ):
        packed(manifest, tmp_path / "cache")
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


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
        with pytest.raises(InputError, match=r"'2.png' in class 'a' \(Permission denied\)"):
            packed(manifest, tmp_path / "cache")
        assert tuple(packed(manifest, tmp_path / "cache", skip=True)[0].skipped) == ("a/2.png",)
    assert tuple(packed(manifest, tmp_path / "cache", skip=True)[0].skipped) == ()


def test_an_image_that_went_missing_is_an_error(tmp_path: Path) -> None:
    manifest = data_set(tmp_path / "data", FOUR)
    (tmp_path / "data/a/1.png").unlink()
    with pytest.raises(InputError, match=r"No such file or directory for '1.png' in row 1; add it"):
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
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".lock"}


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
