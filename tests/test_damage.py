"""A record or checkpoint that is cut or flipped anywhere: the last good state, or one clear error.

Never a silent fresh start, and never a figure that was not reported.
"""

import dataclasses
import json
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_sweep

from lightning_modules.errors import InputError
from search.study import storage as study_storage
from search.study.integrity import CHECKSUM, with_checksum, without_checksum
from search.study.record import Record
from search.study.recorded import CheckpointFile, Epoch, Trial
from search.study.sweep_files import LocalFiles
from search.sweep import Sweep
from search.tuning.checkpoint import AtomicCheckpointIO
from search.tuning.checkpoint_files import newest_whole

State = tuple[dict[str, Any], list[Trial], list[Any]]

PAGE_BYTES = 4096


def epoch_of(epoch: int, loss: float, stopped: str = "") -> Epoch:
    return Epoch(
        epoch=epoch,
        metrics={"val_loss": loss, "train_loss": loss},
        confusion=[[7, 1], [2, 5]],
        last=CheckpointFile(path=f"trials/last-{epoch}", digest="0" * 64, epoch=epoch),
        best=None,
        stopped=stopped,
        features="from the cache",
        ran_on="here",
    )


def read(sweep: Sweep) -> State:
    """What resume reads: everything."""
    record = Record.open(sweep)
    record.check()
    known = [
        (trial.number, trial.state, trial.params, trial.intermediate_values)
        for trial in record._known
    ]
    state = record.facts, record.trials(), known
    record._storage.engine.dispose()  # whoever has the file open keeps its log
    return state


@dataclass
class History:
    """A sweep's folder at rest, or as a killed driver leaves it; and all that it has held.

    At rest everything is in the file; after a kill half of it is in the log alone.
    """

    folders: dict[str, Path]
    states: list[State]

    def bytes_of(self, name: str) -> bytes:
        return (self.folders[name] / name).read_bytes()

    def outcome(self, tmp_path: Path, name: str, data: bytes) -> str:
        """Read the sweep with other bytes in one of its files; return what came of it."""
        sweep = small_sweep(tmp_path, "damaged")
        shutil.copytree(self.folders[name], sweep.folder)
        (sweep.folder / name).write_bytes(data)
        said = ""
        try:
            state = read(sweep)
        except InputError as error:
            said = str(error)
        finally:
            shutil.rmtree(sweep.folder)
        if said:
            assert sweep.name in said
            assert "\n" not in said
            return "refused"
        assert state in self.states
        return "whole" if state == self.states[-1] else "earlier"


@pytest.fixture(scope="module")
def history(tmp_path_factory: pytest.TempPathFactory) -> History:
    folder = tmp_path_factory.mktemp("history")
    sweep = small_sweep(folder, "damaged")
    sweep.folder.mkdir()
    states: list[State] = []
    every_system = {line.split()[2] for line in Path("/proc/self/mounts").read_text().splitlines()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_storage, "LOCAL_FILE_SYSTEMS", every_system)
        facts = {"classes": ["glioma", "stroke"], "manifest_digest": "0" * 64}
        record = Record.create(sweep, facts)
        states.append(read(sweep))
        with record.being_written():
            for losses, stopped in (
                ((3.0, 1.0, 2.0), "max_epochs"),
                ((3.0, 4.0), "asha"),
                ((2.5,), ""),
            ):
                number = record.draw().number
                states.append(read(sweep))
                for epoch, loss in enumerate(losses, start=1):
                    ends = stopped if epoch == len(losses) else ""
                    record.add_epoch(number, epoch_of(epoch, loss, ends))
                    states.append(read(sweep))
                    if (number, epoch) == (1, 1):
                        # What comes before is in the file, what follows is in the log.
                        with closing(sqlite3.connect(sweep.folder / "study.db")) as database:
                            database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            killed = tmp_path_factory.mktemp("killed") / "damaged"
            shutil.copytree(sweep.folder, killed)
    (killed / "study.db-shm").unlink()  # shared memory; made anew from the log
    assert [path.name for path in sweep.folder.iterdir()] == ["study.db"]
    return History({"study.db": sweep.folder, "study.db-wal": killed}, states)


