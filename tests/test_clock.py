"""Setting the time of day, by a day to and fro, changes nothing that is decided by time."""

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from conftest import small_sweep

from lightning_modules.data.manifest import read_manifest
from lightning_modules.data.pack import build_pack
from lightning_modules.data.phantom import PhantomSettings, write_phantoms
from lightning_modules.errors import InputError
from lightning_modules.feature_store import HEADER_BYTES, FeatureStore, Moment, current_moment
from search.folder import lock
from search.study.record import Record
from search.sweep import Sweep
from search.tuning import silence
from search.tuning.patience import PATIENCE_S, patiently
from search.tuning.recorder import EndOfSweep, StudyRecorder
from search.tuning.scheduler import ResumableASHA
from search.tuning.silence import EndSilentWorkers

DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def _jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time of day that whoever asks for it finds a day ahead, and then a day behind."""
    real, jumps = time.time, itertools.cycle((DAY_S, -DAY_S))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    sweep = small_sweep(tmp_path, "jumping", time_budget_s=3600.0)
    sweep.folder.mkdir()
    return sweep


def test_a_time_budget_is_not_used_up_by_a_jump(sweep: Sweep) -> None:
    recorder = StudyRecorder(Record.create(sweep, {}), ResumableASHA(sweep))
    end = EndOfSweep(recorder)
    assert not any(recorder.is_over() or end("a", {}) or end.stop_all() for _ in range(4))


def test_a_time_budget_is_not_prolonged_by_a_jump(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = StudyRecorder(Record.create(sweep, {}), ResumableASHA(sweep))
    later_s = time.monotonic() + 3601.0
    monkeypatch.setattr(time, "monotonic", lambda: later_s)
    assert all(recorder.is_over() for _ in range(4))


def test_a_live_worker_is_not_silent_for_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "kill", lambda actor: pytest.fail("a live worker was ended"))
    trial = SimpleNamespace(trial_id="a", temporary_state=SimpleNamespace(ray_actor="the worker"))
    watch = EndSilentWorkers()
    watch.on_trial_start(0, [trial], trial)
    for _ in range(4):
        watch.on_step_begin(0, [trial])
        watch.on_trial_result(0, [trial], trial, {})
        watch.on_step_begin(0, [trial])


def test_a_silent_worker_is_not_kept_by_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)
    monkeypatch.setattr(silence, "FIRST_EPOCH_S", 1.5)
    seconds = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: float(next(seconds)))
    trial = SimpleNamespace(trial_id="a", temporary_state=SimpleNamespace(ray_actor="the worker"))
    watch = EndSilentWorkers()
    watch.on_trial_start(0, [trial], trial)
    for _ in range(4):
        watch.on_step_begin(0, [trial])
    assert killed == ["the worker"]


def test_an_epoch_that_a_trial_has_to_compute_after_stored_ones_may_take_as_long_as_anothers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(silence, "LEAST_S", 2.0)
    watch = EndSilentWorkers()
    trials = [SimpleNamespace(trial_id=name) for name in "ab"]
    for trial, epochs_s in zip(trials, ([4.0], [0.1, 0.1]), strict=True):
        watch.on_trial_start(0, trials, trial)
        for epoch_s in epochs_s:
            watch._silent_s[trial.trial_id] = epoch_s
            watch.on_trial_result(0, trials, trial, {})
    watch.on_trial_complete(0, trials, trials[0])
    for silent_s, is_too_long in ((3.0, False), (11.0, False), (13.0, True)):
        watch._silent_s["b"] = silent_s
        assert watch.is_too_long("b") == is_too_long


def test_storage_is_waited_for_as_long_after_a_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]

    def wait(seconds: float) -> None:
        now_s[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now_s[0])
    monkeypatch.setattr(time, "sleep", wait)

    def write() -> str:
        if now_s[0] < PATIENCE_S - 1:
            raise FileNotFoundError(2, "No such file or directory")
        return "written"

    assert patiently(write, (OSError,), tell=lambda line: None) == "written"


def test_the_lock_of_a_sweep_that_runs_does_not_grow_old(sweep: Sweep) -> None:
    with lock(sweep):
        for days in (-400, 400):
            os.utime(sweep.folder / ".lock", (time.time() + days * DAY_S,) * 2)
            with pytest.raises(InputError, match="a sweep runs in one process at a time"):
                lock(sweep).__enter__()
    with lock(sweep):
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FeatureStore]:
    """Room for two, and a file system that stamps files by the time of day."""
    set_times = os.utime

    def utime(path: Path, times: tuple[float, float] | None = None) -> None:
        set_times(path, times or (time.time(),) * 2)

    monkeypatch.setattr(os, "utime", utime)
    size = 2 * (4096 + HEADER_BYTES)
    return FeatureStore(tmp_path, limit_bytes=size, since=current_moment())


def put(store: FeatureStore, key: str, worth_s: float) -> bool:
    with store.claim(key) as claim:
        assert claim is not None
        if not claim.reserve(4096, worth_s=worth_s):
            return False
        claim.write([torch.zeros(1, 1024)], worth_s=worth_s)
    return True


def test_features_in_use_do_not_go_for_what_is_worth_less(store: FeatureStore) -> None:
    assert put(store, "a", 3.0)
    assert put(store, "b", 2.0)
    for _ in range(2):  # a day ahead, a day behind
        assert store.find("a") is not None
        assert store.find("b") is not None
        assert not put(store, "c", 1.0)


def test_features_of_earlier_sweeps_go_whatever_the_time_of_day_was(store: FeatureStore) -> None:
    for key in ("a", "b"):
        assert put(store, key, 3.0)
        assert store.find(key) is not None
    later = FeatureStore(store.folder, limit_bytes=store.limit_bytes, since=current_moment())
    assert put(later, "c", 1.0)
    assert store.find("a") is None  # the longest unused


def test_on_another_node_a_sweep_began_when_it_came_there(store: FeatureStore) -> None:
    assert put(store, "a", 3.0)
    elsewhere = Moment("another boot", 0.0)
    later = FeatureStore(store.folder, limit_bytes=store.limit_bytes, since=elsewhere)
    assert later.since_s <= time.monotonic()
    assert put(later, "b", 1.0)
    assert put(later, "c", 1.0)
    assert store.find("a") is None


def test_a_pack_that_is_being_built_is_not_taken_for_left_behind(tmp_path: Path) -> None:
    manifest = read_manifest(
        write_phantoms(PhantomSettings(num_patients=5, slices_per_patient=1), tmp_path / "data")
    )
    nested: list[Path] = []

    def build_another(done: int, total: int) -> None:
        if not nested:
            [written] = (tmp_path / "cache").glob(".pack-*.tmp")
            nested.append(written)
            for days in (-400, 400):
                os.utime(written, (time.time() + days * DAY_S,) * 2)
                # Another size: another pack, by whoever makes room for it.
                build_pack(manifest, image_size_px=64 + days // 100, cache_dir=tmp_path / "cache")
                assert written.exists()

    pack, _ = build_pack(
        manifest, image_size_px=32, cache_dir=tmp_path / "cache", progress=build_another
    )
    assert nested
    assert pack.path.is_file()
