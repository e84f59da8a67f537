"""A sweep's files in an object storage: the same as in a folder, and nothing secret in them."""

import dataclasses
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from servers import PASSWORD, SECRET, ObjectStorage, PostgreSQL, object_storage, postgresql
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.bundle import load_bundle
from lightning_modules.errors import InputError
from lightning_modules.weights import WeightOrigin, find_weights
from search.config import load_sweep
from search.evaluation.data import read_manifest_or_sweep
from search.results import open_sweep
from search.study import sweep_files
from search.study.record import Record
from search.study.recorded import CheckpointFile, Trial
from search.study.sweep_files import (
    LocalFiles,
    ObjectFiles,
    StorageError,
    StorageRefusedError,
    SweepFiles,
    check_object_storage,
    files_at,
)
from search.tuning.checkpoint import AtomicCheckpointIO, read_checkpoint
from search.tuning.checkpoint_files import is_whole
from search.tuning.event_folder import EventFolder
from search.tuning.patience import patiently
from search.tuning.shared_weights import local_weights, share_weights
from search.tuning.survey import Finding, Question, check_joined_node, look, source_digest
from search.tuning.trial_board import TrialBoard

ORIGIN: dict[str, Any] = {
    "origin": "somewhere",
    "digest": "0" * 64,
    "seed": 0,
}
MINIMAL = "name: s\ndata: {phantom: {}}\n"