def flipped(data: bytes, position: int) -> bytes:
    """One bit changed; which one differs from position to position."""
    changed = bytearray(data)
    changed[position] ^= 1 << (position % 8)
    return bytes(changed)


def flips(data: bytes, every: int = 1) -> Iterator[bytes]:
    """One bit changed in each byte, or in every so manieth, that holds something."""
    holding = [position for position, byte in enumerate(data) if byte]
    for position in holding[::every]:
        yield flipped(data, position)


def cuts(data: bytes, every: int) -> Iterator[bytes]:
    yield data[:-1]
    for length in range(0, len(data), every):
        yield data[:length]


def test_an_undamaged_record_is_read_whole(tmp_path: Path, history: History) -> None:
    for name in ("study.db", "study.db-wal"):
        assert history.outcome(tmp_path, name, history.bytes_of(name)) == "whole"
    # The file alone is an earlier state: the tests below can tell them apart.
    assert history.outcome(tmp_path, "study.db-wal", b"") == "earlier"


def test_every_flip_of_what_was_reported_is_seen(tmp_path: Path, history: History) -> None:
    data = history.bytes_of("study.db")
    for said in (b"val_loss", b"glioma", b'"lr": ', b"last-1"):
        found = {
            history.outcome(tmp_path, "study.db", flipped(data, match.end() - 1))
            for match in re.finditer(re.escape(said), data)
        }
        # A page keeps what was deleted from it: that may change.
        assert "refused" in found, said
        assert found <= {"refused", "whole"}, said


def check_anywhere(tmp_path: Path, history: History, name: str, every: int, cut: int) -> None:
    data = history.bytes_of(name)
    flips_to = Counter(history.outcome(tmp_path, name, d) for d in flips(data, every))
    cuts_to = Counter(history.outcome(tmp_path, name, d) for d in cuts(data, cut))
    if name == "study.db":
        # Some of it is nobody's: what was deleted, words of the schema.
        assert flips_to["refused"] > sum(flips_to.values()) / 4
        assert set(cuts_to) == {"refused"}
    else:
        # Each commit in the log bears its own checksum: what follows a torn one is not read.
        assert flips_to["earlier"] == sum(flips_to.values())
        assert cuts_to["earlier"] == sum(cuts_to.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study.db", "study.db-wal"])
def test_a_record_cut_or_flipped_here_and_there_is_good_or_refused(
    tmp_path: Path, history: History, name: str
) -> None:
    check_anywhere(tmp_path, history, name, every=601, cut=5 * PAGE_BYTES - 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["study.db", "study.db-wal"])
def test_a_record_cut_or_flipped_in_each_page_is_good_or_refused(
    tmp_path: Path, history: History, name: str
) -> None:
    check_anywhere(tmp_path, history, name, every=61, cut=PAGE_BYTES)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_params SET param_value = 0.5 WHERE trial_id = 2",
        "UPDATE trial_intermediate_values SET intermediate_value = 0.5 WHERE trial_id = 2",
        "DELETE FROM trial_intermediate_values WHERE trial_id = 2",
        "DELETE FROM trial_user_attributes WHERE trial_id = 2 AND key = 'epoch_00001'",
        "UPDATE trial_user_attributes SET value_json = '1' WHERE key = 'seed'",
        "UPDATE trial_system_attributes SET value_json = '{\"lr\": 0.5}'",
        "UPDATE trials SET state = 'RUNNING' WHERE number = 1",
        "UPDATE trials SET state = 'COMPLETE' WHERE number = 2",
        "UPDATE trials SET study_id = 7 WHERE number = 2",
        "DELETE FROM trials WHERE number = 2",
        "DELETE FROM trials",
        "UPDATE study_user_attributes SET value_json = '[\"stroke\"]' WHERE key = 'classes'",
        "DELETE FROM study_user_attributes WHERE key = 'classes'",
        "DELETE FROM study_user_attributes",
    ],
)
def test_rows_that_changed_by_themselves_are_seen(
    tmp_path: Path, history: History, statement: str
) -> None:
    sweep = small_sweep(tmp_path, "damaged")
    shutil.copytree(history.folders["study.db"], sweep.folder)
    with closing(sqlite3.connect(sweep.folder / "study.db")) as database:
        database.execute(statement)
        database.commit()
    with pytest.raises(InputError, match=r"^(a|the) sweep's record .*: restore it from a copy"):
        read(sweep)


