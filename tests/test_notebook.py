"""Sweeps from Python: the names and errors of the command, results as data frames."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import search
from lightning_modules.errors import InputError
from search import launch, load_results
from search.cli import parser
from search.config import dump_sweep
from search.notebook import Results
from search.study.record import Record
from search.study.recorded import Epoch
from search.sweep import DataSettings, SearchSettings, Sweep


def epoch(number: int, value: float | None, stopped: str = "") -> Epoch:
    return Epoch(
        epoch=number,
        metrics={"val_macro_f1": value, "val_loss": 1.0 / number},
        confusion=[],
        last=None,
        best=None,
        stopped=stopped,
        features="from the cache",
        ran_on="",
    )


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """A sweep of four trials: complete, stopped, diverged, and still running."""
    sweep = Sweep(
        name="recorded",
        storage=str(tmp_path),
        data=DataSettings(path="/nowhere"),
        weights={"mobilenet_v2": "random", "resnet50": "random"},
        search=SearchSettings(num_trials=5, sampler="random"),
    )
    sweep.folder.mkdir()
    record = Record.create(sweep, {})
    (sweep.folder / "sweep.yaml").write_text(dump_sweep(sweep))
    for _ in range(4):
        record.draw()
    record.add_epoch(0, epoch(1, 0.5))
    record.add_epoch(0, epoch(2, 0.4, "max_epochs"))
    record.add_epoch(1, epoch(1, 0.75, "asha"))
    record.add_epoch(2, epoch(1, None, "diverged"))
    return record


def test_results_have_a_row_a_trial_best_first(record: Record) -> None:
    frame = load_results("recorded", storage=record.sweep.storage).dataframe()
    assert list(frame.index) == [1, 0, 2, 3]
    assert list(frame["state"]) == ["pruned", "complete", "failed", "running"]
    assert list(frame["val_macro_f1"].fillna(-1)) == [0.75, 0.5, -1, -1]
    assert list(frame["best_epoch"].fillna(0)) == [1, 1, 0, 0]
    assert list(frame["num_epochs"]) == [1, 2, 1, 0]
    assert frame.loc[0, "dropout"] == 0.3


def test_results_have_a_row_an_epoch(record: Record) -> None:
    frame = load_results(record.sweep.folder).epochs()
    assert list(frame.index) == [(0, 1), (0, 2), (1, 1), (2, 1)]
    assert frame.loc[(0, 2), "val_loss"] == 0.5
    assert frame.loc[(1, 1), "stopped"] == "asha"


def test_results_know_the_best_trial_and_whether_it_was_confirmed(record: Record) -> None:
    results = Results(record)
    assert results.best.number == 1
    assert results.confirmation is None
    assert results.sweep == record.sweep
    assert repr(results) == (
        "<Results of recorded: 3 of 5 trials ended, best val_macro_f1 0.7500, trial 00001>"
    )


def test_a_notebook_shows_a_table_that_no_name_can_break_out_of(record: Record) -> None:
    results = Results(record)
    shown = results._repr_html_()
    assert shown.count("<tr") == 6  # two of the header, four trials
    assert "0.75" in shown
    object.__setattr__(results.sweep, "name", "<script>")
    assert "<script>" not in results._repr_html_()
    assert "&lt;script&gt;" in results._repr_html_()


def test_a_sweep_without_trials_has_empty_frames(record: Record, tmp_path: Path) -> None:
    object.__setattr__(record.sweep, "name", "empty")
    record.sweep.folder.mkdir()
    results = Results(Record.create(record.sweep, {}))
    assert results.dataframe().empty
    assert results.epochs().empty
    assert "0 of 5 trials ended" in results._repr_html_()
    with pytest.raises(InputError, match="a trial of empty must have finished; none has"):
        _ = results.best


def test_a_sweep_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the sweep must have been launched"):
        load_results("nothing", storage=tmp_path)


def test_launch_raises_what_the_command_prints(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the sweep file must exist; nothing at .*missing.yaml"):
        launch(tmp_path / "missing.yaml")
    (tmp_path / "sweep.yaml").write_text("name: few\ndata: {phantom: {}}\n")
    with pytest.raises(InputError, match=r"search.num_trials must be in \[1, 1000000\]; got 0"):
        launch(tmp_path / "sweep.yaml", set={"search.num_trials": 0})
    with pytest.raises(InputError, match="--budget must be a time"):
        launch(tmp_path / "sweep.yaml", budget="soon")
    with pytest.raises(InputError, match="exclude each other"):
        launch(tmp_path / "sweep.yaml", group_duplicates=True, allow_leakage=True)


def test_launch_takes_every_option_of_the_command() -> None:
    commands = parser()._subparsers
    assert commands is not None
    [choices] = [action.choices for action in commands._actions if action.choices]
    assert isinstance(choices, dict)
    of_command = {action.dest for action in choices["launch"]._actions}
    # Events as JSON and tracebacks are for terminals.
    assert set(inspect.signature(launch).parameters) == of_command - {"help", "json", "debug"}


def test_importing_search_imports_neither_torch_nor_ray_nor_pandas() -> None:
    code = (
        "import search, sys; print(*({'torch', 'ray', 'pandas', 'optuna'} & set(sys.modules)), "
        "search.launch.__module__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["search.notebook"]
    assert search.__all__ == ["launch", "load_results"]


@pytest.mark.slow
def test_a_sweep_is_launched_from_a_thread_as_notebooks_do(tmp_path: Path) -> None:
    code = """
import sys, threading
from search import launch
found = []
def run():
    found.append(launch(sys.argv[1], storage=sys.argv[2], set={"search.num_trials": 2}))
thread = threading.Thread(target=run)
thread.start()
thread.join()
[results] = found
print(repr(results), len(results.dataframe()), len(results.epochs()))
"""
    from conftest import TINY_SWEEP

    (tmp_path / "sweep.yaml").write_text(TINY_SWEEP)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "sweep.yaml"), str(tmp_path / "sweeps")],
        capture_output=True,
        text=True,
        timeout=900,
    )
    last = run.stdout.splitlines()[-1]
    assert last.startswith("<Results of tiny: 2 of 2 trials ended, best val_macro_f1 "), run.stderr
    assert last.split()[-2] == "2"
