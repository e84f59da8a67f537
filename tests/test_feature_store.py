"""Feature files are whole or absent, stay below their limit, and are computed by one worker."""

import errno
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_modules.feature_store import HEADER_BYTES, FeatureStore, Moment, current_boot

MIB = 2**20


def make_store(folder: Path, limit_mib: float = 1.0, since_s: float = 0.0) -> FeatureStore:
    since = Moment(current_boot(), since_s)
    return FeatureStore(folder, limit_bytes=int(limit_mib * MIB), since=since)


def put(
    store: FeatureStore, key: str, values: Tensor, *, worth_s: float = 1.0, num_blocks: int = 2
) -> bool:
    with store.claim(key) as claim:
        assert claim is not None
        if not claim.reserve(values.nbytes, worth_s=worth_s):
            return False
        claim.write(values.chunk(num_blocks), worth_s=worth_s)
    return True


def quarter_mib(value: float) -> Tensor:
    """A quarter of a MiB together with its header."""
    return torch.full((MIB // 4 - HEADER_BYTES,), value).view(torch.float32)[
        : (MIB // 4 - 4096) // 4
    ]


def use_at(store: FeatureStore, key: str, seconds: float) -> None:
    os.utime(store.path_of(key), (seconds, seconds))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 2, 4), (1, 1)])
def test_what_is_put_is_found_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    values = torch.randn(shape).to(dtype)
    values.view(-1)[0] = float("nan")
    store = make_store(tmp_path)
    assert store.find("key") is None
    assert not store.has("key")
    assert put(store, "key", values)
    assert store.has("key")
    found = store.find("key")
    assert found is not None
    assert (found.shape, found.dtype) == (values.shape, values.dtype)
    assert torch.equal(found.view(torch.uint8), values.view(torch.uint8))
    assert store.find("other") is None
    assert [path.name for path in tmp_path.iterdir() if path.name != "room.lock"] == [
        "key.features"
    ]


def test_another_process_finds_it(tmp_path: Path) -> None:
    put(make_store(tmp_path), "key", torch.arange(6.0).view(3, 2))
    found = make_store(tmp_path).find("key")
    assert found is not None
    assert found.tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("length", [0, 1, HEADER_BYTES - 1, HEADER_BYTES, HEADER_BYTES + 23])
def test_a_torn_file_counts_as_nothing_and_is_written_anew(tmp_path: Path, length: int) -> None:
    store, values = make_store(tmp_path), torch.arange(6.0).view(3, 2)
    put(store, "key", values)
    os.truncate(store.path_of("key"), length)
    assert store.find("key") is None
    assert not store.has("key")
    assert put(store, "key", values)
    found = store.find("key")
    assert found is not None
    assert torch.equal(found, values)


@pytest.mark.parametrize(
    "header", [b"", b"{}", b"[1]", b"not json", b'{"shape": [3], "dtype": "torch.int9"}', b"\xff"]
)
def test_a_file_with_a_foreign_header_counts_as_nothing(tmp_path: Path, header: bytes) -> None:
    store = make_store(tmp_path)
    store.path_of("key").write_bytes(header.ljust(HEADER_BYTES) + b"\0" * 24)
    assert store.find("key") is None