# What needs no server.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"storage": "s3://bucket/sweeps"},
            "study_url must be a PostgreSQL server's where storage is an object storage, which no "
            "database file can lie in; got none: set study_url, such as "
            "postgresql://USER@HOST/DATABASE",
        ),
        (
            {"storage": "gs://bucket", "study_url": "sqlite:////tmp/study.db"},
            "study_url must be a PostgreSQL server's where storage is an object storage, which no "
            "database file can lie in; got sqlite: set study_url, such as "
            "postgresql://USER@HOST/DATABASE",
        ),
        *(
            (
                {"study_url": url},
                "study_url must hold no password; it does: take it out, and set PGPASSWORD or "
                "write ~/.pgpass",
            )
            for url in (
                "postgresql://ada:hunter2@host/db",
                "postgresql+psycopg://host/db?user=ada&password=hunter2",
                "mysql://ada:hunter2@host/db",
            )
        ),
        *(
            (
                {"storage": address, "study_url": "postgresql://host/db"},
                "storage must be a folder, s3://BUCKET/PREFIX, or gs://BUCKET/PREFIX, in letters, "
                "digits, dots, dashes, and underscores; it is an address of another kind, or holds "
                "more: credentials and the endpoint belong into the environment",
            )
            for address in (
                "s3://hunter2:hunter2@bucket/sweeps",
                "s3://bucket/sweeps?secret_key=hunter2",
                "s3://bucket/../other",
                "s3://",
                "az://bucket/sweeps",
                "file:///tmp/sweeps",
            )
        ),
    ],
)
def test_what_cannot_be_is_one_line_without_the_secret(
    tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(MINIMAL)
    with pytest.raises(InputError) as error:
        load_sweep(path, settings)
    assert str(error.value) == f"{path}: {message}"
    assert "hunter2" not in message


@pytest.mark.parametrize("storage", ["s3://bucket/a/b", "s3://bucket/a/b/", "gs://bucket"])
def test_an_address_stays_one(tmp_path: Path, storage: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(MINIMAL)
    sweep = load_sweep(path, {"storage": storage, "study_url": "postgresql://ada@host/db"})
    assert sweep.location == f"{storage.rstrip('/')}/s"
    assert sweep.reference == f"s --storage {storage.rstrip('/')}"
    assert isinstance(sweep.files, ObjectFiles)
    with pytest.raises(RuntimeError, match="is no folder"):
        _ = sweep.folder


def test_a_launched_sweep_is_not_looked_for_with_a_secret() -> None:
    with pytest.raises(InputError, match="belong into the environment") as error:
        open_sweep("s", "s3://key:hunter2@bucket")
    assert "hunter2" not in str(error.value)


def test_weights_of_two_backbones_are_two_files(tmp_path: Path) -> None:
    weights = {}
    for backbone, content in (("mobilenet_v2", b"small"), ("resnet50", b"large")):
        path = tmp_path / backbone / "best.pth"
        path.parent.mkdir()
        path.write_bytes(content)
        weights[backbone] = WeightOrigin(path=str(path), **ORIGIN)
    (tmp_path / "sweep.yaml").write_text(MINIMAL)
    sweep = load_sweep(tmp_path / "sweep.yaml", {"storage": str(tmp_path)})
    sweep.folder.mkdir()
    shared = share_weights(weights, sweep)
    for backbone, content in (("mobilenet_v2", b"small"), ("resnet50", b"large")):
        assert Path(str(shared[backbone].path)).read_bytes() == content
        assert local_weights(shared[backbone]) == shared[backbone]


@pytest.mark.parametrize(
    ("path", "digest"),
    [
        ("file:///etc/passwd", "0" * 64),
        ("s3://key:secret@bucket/weights/w.pth", "0" * 64),
        ("s3://bucket/weights/w.pth", "../../elsewhere"),
    ],
)
def test_a_record_of_a_stranger_leads_no_weights_astray(path: str, digest: str) -> None:
    with pytest.raises(InputError, match="initial weights lie in a folder"):
        local_weights(WeightOrigin(path=path, **{**ORIGIN, "digest": digest}))


# Against a server.


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStorage]:
    with object_storage() as started:
        yield started


@pytest.fixture
def bucket(server: ObjectStorage, monkeypatch: pytest.MonkeyPatch) -> ObjectStorage:
    """The server, and this process's environment set to reach it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    sweep_files._connect.cache_clear()
    return server


@pytest.fixture(params=["folder", "object storage"])
def files(request: pytest.FixtureRequest, tmp_path: Path) -> SweepFiles:
    if request.param == "folder":
        files = files_at(str(tmp_path / "sweeps" / "s"))
        (tmp_path / "sweeps" / "s" / "trials").mkdir(parents=True)
        return files
    request.getfixturevalue("bucket")
    return files_at(f"s3://bucket/{tmp_path.name}/s")


@pytest.mark.cluster
def test_files_are_the_same_in_a_folder_and_in_an_object_storage(files: SweepFiles) -> None:
    assert files.names("trials") == []
    assert not files.has("sweep.yaml")
    with pytest.raises(FileNotFoundError):
        files.open("sweep.yaml")
    large = os.urandom(40 * 2**20)  # several parts
    files.write("trials/00000/last.ckpt", memoryview(large))
    files.write("trials/00001/best.ckpt", b"first")
    files.write("trials/00001/best.ckpt", b"second")
    files.write("trials10/x", b"")
    with files.open("trials/00000/last.ckpt") as file:
        assert file.read() == large
    with files.open("trials/00001/best.ckpt") as file:
        assert file.read() == b"second"
    assert files.has("trials10/x")
    assert files.names("trials") == ["trials/00000/last.ckpt", "trials/00001/best.ckpt"]
    files.remove(["trials/00000/last.ckpt", "trials/00000/never.ckpt"])
    files.remove([])
    assert files.names("") == ["trials/00001/best.ckpt", "trials10/x"]
    if isinstance(files, LocalFiles):
        left = sorted(path.name for path in (files.folder / "trials").iterdir())
        assert left == ["00001"], "no empty folder, no temporary file"


@pytest.mark.cluster
def test_a_checkpoint_is_known_by_its_digest(files: SweepFiles) -> None:
    checkpoint_io = AtomicCheckpointIO(files)
    saved = {"epoch": 3, "weight": torch.arange(5.0)}
    checkpoint_io.save_checkpoint(saved, "trials/00000/best.ckpt")
    recorded = CheckpointFile(
        path="trials/00000/best.ckpt", digest=checkpoint_io.last_digest, epoch=3
    )
    assert is_whole(files, recorded)
    loaded = read_checkpoint(files, recorded)
    assert loaded is not None
    assert loaded["epoch"] == 3
    assert torch.equal(loaded["weight"], saved["weight"])
    with files.open(recorded.path) as file:
        content = bytearray(file.read())
    content[len(content) // 2] ^= 1
    files.write(recorded.path, bytes(content))
    assert not is_whole(files, recorded)
    with pytest.raises(InputError, match="is torn or changed"):
        read_checkpoint(files, recorded)
    files.remove([recorded.path])
    assert not is_whole(files, recorded)
    assert read_checkpoint(files, recorded) is None


@pytest.mark.cluster
def test_a_storage_that_is_away_for_a_moment_is_waited_for(
    bucket: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, told = ObjectFiles("s3://bucket/away"), list[str]()
    monkeypatch.setattr(sweep_files, "RETRY_S", 1)
    files.write("before", b"1")
    bucket.stop(signal.SIGKILL)
    restart = threading.Timer(4, bucket.start)
    restart.start()
    patiently(lambda: files.write("after", b"2"), (OSError,), tell=told.append)
    restart.join()
    assert [line.partition(" after")[0] for line in told] == [
        "storage does not answer (s3://bucket/away: HTTP error: error sending request); waiting up "
        "to 120 s",
        "storage is back",
    ]
    assert files.names("") == ["after", "before"]


@pytest.mark.cluster
def test_a_storage_that_refuses_is_not_waited_for(
    bucket: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, told = ObjectFiles("s3://bucket/refused"), list[str]()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    with pytest.raises(StorageRefusedError, match="SignatureDoesNotMatch"):
        patiently(lambda: files.write("x", b""), (OSError,), tell=told.append)
    assert told == []


@pytest.mark.cluster
def test_a_storage_that_does_not_answer_is_never_an_empty_one(
    bucket: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_files, "RETRY_S", 1)
    away = ObjectFiles("s3://bucket/away")
    away.write("sweep.yaml", b"")
    recorded = CheckpointFile(path="sweep.yaml", digest="0" * 64, epoch=1)
    bucket.stop()
    try:
        for ask in (
            lambda: away.open("sweep.yaml"),
            lambda: away.has("sweep.yaml"),
            lambda: away.names("trials"),
            lambda: away.remove(["sweep.yaml"]),
            lambda: away.write("sweep.yaml", b""),
            lambda: is_whole(away, recorded),
            lambda: read_checkpoint(away, recorded),
        ):
            with pytest.raises(StorageError) as error:
                ask()
            assert str(error.value) == "s3://bucket/away: HTTP error: error sending request"
    finally:
        bucket.start()
    nowhere = ObjectFiles("s3://no-bucket/x")
    for ask in (
        lambda: nowhere.open("sweep.yaml"),
        lambda: nowhere.has("sweep.yaml"),
        lambda: nowhere.names("trials"),
        lambda: nowhere.write("sweep.yaml", b""),
        lambda: is_whole(nowhere, recorded),
    ):
        with pytest.raises(StorageError, match="NoSuchBucket: The specified bucket does not exist"):
            ask()


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("location", "environment", "message"),
    [
        (
            "s3://no-bucket/x",
            {},
            "NoSuchBucket: The specified bucket does not exist: create the bucket, or give another "
            "with `--storage`",
        ),
        (
            "s3://bucket/x",
            {"AWS_SECRET_ACCESS_KEY": "hunter2"},
            "SignatureDoesNotMatch: The request signature we calculated does not match the "
            "signature you provided. Check your key and signing method: check the credentials in "
            "the environment, AWS_ACCESS_KEY_ID and the like",
        ),
        (
            "s3://bucket/x",
            {"AWS_ENDPOINT_URL": "http://127.0.0.1:9"},
            "HTTP error: error sending request: check AWS_ENDPOINT_URL and the network",
        ),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line(
    bucket: ObjectStorage,
    monkeypatch: pytest.MonkeyPatch,
    location: str,
    environment: dict[str, str],
    message: str,
) -> None:
    check_object_storage("s3://bucket/fine")
    assert ObjectFiles("s3://bucket/fine").names("") == [], "the probe is gone"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    sweep_files._connect.cache_clear()
    monkeypatch.setattr(sweep_files, "RETRY_S", 1)
    with pytest.raises(InputError) as error:
        check_object_storage(location)
    rule = "storage must be one that can be written, read, and deleted from"
    assert str(error.value) == f"{rule}; {location}: {message}"


@pytest.mark.cluster
def test_event_files_grow_in_the_storage_and_leave_nothing_here(bucket: ObjectStorage) -> None:
    files = files_at("s3://bucket/curves")
    events = EventFolder(files, "tensorboard/run")
    (events.path / "events").write_bytes(b"one")
    events.publish()
    assert files.open("tensorboard/run/events").read() == b"one"
    (events.path / "events").write_bytes(b"one two")
    events.close()
    assert files.open("tensorboard/run/events").read() == b"one two"
    assert not events.path.exists()


@pytest.mark.cluster
def test_a_resumed_sweep_goes_on_with_its_curves(bucket: ObjectStorage) -> None:
    files = files_at("s3://bucket/resumed")
    first = EventFolder(files, "tensorboard/sweep")
    (first.path / "events.1").write_bytes(b"one")
    first.close()
    again = EventFolder(files, "tensorboard/sweep")
    again.fetch()
    assert (again.path / "events.1").read_bytes() == b"one"
    files.write("tensorboard/sweep/events.1", b"changed by nobody")
    (again.path / "events.2").write_bytes(b"two")
    again.close()
    assert files.open("tensorboard/sweep/events.1").read() == b"changed by nobody"
    assert files.open("tensorboard/sweep/events.2").read() == b"two"


@pytest.mark.cluster
def test_a_trial_that_ends_while_the_storage_is_away_keeps_its_curves(
    bucket: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_files, "RETRY_S", 1)
    files = files_at("s3://bucket/ended")
    board = TrialBoard(
        events=EventFolder(files, "tensorboard/00003"), name="00003", params={}, classes=("a", "b"),
        metric="val_loss", may_end_at=(), resume=None,
    )  # fmt: skip
    board.writer.add_scalar("val_loss", 0.5, 3)
    bucket.stop(signal.SIGKILL)
    restart = threading.Timer(5, bucket.start)
    restart.start()
    board.close(has_failed=False)
    restart.join()
    [name] = files.names("tensorboard")
    with files.local(name) as path:
        accumulator = EventAccumulator(str(path))
        accumulator.Reload()
        assert [event.step for event in accumulator.Scalars("val_loss")] == [3]


@pytest.mark.cluster
def test_curves_are_stored_before_an_epoch_that_may_be_the_last_is_reported(
    bucket: ObjectStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_at("s3://bucket/rungs")
    board = TrialBoard(
        events=EventFolder(files, "tensorboard/00000"), name="00000", params={}, classes=("a", "b"),
        metric="val_loss", may_end_at=(2,), resume=None,
    )  # fmt: skip

    def write_epoch(trainer: Any, module: Any, step: int) -> None:
        board.writer.add_scalar("val_loss", 1 / step, step)
        board.writer.flush()

    def stored_steps() -> list[int]:
        with files.local(files.names("tensorboard")[0]) as path:
            accumulator = EventAccumulator(str(path))
            accumulator.Reload()
            if "val_loss" not in accumulator.Tags()["scalars"]:
                return []
            return [event.step for event in accumulator.Scalars("val_loss")]

    monkeypatch.setattr(board, "_write_epoch", write_epoch)
    monkeypatch.setattr(board.events, "_next_s", math.inf)  # something was published just now
    for epoch, expected in ((0, []), (1, [1, 2]), (2, [1, 2])):
        trainer: Any = SimpleNamespace(current_epoch=epoch)
        board.on_train_epoch_end(trainer, pl_module=None)  # type: ignore[arg-type]
        assert stored_steps() == expected
    board.close(has_failed=False)
    assert stored_steps() == [1, 2, 3]


@pytest.mark.cluster
def test_a_node_is_asked_with_its_own_credentials(
    bucket: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    files = files_at("s3://bucket/asked")
    question = Question(
        location=files.location,
        probe=".probe",
        content="nonce",
        images_root=None,
        images=(),
        pack=tmp_path / "none",
        pack_bytes=0,
    )
    files.write(".probe/driver", b"nonce")
    assert look(question, "node")["storage"] == Finding(text="writes")
    assert files.names(".probe") == [".probe/driver", ".probe/node"]
    with pytest.raises(InputError, match="must see the sweep's files"):
        check_joined_node(files.location, source_digest())
    files.write("sweep.yaml", b"")
    check_joined_node(files.location, source_digest())
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    sweep_files._connect.cache_clear()
    found = look(question, "node")["storage"]
    assert found.text == "not reached"
    assert "SignatureDoesNotMatch" in found.trouble
    assert found.trouble.endswith("AWS_ACCESS_KEY_ID and the like there")


@pytest.mark.cluster
@pytest.mark.slow
def test_shared_weights_are_the_same_on_a_node_that_has_never_seen_them(
    bucket: ObjectStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "mobilenet_v2.pth"
    torch.save(torchvision_state(), path)
    origin = find_weights(str(path), backbone="mobilenet_v2", seed=0)
    (tmp_path / "sweep.yaml").write_text(MINIMAL)
    settings = {"storage": "s3://bucket/shared", "study_url": "postgresql://host/db"}
    sweep = load_sweep(tmp_path / "sweep.yaml", settings)
    shared = share_weights({"mobilenet_v2": origin}, sweep)["mobilenet_v2"]
    path.unlink()
    assert shared.path == "s3://bucket/shared/s/weights/mobilenet_v2.pth"
    here = local_weights(shared)
    assert here == dataclasses.replace(origin, path=here.path)
    assert here.path is not None
    again = find_weights(here.path, backbone="mobilenet_v2", seed=0)
    assert again.digest == origin.digest
    # Fetched once.
    sweep.files.remove(["weights/mobilenet_v2.pth"])
    assert local_weights(shared) == here
    random = find_weights("random", backbone="mobilenet_v2", seed=0)
    assert share_weights({"mobilenet_v2": random}, sweep) == {"mobilenet_v2": random}
    assert local_weights(random) == random


def torchvision_state() -> dict[str, torch.Tensor]:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(5)
    return mobilenet_v2().state_dict()


# A whole sweep.

SWEEP = """
name: stored
seed: 3
metric: val_loss
data:
  phantom: {num_patients: 30, slices_per_patient: 2, image_size_px: 32}
  image_size_px: 32
params: {backbone: mobilenet_v2, unfreeze_depth: 5, batch_size: 16}
space:
  unfreeze_depth: {low: 0, high: 5}
  lr: {low: 1.0e-4, high: 1.0e-2, log: true}
training: {max_epochs: 3, precision: 32-true}
search: {num_trials: 5, max_concurrent_trials: 1, keep_trials: 2}
scheduler: {grace_period_epochs: 1, reduction_factor: 2}
"""
COMMAND = [sys.executable, "-m", "search.cli"]
STORED = ["stored", "--storage", "s3://bucket/sweeps"]


class Run:
    """A command that is given time to get somewhere; everything it says is kept.

    Attributes:
        said: What all of them said.
    """

    said = ""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], stdout=file, stderr=subprocess.STDOUT
            )

    def wait_for_epochs(self, number: int) -> None:
        """Wait until so many were recorded, which is when they are printed."""
        deadline_s = time.monotonic() + 300
        while len(re.findall(r"epoch +\d+/", self.log.read_text())) < number:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline_s, "the sweep does not get on"
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        code = self.process.wait(timeout=600)
        text = self.log.read_text()
        Run.said += text
        return code, text


def outcome(trials: list[Trial]) -> list[object]:
    """What neither storage nor faults may change."""
    return [
        (
            *(trial.number, trial.params, trial.state, trial.reason),
            [
                (e.epoch, e.stopped, {n: v for n, v in e.metrics.items() if n != "epoch_s"})
                for e in trial.epochs
            ],
        )
        for trial in trials
    ]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_sweep_on_servers_that_fail_ends_as_one_in_a_folder_that_is_left_alone(
    bucket: ObjectStorage,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    # Ray's sockets lie there, too, and allow for no long names.
    with postgresql() as database, tempfile.TemporaryDirectory(prefix="ns-") as ray_folder:
        monkeypatch.setenv("PGPASSWORD", PASSWORD)
        monkeypatch.setenv("TMPDIR", ray_folder)
        monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache"))
        weights = tmp_path / "mobilenet_v2.pth"
        torch.save(torchvision_state(), weights)
        path = tmp_path / "sweep.yaml"
        path.write_text(SWEEP + f"weights: {{mobilenet_v2: {weights}}}\n")
        launch = ["launch", str(path), "--storage"]
        in_a_folder = Run([*launch, str(tmp_path / "sweeps")], tmp_path / "folder.log")
        request.addfinalizer(in_a_folder.process.kill)

        # The storage's key is withdrawn: one line, and no trial is blamed.
        run = Run(
            [*launch, "s3://bucket/sweeps", "--set", f"study_url={database.url}"],
            tmp_path / "withdrawn.log",
        )
        run.wait_for_epochs(2)
        bucket.stop()
        bucket.accept_key("another")
        bucket.start()
        code, text = run.end()
        assert code == 2, text
        [said] = [line for line in text.splitlines() if line.startswith("neurosweep:")]
        assert "written; s3://bucket/sweeps/stored: SignatureDoesNotMatch" in said
        assert "failed" not in text
        assert "neurosweep resume stored --storage s3://bucket/sweeps" in said
        assert "Traceback" not in text
        bucket.stop()
        bucket.accept_key(SECRET)
        bucket.start()
        record = Record.open(open_sweep("stored", "s3://bucket/sweeps"))
        assert [t.state for t in record.trials()][-1] == "running"
        assert not [t for t in record.trials() if t.state == "failed"]

        code, text = in_a_folder.end()
        assert code == 0, text
        left_alone = Record.open(open_sweep("stored", tmp_path / "sweeps")).trials()
        total = sum(len(trial.epochs) for trial in left_alone)

        # From here on, on another machine: no weights, no cache. Then that is killed.
        weights.unlink()
        monkeypatch.setenv("NEUROSWEEP_CACHE", str(tmp_path / "cache of another machine"))
        before = record.trials()
        run = Run(["resume", *STORED], tmp_path / "killed.log")
        run.wait_for_epochs((total - sum(len(t.epochs) for t in before)) // 2)
        run.process.send_signal(signal.SIGKILL)
        run.end()
        code, text = Run(["top", *STORED], tmp_path / "top.log").end()
        assert code == 0, text
        assert re.search(r"00000 +complete", text)

        # Both servers crash under the last of them, which does not mind.
        before = record.trials()
        run = Run(["resume", *STORED], tmp_path / "crashed.log")
        run.wait_for_epochs(1)
        bucket.stop(signal.SIGKILL)
        database.stop(signal.SIGQUIT)
        database.start()
        bucket.start()
        code, text = run.end()
        assert code == 0, text
        after = record.trials()
        assert outcome(after) == outcome(left_alone)
        for was, now in zip(before, after, strict=False):
            assert now.epochs[: len(was.epochs)] == was.epochs
            assert was.state == "running" or now == was

        check_files(record, tmp_path)
        bundle = tmp_path / "bundle"
        code, text = Run(["export", *STORED, str(bundle)], tmp_path / "export.log").end()
        assert code == 0, text
        assert load_bundle(bundle).classes
        manifest = read_manifest_or_sweep("s3://bucket/sweeps/stored")
        assert len(manifest.rows("test")) > 0
        check_secrets(database, bucket, Path(ray_folder))


def check_files(record: Record, tmp_path: Path) -> None:
    """The baseline's checkpoint and two, all curves, and what there was at the start."""
    files, trials = record.sweep.files, record.trials()
    there = files.names("")
    kept = [name for name in there if name.startswith("trials/")]
    assert len(kept) == 3
    assert all(
        is_whole(files, t.epochs[-1].best)
        for t in trials
        if t.epochs[-1].best is not None and t.epochs[-1].best.path in kept
    )
    others = [name for name in there if not name.startswith(("trials/", "tensorboard/"))]
    assert others == ["manifest.csv", "sweep.yaml", "weights/mobilenet_v2.pth"]
    stored = yaml.safe_load(files.open("sweep.yaml"))
    assert stored["storage"] == "s3://bucket/sweeps"
    for trial in trials:
        values = {}
        for name in files.names(f"tensorboard/{trial.name}"):
            local = tmp_path / name
            local.parent.mkdir(parents=True, exist_ok=True)
            local.write_bytes(files.open(name).read())
            accumulator = EventAccumulator(str(local))
            accumulator.Reload()
            if "val_loss" in accumulator.Tags()["scalars"]:
                values |= {e.step: e.value for e in accumulator.Scalars("val_loss")}
        last = trial.epochs[-1]
        # TensorBoard keeps 32 bits of it.
        assert values[last.epoch] == pytest.approx(last.metrics["val_loss"], rel=1e-6)


def check_secrets(database: PostgreSQL, bucket: ObjectStorage, ray_folder: Path) -> None:
    """Passwords are in no file, no row, and no line that was printed, nor in Ray's logs.

    Of the sweep whose driver was killed: others take theirs away.
    """
    import psycopg

    with psycopg.connect(database.url, password=PASSWORD) as connection:
        query = "SELECT query_to_xml('SELECT * FROM ' || tablename, true, false, '')::text "
        rows = connection.execute(query + "FROM pg_tables WHERE schemaname = 'public'").fetchall()
    written = [path.read_bytes() for path in bucket.bucket.rglob("*") if path.is_file()]
    assert "mobilenet_v2" in "".join(row[0] for row in rows)
    assert any(b"storage: s3://bucket" in content for content in written)
    logs = [path.read_bytes() for path in ray_folder.glob("*/session_2*/logs/**/*.*")]
    assert any(b"Creating runtime env" in log for log in logs), "what would hold them is there"
    for secret in (PASSWORD, SECRET):
        assert not [log for log in logs if secret.encode() in log]
        assert secret not in Run.said
        assert not [row for row in rows if secret in row[0]]
        assert not [content for content in written if secret.encode() in content]
