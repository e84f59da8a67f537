"""A sweep given to a cluster with ``ray job submit`` runs there as it would by hand."""

import importlib.util
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.results import open_sweep
from search.study.record import Record

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))

SWEEP = """
name: job
metric: val_loss
data: {phantom: {num_patients: 25, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 0}
space: {lr: {low: 1.0e-4, high: 1.0e-1, log: true}}
training: {max_epochs: 2, precision: 32-true}
search: {num_trials: 2}
scheduler: null
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def kill_all(session: Path) -> None:
    """Kill what a Ray session has started: its processes name its folder, or hold its sockets."""
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s:
        found = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                told = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                if str(session).encode() in told and int(folder.name) != os.getpid():
                    os.kill(int(folder.name), signal.SIGKILL)
                    found += 1
            except OSError:
                continue
        if not found:
            return
        time.sleep(0.2)
    pytest.fail("processes of the cluster live on")


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, str, dict[str, str]]]:
    """A head with a dashboard: HOST:PORT, the dashboard's URL, and the environment to use it."""
    if importlib.util.find_spec("aiohttp_cors") is None:
        pytest.skip("`ray job submit` needs the dashboard: uv run --extra cluster")
    session = Path(tempfile.mkdtemp(prefix="job"))
    (session / "home").mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment = {
        **kept,
        "HOME": str(session / "home"),
        "NEUROSWEEP_CACHE": str(session / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    port, dashboard_port = free_port(), free_port()
    started = subprocess.run(
        [
            RAY, "start", "--head", "--node-ip-address=127.0.0.1", f"--port={port}",
            "--num-cpus=1", "--include-dashboard=true", f"--dashboard-port={dashboard_port}",
            "--min-worker-port=0", "--max-worker-port=0", f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}", "--object-store-memory=100000000",
            f"--temp-dir={session / 'ray'}",
        ],
        env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", environment
    finally:
        kill_all(session)
        shutil.rmtree(session, ignore_errors=True)


def test_a_submitted_sweep_runs_to_its_end_and_prints_no_token(
    cluster: tuple[str, str, dict[str, str]], tmp_path: Path
) -> None:
    _, dashboard, environment = cluster
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    launch = [sys.executable, "-m", "search.cli", "launch", str(tmp_path / "sweep.yaml")]
    # Ray tells a job the cluster's address, which on most machines is not loopback.
    launch += ["--storage", str(tmp_path / "sweeps"), "--address", "auto"]
    job = subprocess.run(
        [RAY, "job", "submit", f"--address={dashboard}", "--", *launch],
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    assert "2 trials, 4 epochs run" in job.stdout
    trials = Record.open(open_sweep("job", tmp_path / "sweeps")).trials()
    assert [trial.state for trial in trials] == ["complete"] * 2
    token = environment["RAY_AUTH_TOKEN"]
    assert token not in job.stdout + job.stderr
    written = [path for path in (tmp_path / "sweeps").rglob("*") if path.is_file()]
    assert written
    assert [path for path in written if token.encode() in path.read_bytes()] == []
