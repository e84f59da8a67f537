"""Sweep files, manifests, and records to be fuzzed."""

import contextlib
import csv
import io
import json
import random
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fuzz_mutation import (
    VALUES,
    Target,
    by_bytes,
    change_document,
    either,
    to_json,
)
from rich.console import Console

from lightning_modules.data.manifest import read_manifest
from search.config import dump_sweep, load_sweep
from search.results import best_trial
from search.study.integrity import checksum
from search.study.origins import recorded_weights
from search.study.record import Record
from search.study.recorded import CheckpointFile, Epoch
from search.trial_table import print_trials
from search.tuning.checkpoint_files import newest_whole

SWEEPS = Path(__file__).resolve().parents[1]


# YAML


def _sweeps(folder: Path) -> list[bytes]:
    found = [path.read_bytes() for path in sorted(SWEEPS.glob("*.yaml"))]
    path = folder / "whole.yaml"
    path.write_bytes(found[0])
    return [*found, dump_sweep(load_sweep(path)).encode()]


def _change_yaml(data: bytes, other: bytes, rng: random.Random) -> bytes:
    changed = change_document(yaml.safe_load(data), rng)
    try:
        return yaml.safe_dump(changed).encode("utf-8", "replace")
    except RecursionError:
        return to_json(changed)


def _read_sweep(data: bytes, folder: Path) -> None:
    path = folder / "sweep.yaml"
    path.write_bytes(data)
    dump_sweep(load_sweep(path))


# Manifests

_CSV = (
    b"path,label,group_id,source,split\n1.png,a,Ann,s,train\n2.png,b,Ben,t,val\n3.png,a,Cy,s,test\n",
    b"path,label\n1.png,a\nx/2.png,b\n",
    b'\xef\xbb\xbfpath,label,age\r\n"1.png",a,"3,5"\r\n2.png,b,\r\n',
)


def _images(folder: Path) -> Sequence[bytes]:
    (folder / "x").mkdir()
    for name in ("1.png", "2.png", "3.png", "x/2.png"):
        (folder / name).touch()
    return _CSV


def _change_csv(data: bytes, other: bytes, rng: random.Random) -> bytes:
    rows = list(csv.reader(io.StringIO(data.decode("utf-8-sig"))))
    file = io.StringIO()
    changed = change_document(rows, rng)
    for row in changed if isinstance(changed, list) else [changed]:
        csv.writer(file).writerow(map(str, row) if isinstance(row, list) else [str(row)[:9000]])
    return file.getvalue().encode("utf-8", "surrogatepass")


def _read_manifest(data: bytes, folder: Path) -> None:
    path = folder / "manifest.csv"
    path.write_bytes(data)
    manifest = read_manifest(path)
    assert all((folder / p).resolve().is_relative_to(folder) for p in manifest.frame["path"])


# Records

_SWEEP = "name: s\ndata: {phantom: {}}\nweights: random\nspace: {lr: {low: 1.0e-4, high: 1.0e-2}}\n"


def _records(folder: Path) -> list[bytes]:
    """Write a study of three trials; what is changed are rows, or bytes of the file."""
    path = folder / "valid.yaml"
    path.write_text(_SWEEP)
    sweep = load_sweep(path, {"storage": str(folder), "search.sampler": "random"})
    sweep.folder.mkdir()
    origin = {"origin": "random", "path": None, "digest": "0" * 64, "seed": 0, "passed_over": []}
    facts = {
        "classes": ["a", "b"],
        "manifest_digest": "0",
        "pack_digest": "0",
        "skipped_images": [],
        "weights": {"mobilenet_v2": origin},
        "versions": {"torch": "2.15"},
        "leakage": {"pictures": 1, "images": 2},
        "measured": {
            "precisions": {"mobilenet_v2": "32-true"},
            "gpu_peak_bytes": {},
            "gpu_total_bytes": 0,
        },
        "confirmation": {
            "num_trials": 3,
            "winner": 1,
            "metric": "val_macro_f1",
            "num_seeds": 1,
            "candidates": [
                {
                    "number": 1,
                    "values": [0.5],
                    "mean": 0.5,
                    "low": None,
                    "high": None,
                    "probability_best": 0.5,
                    "rival": 0,
                    "over_rival_mean": 0.1,
                    "over_rival_low": None,
                    "over_rival_high": None,
                }
            ],
        },
    }
    record = Record.create(sweep, facts)
    for stopped in ("max_epochs", "asha", ""):
        number = record.draw().number
        for epoch in (1, 2):
            file = CheckpointFile(path=f"trials/{number}/1.ckpt", digest="0" * 64, epoch=epoch)
            ends = stopped if epoch == 2 else ""
            record.add_epoch(
                number,
                Epoch(
                    epoch=epoch,
                    metrics={"val_macro_f1": 0.5, "val_loss": None},
                    best=file,
                    confusion=[[1, 2], [3, 4]],
                    last=file,
                    stopped=ends,
                    features="",
                    ran_on="here",
                ),
            )
    shutil.copyfile(sweep.folder / "study.db", folder / "valid.db")
    return [(sweep.folder / "study.db").read_bytes()]