def test_a_file_from_before_the_system_was_started_counts_as_nothing(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    put(store, "key", torch.ones(3, 2))
    path = store.path_of("key")
    header = json.loads(path.read_bytes()[:HEADER_BYTES])
    header["boot"] = "another"
    path.write_bytes(json.dumps(header).encode().ljust(HEADER_BYTES) + path.read_bytes()[4096:])
    assert store.find("key") is None
    # And it goes when room is made.
    put(store, "new", torch.ones(3, 2))
    assert not path.exists()


def test_files_stay_below_the_limit_and_the_longest_unused_of_earlier_sweeps_go(
    tmp_path: Path,
) -> None:
    store = make_store(tmp_path, limit_mib=1.0, since_s=1000.0)
    for key, used_s in (("a", 300.0), ("b", 100.0), ("c", 200.0), ("d", 400.0)):
        assert put(store, key, quarter_mib(1.0), worth_s=9.0)
        use_at(store, key, used_s)
    # Four quarters fill the limit. The next is worth less than each of them, but they are idle.
    assert put(store, "e", quarter_mib(2.0), worth_s=1.0)
    left = {path.stem for path in tmp_path.glob("*.features")}
    assert left == {"a", "c", "d", "e"}
    assert sum(path.stat().st_size for path in tmp_path.glob("*.features")) <= MIB


def test_files_of_this_sweep_go_only_for_what_is_worth_more_a_byte(tmp_path: Path) -> None:
    store = make_store(tmp_path, limit_mib=1.0, since_s=1000.0)
    for key, worth_s in (("a", 3.0), ("b", 1.0), ("c", 2.0), ("d", 4.0)):
        assert put(store, key, quarter_mib(1.0), worth_s=worth_s)
        use_at(store, key, 2000.0)
    assert not put(store, "e", quarter_mib(2.0), worth_s=1.0)
    assert {path.stem for path in tmp_path.glob("*.features")} == {"a", "b", "c", "d"}
    assert put(store, "e", quarter_mib(2.0), worth_s=2.5)
    assert {path.stem for path in tmp_path.glob("*.features")} == {"a", "c", "d", "e"}


def test_nothing_goes_where_it_would_not_be_enough(tmp_path: Path) -> None:
    store = make_store(tmp_path, limit_mib=0.5, since_s=1000.0)
    assert put(store, "a", quarter_mib(1.0))
    use_at(store, "a", 5.0)
    assert not put(store, "huge", torch.zeros(MIB))
    assert {path.stem for path in tmp_path.glob("*.features")} == {"a"}


def test_finding_a_file_counts_as_use(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    put(store, "key", torch.ones(3, 2))
    use_at(store, "key", 5.0)
    before_s = time.monotonic()
    store.find("key")
    assert before_s - 1 <= store.path_of("key").stat().st_mtime <= time.monotonic() + 1


def test_what_is_mapped_stays_readable_when_its_file_goes(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    values = torch.randn(1000, 20)
    put(store, "key", values)
    found = store.find("key")
    store.path_of("key").unlink()
    assert found is not None
    assert torch.equal(found, values)


def test_what_is_being_computed_elsewhere_counts_against_the_limit(tmp_path: Path) -> None:
    one, two = make_store(tmp_path, limit_mib=0.4), make_store(tmp_path, limit_mib=0.4)
    with one.claim("a") as first, two.claim("b") as second:
        assert first is not None
        assert second is not None
        assert first.reserve(quarter_mib(0).nbytes, worth_s=1.0)
        assert not second.reserve(quarter_mib(0).nbytes, worth_s=9.0)


def test_a_key_is_held_by_one_worker_at_a_time(tmp_path: Path) -> None:
    one, two = make_store(tmp_path), make_store(tmp_path)
    with one.claim("key") as mine, two.claim("key") as theirs, two.claim("other") as other:
        assert mine is not None
        assert theirs is None
        assert other is not None
    with two.claim("key") as theirs:
        assert theirs is not None


def hold(folder: Path, held: Any) -> None:
    with make_store(folder).claim("key") as claim:
        assert claim is not None
        claim.reserve(24, worth_s=1.0)
        held.set()
        time.sleep(60)


def test_a_worker_that_is_killed_lets_go_of_its_key_and_leaves_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    worker = context.Process(target=hold, args=(tmp_path, held))
    worker.start()
    assert held.wait(30)
    store = make_store(tmp_path)
    with store.claim("key") as claim:
        assert claim is None
    worker.kill()
    worker.join()
    assert store.find("key") is None
    assert (tmp_path / ".key.tmp").exists()
    put(store, "other", torch.ones(3, 2))  # making room clears away what the dead have left
    assert not (tmp_path / ".key.tmp").exists()
    assert put(store, "key", torch.ones(3, 2))


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)

    def blocks() -> Iterator[Tensor]:
        yield torch.ones(2, 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    with store.claim("key") as claim:
        assert claim is not None
        claim.reserve(32, worth_s=1.0)
        with pytest.raises(OSError, match="No space"):
            claim.write(blocks(), worth_s=1.0)
    assert store.find("key") is None
    assert {path.name for path in tmp_path.iterdir()} == {"room.lock"}


def test_a_round_trip_is_timed_and_leaves_no_file(tmp_path: Path) -> None:
    store = make_store(tmp_path / "new")
    assert store.time_round_trip(torch.ones(100, 100), torch.device("cpu")) > 0
    assert list((tmp_path / "new").iterdir()) == []