def test_another_database_has_checksums_and_is_asked_nothing_that_only_sqlite_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_storage, "check_file", lambda path: pytest.fail("SQLite was asked"))
    url = f"sqlite:///{tmp_path / 'server'}"  # in the place of a PostgreSQL
    sweep = dataclasses.replace(small_sweep(tmp_path, "damaged"), study_url=url)
    record = Record.create(sweep, {"classes": ["glioma"]})
    record.add_epoch(record.draw().number, epoch_of(1, 3.0))
    assert len(read(sweep)[1]) == 1
    with closing(sqlite3.connect(tmp_path / "server")) as database:
        database.execute("UPDATE trial_user_attributes SET value_json = '1' WHERE key = 'seed'")
        database.commit()
    with pytest.raises(InputError, match="trial 0 does not match its checksum"):
        read(sweep)


def test_a_checksum_follows_what_is_added_and_replaced() -> None:
    def texts(attributes: dict[str, Any]) -> dict[str, str]:
        return {name: json.dumps(value) for name, value in attributes.items()}

    stored = texts(with_checksum({"a": 1, "b": [0.1]}, {}))
    replaced = {name: stored[name] for name in ("b", CHECKSUM)}
    stored |= texts(with_checksum({"b": "x", "c": None}, replaced))
    assert without_checksum(stored, "it") == {"a": 1, "b": "x", "c": None}
    # The same written twice, as after a commit whose answer got lost.
    replaced = {name: stored[name] for name in ("b", "c", CHECKSUM)}
    assert texts(with_checksum({"b": "x", "c": None}, replaced)) == replaced
    for name in stored:
        lost = {other: text for other, text in stored.items() if other != name}
        with pytest.raises(ValueError, match="what it holds of it does not match its checksum"):
            without_checksum(lost, "it")


def check_checkpoint(tmp_path: Path, every: int) -> None:
    files = LocalFiles(str(tmp_path))
    checkpoint_io = AtomicCheckpointIO(files)
    epochs = []
    for number in (1, 2):
        path = f"last-{number}"
        checkpoint_io.save_checkpoint({"state_dict": {"w": torch.ones(number)}}, path)
        file = CheckpointFile(path=path, digest=checkpoint_io.last_digest, epoch=number)
        epochs.append(
            Epoch(
                epoch=number, metrics={}, confusion=[], last=file, best=None, stopped="",
                features="", ran_on="",
            )
        )  # fmt: skip
    newest = tmp_path / "last-2"
    data = newest.read_bytes()
    assert newest_whole(files, tuple(epochs)) == epochs[1]
    for changed in (*flips(data, every), *cuts(data, every)):
        newest.write_bytes(changed)
        assert newest_whole(files, tuple(epochs)) == epochs[0]


def test_a_checkpoint_cut_or_flipped_here_and_there_is_passed_over(tmp_path: Path) -> None:
    check_checkpoint(tmp_path, every=7)


@pytest.mark.slow
def test_a_checkpoint_cut_or_flipped_at_any_byte_is_passed_over(tmp_path: Path) -> None:
    check_checkpoint(tmp_path, every=1)
