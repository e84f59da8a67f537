"""A sweep of simulated trials, killed at any of its writes, ends as one that was left alone.

No Ray: the searcher, scheduler, and recorder are driven here in the order in which Ray's controller
calls them. ``test_resume`` does the same with processes.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from sqlalchemy import event
from sqlalchemy.engine import Engine

from lightning_modules.data.phantom import PhantomSettings
from lightning_modules.seeds import derive_seed
from search.space import Float, Int
from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import DataSettings, SchedulerSettings, SearchSettings, Sweep, TrainingSettings
from search.tuning.recorder import EndOfSweep, StudyRecorder
from search.tuning.scheduler import ResumableASHA
from search.tuning.searcher import StudySearcher


class Killed(BaseException):
    """The process died here."""


def make_sweep(folder: Path, sampler: str = "random", num_trials: int = 7) -> Sweep:
    return Sweep(
        name="simulated",
        storage=str(folder),
        metric="val_loss",
        data=DataSettings(phantom=PhantomSettings()),
        space={"lr": Float(low=1e-5, high=1.0, log=True), "unfreeze_depth": Int(low=0, high=5)},
        training=TrainingSettings(max_epochs=9),
        search=SearchSettings(num_trials=num_trials, sampler=sampler, keep_trials=3),
        scheduler=SchedulerSettings(grace_period_epochs=1, reduction_factor=3),
    )


def loss_of(config: dict[str, Any], epoch: int) -> float:
    """A curve that falls to a floor that depends on the params; some diverge at once."""
    if config["params"]["lr"] > 0.01:
        return math.nan
    floor = abs(math.log10(config["params"]["lr"]) + 3) + 0.1 * config["params"]["unfreeze_depth"]
    wiggle = derive_seed(config["seed"], epoch) / 2**31
    return floor + 2 / epoch + 0.1 * wiggle


def run(record: Record, execute: Callable[[int, int], None] = lambda number, epoch: None) -> None:
    """Run a sweep from where its record stands, one trial at a time, as the tuner does."""
    scheduler = ResumableASHA(record.sweep, record.trials())
    recorder = StudyRecorder(record, scheduler)
    searcher = StudySearcher(record, recorder.take_up(), recorder)
    end = EndOfSweep(recorder)
    num_started = 0
    while (config := searcher.suggest(trial_id := f"ray-{num_started}")) != Searcher.FINISHED:
        num_started += 1
        ray_trial = SimpleNamespace(trial_id=trial_id, config=config, error_file=None)
        scheduler.on_trial_add(None, ray_trial)
        resume = config["resume"]
        for epoch in range(1 if resume is None else resume["last"]["epoch"] + 1, 10):
            execute(config["number"], epoch)
            result = report_of(record.sweep, config, epoch)
            result["done"] = end(trial_id, result) or (
                scheduler.on_trial_result(None, ray_trial, result) == TrialScheduler.STOP
            )
            recorder.on_trial_result(0, [], ray_trial, result)
            if result["done"]:
                scheduler.on_trial_complete(None, ray_trial, result)
                recorder.on_trial_complete(0, [], ray_trial)
                break


def report_of(sweep: Sweep, config: dict[str, Any], epoch: int) -> dict[str, Any]:
    """What a worker reports, its checkpoint really written."""
    loss = loss_of(config, epoch)
    metrics = {"val_loss": loss, "train_loss": loss, "val_macro_f1": 0.5, "val_accuracy": 0.5}
    stem = f"trials/{config['number']:05d}/e{epoch}-a{config['attempt']}"
    files = {}
    for kind in ("last", "best"):
        path = sweep.folder / f"{stem}-{kind}.ckpt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
        empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        files[kind] = {"path": f"{stem}-{kind}.ckpt", "digest": empty, "epoch": epoch}
    return {
        "epoch": epoch,
        **metrics,
        "metrics": metrics,
        "confusion": [],
        "features": "",
        "ran_on": "",
        **files,
    }


def outcome(trials: list[Trial]) -> list[Any]:
    """All that a kill must not change."""
    return [
        (
            trial.number,
            trial.params,
            trial.seed,
            trial.state,
            trial.reason,
            [(epoch.epoch, epoch.metrics, epoch.stopped) for epoch in trial.epochs],
        )
        for trial in trials
    ]


class Writes:
    """Counts rows and commits on their way to the database; dies before the one after ``limit``.

    Attributes:
        count: Rows and commits.
        commits: Commits that wrote.
    """

    def __init__(self, limit: float = math.inf) -> None:
        self.limit = limit
        self.count = 0
        self.commits = 0
        self.has_written = False

    def __enter__(self) -> "Writes":
        event.listen(Engine, "before_cursor_execute", self.on_statement)
        event.listen(Engine, "commit", self.on_commit)
        return self

    def __exit__(self, *raised: object) -> None:
        event.remove(Engine, "before_cursor_execute", self.on_statement)
        event.remove(Engine, "commit", self.on_commit)

    def on_statement(self, connection: Any, cursor: Any, statement: str, *more: Any) -> None:
        if not statement.startswith(("SELECT", "PRAGMA")):
            self.has_written = True
            self.tick()

    def on_commit(self, connection: Any) -> None:
        if self.has_written:
            self.has_written = False
            self.commits += 1
            self.tick()

    def tick(self) -> None:
        if self.count >= self.limit:
            raise Killed
        self.count += 1


def check_killed_at(
    tmp_path: Path,
    expected: list[Any],
    limit: int,
    sampler: str = "random",
    num_trials: int = 7,
) -> None:
    sweep = make_sweep(tmp_path / str(limit), sampler, num_trials)
    sweep.folder.mkdir(parents=True)
    executed: list[tuple[int, int]] = []
    record = Record.create(sweep, {})
    with Writes(limit), pytest.raises(Killed):
        run(record, lambda number, epoch: executed.append((number, epoch)))
    before = Record.open(sweep).trials()
    num_before = len(executed)
    run(Record.open(sweep), lambda number, epoch: executed.append((number, epoch)))
    after = Record.open(sweep).trials()

    assert outcome(after) == expected, f"killed at write {limit}"
    # Recorded epochs are not run again, and at most the epoch that was under way is.
    recorded = {(trial.number, epoch.epoch) for trial in before for epoch in trial.epochs}
    repeated = set(executed[:num_before]) & set(executed[num_before:])
    assert not recorded & set(executed[num_before:])
    assert len(repeated) <= 1
    kept = list((sweep.folder / "trials").rglob("*.ckpt"))
    best = [path for path in kept if path.parent.name != "00000"]
    others = [t for t in after if t.number and t.state != "failed" and t.epochs[-1].best]
    assert len(best) == min(3, len(others)), "keep_trials"
    assert len(kept) - len(best) <= 1, "the baseline's"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    sweep = make_sweep(tmp_path_factory.mktemp("left-alone"))
    sweep.folder.mkdir(parents=True)
    run(Record.create(sweep, {}))
    return outcome(Record.open(sweep).trials())


def test_the_simulated_sweep_has_every_kind_of_ending(expected: list[Any]) -> None:
    endings = {(state, reason) for _, _, _, state, reason, _ in expected}
    assert endings == {("complete", "max_epochs"), ("pruned", "asha"), ("failed", "diverged")}


def test_killed_at_a_sample_of_its_writes(tmp_path: Path, expected: list[Any]) -> None:
    # Before anything is written, within the description of a trial, within an epoch.
    for limit in (0, 4, 41):
        check_killed_at(tmp_path, expected, limit)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stride", [pytest.param(1, marks=pytest.mark.soak, id="every"), pytest.param(3, id="third")]
)
def test_killed_at_every_write(tmp_path: Path, expected: list[Any], stride: int) -> None:
    sweep = make_sweep(tmp_path / "counted")
    sweep.folder.mkdir(parents=True)
    record = Record.create(sweep, {})
    with Writes() as writes:
        run(record)
    assert writes.count > 100
    for limit in range(0, writes.count, stride):
        check_killed_at(tmp_path, expected, limit)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "gp", "cma_es", "grid"])
def test_every_sampler_goes_on_as_if_nothing_had_happened(tmp_path: Path, sampler: str) -> None:
    # 14 trials: the models take over after 5; the grid has 9 points beside the baseline. The
    # kills fall on each write of a late epoch.
    num_trials = 10 if sampler == "grid" else 14
    sweep = make_sweep(tmp_path / sampler, sampler, num_trials)
    sweep.folder.mkdir(parents=True)
    run(Record.create(sweep, {}))
    expected = outcome(Record.open(sweep).trials())
    for limit in (50, 51, 52, 53):
        check_killed_at(tmp_path, expected, limit, sampler, num_trials)


def test_a_torn_checkpoint_falls_back_to_starting_over(tmp_path: Path) -> None:
    sweep = make_sweep(tmp_path)
    sweep.folder.mkdir(parents=True)
    record = Record.create(sweep, {})
    with Writes(37), pytest.raises(Killed):
        run(record)
    trial = Record.open(sweep).trials()[-1]
    assert trial.state == "running"
    last = trial.epochs[-1].last
    assert last is not None
    (sweep.folder / last.path).write_bytes(b"torn")
    record = Record.open(sweep)
    recorder = StudyRecorder(record, ResumableASHA(sweep, record.trials()))
    searcher = StudySearcher(record, recorder.take_up(), recorder)
    resume = searcher.suggest("again")["resume"]
    earlier = trial.epochs[-2].last if len(trial.epochs) > 1 else None
    assert (resume and resume["last"]["path"]) == (earlier and earlier.path)


def test_a_time_budget_ends_every_trial_and_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = make_sweep(tmp_path)
    sweep = dataclasses.replace(
        sweep, search=dataclasses.replace(sweep.search, time_budget_s=100.0)
    )
    sweep.folder.mkdir(parents=True)
    clock_s = [0.0]
    monkeypatch.setattr("search.tuning.recorder.time.monotonic", lambda: clock_s[0])

    def take_ten_seconds(number: int, epoch: int) -> None:
        clock_s[0] += 10

    run(Record.create(sweep, {}), take_ten_seconds)
    trials = Record.open(sweep).trials()
    # The epoch under way at 100 s ends at 110 s, is recorded, and is the last.
    assert sum(len(trial.epochs) for trial in trials) == 11
    assert trials[-1].state == "pruned"
    assert trials[-1].reason == "time_budget"
    assert all(trial.state != "running" for trial in trials)
    # A later resume draws the trials that are missing, and runs none of these again.
    clock_s[0] = 0.0
    run(Record.open(sweep), lambda number, epoch: None)
    resumed = Record.open(sweep).trials()
    assert resumed[: len(trials)] == trials
    assert len(resumed) == 7


def test_no_trial_stays_running(expected: list[Any]) -> None:
    assert "running" not in {state for _, _, _, state, _, _ in expected}
