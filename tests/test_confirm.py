"""A confirmation trains the best and the baseline anew, with seeds that no trial had."""

from pathlib import Path

import pytest

from search.cli import main
from search.config import load_sweep
from search.confirm import seeds_of
from search.results import best_trial, open_sweep, rank
from search.study.record import Record

pytestmark = pytest.mark.slow


def test_a_confirmation_can_be_widened_and_names_a_winner(
    tiny_sweeps: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["confirm", "tiny", "--storage", str(tiny_sweeps), "--top", "2", "--seeds", "2"])
    assert "`neurosweep export` takes trial" in capsys.readouterr().out
    sweep = open_sweep("tiny", tiny_sweeps)
    record = Record.open(sweep)
    expected = {trial.number for trial in rank(record.trials(), sweep)[:2]} | {0}
    confirmation = record.facts["confirmation"]
    assert {row["number"] for row in confirmation["candidates"]} == expected
    assert best_trial(record).number == confirmation["winner"]

    runs = Record.open(load_sweep(sweep.folder / "tiny-confirm" / "sweep.yaml")).trials()
    assert len(runs) == 2 * len(expected)
    assert all(run.state == "complete" and len(run.epochs) == 3 for run in runs)
    assert {(run.seed, run.view_seed) for run in runs} == {seeds_of(sweep, 0), seeds_of(sweep, 1)}
    assert not {run.seed for run in runs} & {trial.seed for trial in record.trials()}
    # The value of each candidate and seed is its run's best epoch.
    best = {
        (run.params, run.seed): max(epoch.metrics["val_macro_f1"] or 0 for epoch in run.epochs)
        for run in runs
    }
    for row in confirmation["candidates"]:
        params = record.trial(row["number"]).params
        assert row["values"] == [best[params, seeds_of(sweep, index)[0]] for index in (0, 1)]

    main(["confirm", "tiny", "--storage", str(tiny_sweeps), "--top", "2", "--seeds", "3"])
    wider = Record.open(load_sweep(sweep.folder / "tiny-confirm" / "sweep.yaml")).trials()
    assert wider[: len(runs)] == runs  # no run again
    assert len(wider) == 3 * len(expected)
    assert Record.open(sweep).facts["confirmation"]["num_seeds"] == 3