def sum_anew(database: sqlite3.Connection) -> None:
    """Make checksums those of what the rows hold now, as a stranger can."""
    for attributes, owner in (("trial_user", "trial_id"), ("study_user", "study_id")):
        table, texts = f"{attributes}_attributes", defaultdict[int, dict[str, str]](dict)
        query = f"SELECT {owner}, key, value_json FROM {table} WHERE key != 'checksum'"
        for number, name, text in database.execute(query):
            texts[number][name] = text
        update = f"UPDATE {table} SET value_json = ? WHERE key = 'checksum' AND {owner} = ?"
        database.executemany(update, [(checksum(texts[number]), number) for number in texts])


def _change_rows(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """Change one value of one row, which may be JSON, in JSON, or of another type."""
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.deserialize(data)
        tables = (
            "trial_user_attributes",
            "study_user_attributes",
            "trials",
            "trial_params",
            "trial_intermediate_values",
            "trial_system_attributes",
        )
        table = rng.choice((*tables[:2] * 3, *tables))
        columns = [row[1] for row in database.execute(f"PRAGMA table_info({table})")]
        column = "value_json" if "value_json" in columns else rng.choice(columns[1:])
        rows = database.execute(f"SELECT rowid, {column} FROM {table}").fetchall()
        row, value = rng.choice(rows)
        changed = _changed_cell(value, rng)
        with contextlib.suppress(sqlite3.Error, OverflowError, UnicodeEncodeError):
            where = (changed, row)
            database.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", where)
            if not rng.randrange(10):
                database.execute(f"DELETE FROM {table} WHERE rowid = ?", (rng.choice(rows)[0],))
            # What reads the rows is to be reached as well.
            if rng.randrange(4):
                sum_anew(database)
            database.commit()
        return database.serialize()


def _changed_cell(value: Any, rng: random.Random) -> Any:
    plain = [v for v in VALUES if not isinstance(v, list | dict)]
    if not isinstance(value, str) or not rng.randrange(8):
        return rng.choice(plain)
    with contextlib.suppress(ValueError):
        document = json.loads(value)
        if isinstance(document, str) and document.startswith("{"):
            return json.dumps(json.dumps(change_document(json.loads(document), rng)))
        return json.dumps(change_document(document, rng))
    return rng.choice(plain)


def _read_record(data: bytes, folder: Path) -> None:
    sweep = load_sweep(folder / "valid.yaml", {"storage": str(folder)})
    (sweep.folder / "study.db").write_bytes(data)
    for beside in ("study.db-journal", "study.db-wal", "study.db-shm"):
        (sweep.folder / beside).unlink(missing_ok=True)
    record = Record.open(sweep)
    try:
        shown = io.StringIO()
        print_trials(Console(file=shown, markup=False, width=200), record, num_rows=20)
        assert "\x1b" not in shown.getvalue()
        recorded_weights(record)
        best_trial(record)
        for trial in record.trials():
            newest_whole(sweep.files, trial.epochs)
            record.best_value(trial.number)
        record.is_finished()
    finally:
        record._storage.engine.dispose()


TARGETS = {
    "yaml": Target(
        inputs=6_000, prepare=_sweeps, change=either(by_bytes, _change_yaml), read=_read_sweep
    ),
    "manifest": Target(
        inputs=6_000, prepare=_images, change=either(by_bytes, _change_csv), read=_read_manifest
    ),
    "record": Target(
        inputs=1_500,
        prepare=_records,
        change=either(by_bytes, _change_rows, _change_rows),
        read=_read_record,
    ),
}
