"""A sweep on several nodes, each a network namespace with an address of its own, through faults.

The namespaces are joined by a bridge in one more namespace: nothing outside them is touched, and
all of it goes with them. They share this machine's files, as nodes share a storage.
"""

import contextlib
import itertools
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from search.results import open_sweep
from search.study.record import Record
from search.study.recorded import Trial
from search.sweep import DataSettings, SearchSettings, Sweep, TrainingSettings

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
HEAD = "10.77.0.1:6379"
RAY = str(Path(sys.executable).with_name("ray"))
LAUNCH = [sys.executable, "-m", "search.cli", "launch"]

# A node counts as dead after two seconds of silence, where Ray waits for half a minute.
FAST_DEATH = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "500",
    "RAY_health_check_failure_threshold": "3",
}

# Its trials take longer than a worker to start: Ray would give shorter ones to the one it has.
SWEEP = """
name: spread
metric: val_loss
data: {phantom: {num_patients: 25, slices_per_patient: 2, image_size_px: 32}, image_size_px: 32}
weights: random
params: {backbone: mobilenet_v2, unfreeze_depth: 5, batch_size: 8}
space: {lr: {low: 1.0e-4, high: 1.0e-1, log: true}}
training: {max_epochs: 20, precision: 32-true}
search: {num_trials: 3}
scheduler: null
"""


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


class Network:
    """A head and workers, each in a namespace; ``10.77.0.N`` is node N's address.

    Attributes:
        token: What the cluster asks for.
    """

    def __init__(self, scratch: Path) -> None:
        self.id = secrets.token_hex(3)
        self.switch = f"ns{self.id}-switch"
        self.nodes: dict[str, int] = {}
        self.scratch = scratch
        self.token = secrets.token_hex(32)
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", self.switch, "link", "set", "bridge", "up")
        for name in ("head", "a", "b"):
            self._add(name)

    def _add(self, name: str) -> None:
        number = self.nodes[name] = len(self.nodes) + 1
        namespace, port = self.namespace(name), f"port{number}"
        ip("netns", "add", namespace)
        ip(
            "-n",
            self.switch,
            "link",
            "add",
            port,
            "type",
            "veth",
            "peer",
            "eth0",
            "netns",
            namespace,
        )
        ip("-n", self.switch, "link", "set", port, "master", "bridge", "up")
        ip("-n", namespace, "address", "add", f"10.77.0.{number}/24", "dev", "eth0")
        ip("-n", namespace, "link", "set", "eth0", "up")
        ip("-n", namespace, "link", "set", "lo", "up")

    def namespace(self, name: str) -> str:
        return f"ns{self.id}-{name}"

    def cable(self, name: str, state: str) -> None:
        """Pull a node's cable out, or put it in again."""
        ip("-n", self.switch, "link", "set", f"port{self.nodes[name]}", state)

    def command(self, name: str, *command: str) -> list[str]:
        """The command line that runs a command on a node, which calls itself by its name."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', f"node-{name}"]
        return ["ip", "netns", "exec", self.namespace(name), *named, *command]

    def environment(self, **changes: str | None) -> dict[str, str]:
        """What processes on nodes are started with; nothing of ours leaks in."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        home = self.scratch / "home"
        home.mkdir(exist_ok=True)
        given: dict[str, str | None] = {
            "HOME": str(home),
            "PYTHONPATH": str(ROOT),
            "NEUROSWEEP_CACHE": str(self.scratch / "cache"),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_USAGE_STATS_ENABLED": "0",
            **FAST_DEATH,
            **changes,
        }
        return kept | {key: value for key, value in given.items() if value is not None}

    def start(self, name: str, *prefix: str, **changes: str | None) -> None:
        """Start Ray on a node."""
        # Sockets have short paths.
        folder = self.scratch / f"r{next(COUNT)}"
        command = [RAY, "start", f"--node-ip-address=10.77.0.{self.nodes[name]}"]
        if name == "head":
            command += ["--head", "--port=6379", "--num-cpus=0", "--include-dashboard=false"]
            command += ["--object-store-memory=100000000", f"--temp-dir={folder}"]
        else:
            command += [f"--address={HEAD}", "--num-cpus=1", "--object-store-memory=100000000"]
        run = subprocess.run(
            self.command(name, *prefix, *command),
            env=self.environment(**changes),
            cwd=self.scratch,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stdout + run.stderr

    def pids(self, name: str, words: str = "") -> list[int]:
        """Processes on a node whose command line has these words."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.namespace(name)], capture_output=True, text=True
        )
        return [pid for pid in map(int, listed.stdout.split()) if words in command_line(pid)]

    def stop(self, name: str) -> None:
        """Kill everything that runs on a node."""
        deadline_s = time.monotonic() + 30
        while pids := self.pids(name):
            assert time.monotonic() < deadline_s, f"{name} does not end"
            for pid in pids:
                kill(pid)
            time.sleep(0.1)

    def is_up(self, name: str) -> bool:
        return bool(self.pids(name, "raylet/raylet"))

    def remove(self) -> None:
        """Leave nothing: no process, no namespace; the bridge and cables go with theirs."""
        for name in self.nodes:
            self.stop(name)
            ip("netns", "delete", self.namespace(name))
        ip("netns", "delete", self.switch)


COUNT = itertools.count()


def kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    if shutil.which("ip") is None:
        pytest.skip("no `ip` (Debian: iproute2)")
    probe = f"ns{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    ip("netns", "delete", probe)
    scratch = Path(tempfile.mkdtemp(prefix="ns"))
    # Whoever ends the tests wants the network gone, too.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    network = Network(scratch)
    try:
        yield network
    finally:
        signal.signal(signal.SIGTERM, before)
        network.remove()
        shutil.rmtree(scratch, ignore_errors=True)
        left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
        assert network.id not in left


@pytest.fixture
def cluster(network: Network) -> Network:
    """The network with Ray on all three nodes, whatever the test before did to them."""
    if not network.pids("head", "gcs_server"):
        for name in network.nodes:
            network.stop(name)
        network.start("head")
    for name in ("a", "b"):
        network.cable(name, "up")
        if not network.is_up(name):
            network.stop(name)
            network.start(name)
    return network


@pytest.fixture
def storage(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


class SimulatedSweep:
    """Runs ``simulated_sweep.py`` on the head, again and again until its record is full.

    Args:
        network: Its nodes.
        storage: A new folder.
    """

    def __init__(self, network: Network, storage: Path) -> None:
        self.network = network
        self.folder = storage / "simulated"
        self.driver: subprocess.Popen[str] | None = None

    def start(self, bad_host: str = "") -> None:
        script = str(ROOT / "tests" / "simulated_sweep.py")
        command = [sys.executable, script, str(self.folder), HEAD, bad_host]
        self.driver = subprocess.Popen(
            self.network.command("head", *command),
            env=self.network.environment(),
            cwd=self.network.scratch,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self) -> str:
        """Wait for the driver's end; return what it has printed."""
        assert self.driver is not None
        printed, _ = self.driver.communicate(timeout=120)
        return printed

    def kill(self) -> None:
        for pid in self.network.pids("head", "simulated_sweep.py"):
            kill(pid)
        self.finish()

    def record(self) -> Record:
        return Record.open(
            Sweep(
                name=self.folder.name,
                storage=str(self.folder.parent),
                metric="val_loss",
                data=DataSettings(),
                training=TrainingSettings(max_epochs=5),
                search=SearchSettings(num_trials=6, sampler="random"),
                scheduler=None,
            )
        )

    def trials(self) -> list[Trial]:
        return self.record().trials()

    def executed(self) -> list[tuple[int, int, int, str, int]]:
        """Every epoch that a worker began: trial, attempt, epoch, node, process."""
        path = self.folder / "executed"
        lines = path.read_text().splitlines() if path.is_file() else []
        rows = [line.split() for line in lines]
        return [(int(r[0]), int(r[1]), int(r[2]), r[3], int(r[4])) for r in rows]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        deadline_s = time.monotonic() + 120
        while not condition():
            assert self.driver is not None
            if self.driver.poll() is not None:
                pytest.fail(f"the driver ended before {what}:\n{self.finish()}")
            assert time.monotonic() < deadline_s, f"waited too long for: {what}"
            time.sleep(0.05)

    def wait_for_epochs_on_both(self) -> None:
        """Until both workers have been at it, and a trial has ended."""

        def reached() -> bool:
            nodes = {node for _, _, _, node, _ in self.executed()}
            return nodes == {"node-a", "node-b"} and len(self.executed()) > 6

        self.wait_for(reached, "both workers at work")

    def check_full_table(self, before: list[Trial], num_before: int) -> None:
        """Go on until every trial has ended, then hold the table against the one before.

        Args:
            before: What was recorded once the fault had happened.
            num_before: How many epochs had been begun by then.
        """
        for _ in range(3):
            if self.record().is_finished():
                break
            self.start()
            printed = self.finish()
            assert self.driver is not None
            assert self.driver.returncode == 0, printed
        after = self.trials()
        assert [(trial.state, trial.reason) for trial in after] == [("complete", "max_epochs")] * 6
        assert [len(trial.epochs) for trial in after] == [5] * 6
        later = Counter((trial, epoch) for trial, _, epoch, *_ in self.executed()[num_before:])
        for was in before:
            now = after[was.number]
            assert now.epochs[: len(was.epochs)] == was.epochs, "a recorded epoch is lost"
            again = [epoch.epoch for epoch in was.epochs if later[was.number, epoch.epoch]]
            assert again == [], f"trial {was.number} ran recorded epochs again"
            if was.state != "running":
                assert now == was


@pytest.fixture
def sweep(cluster: Network, storage: Path) -> Iterator[SimulatedSweep]:
    sweep = SimulatedSweep(cluster, storage)
    try:
        yield sweep
    finally:
        if sweep.driver is not None and sweep.driver.poll() is None:
            sweep.kill()


def test_after_a_nodes_raylet_is_killed_the_table_is_full(
    sweep: SimulatedSweep, cluster: Network
) -> None:
    sweep.start()
    sweep.wait_for_epochs_on_both()
    [raylet] = cluster.pids("b", "raylet/raylet")
    kill(raylet)
    before, num_before = sweep.trials(), len(sweep.executed())
    sweep.finish()
    sweep.check_full_table(before, num_before)
    # What was left was done by the other node; a worker may outlive its raylet for a moment.
    executed = sweep.executed()
    assert len(executed) - num_before > 8
    assert {node for *_, node, _ in executed[-5:]} == {"node-a"}


def test_after_a_worker_process_is_killed_the_table_is_full(sweep: SimulatedSweep) -> None:
    sweep.start()
    sweep.wait_for_epochs_on_both()
    *_, worker = sweep.executed()[-1]
    kill(worker)
    before, num_before = sweep.trials(), len(sweep.executed())
    sweep.finish()
    sweep.check_full_table(before, num_before)


def test_after_a_node_was_cut_off_and_came_back_the_table_is_full(
    sweep: SimulatedSweep, cluster: Network
) -> None:
    sweep.start()
    sweep.wait_for_epochs_on_both()
    cluster.cable("b", "down")
    time.sleep(5)  # longer than it takes to be declared dead
    before, num_before = sweep.trials(), len(sweep.executed())
    cluster.cable("b", "up")
    sweep.finish()
    sweep.check_full_table(before, num_before)


def test_trials_that_fail_on_one_node_run_on_another_and_the_node_is_named(
    sweep: SimulatedSweep,
) -> None:
    sweep.start(bad_host="node-b")
    printed = sweep.finish()
    reason = "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert re.search(rf"10\.77\.0\.3: trial 0000\d goes elsewhere; {reason}", printed), printed
    sweep.check_full_table([], 0)
    assert {node for *_, node, _ in sweep.executed()} == {"node-a"}


def test_after_the_driver_is_killed_the_table_is_full(sweep: SimulatedSweep) -> None:
    sweep.start()
    sweep.wait_for_epochs_on_both()
    sweep.kill()
    before, num_before = sweep.trials(), len(sweep.executed())
    sweep.check_full_table(before, num_before)


def test_after_the_head_is_killed_a_new_cluster_fills_the_table(
    sweep: SimulatedSweep, cluster: Network
) -> None:
    sweep.start()
    sweep.wait_for_epochs_on_both()
    for name in cluster.nodes:
        cluster.stop(name)
    sweep.finish()
    before, num_before = sweep.trials(), len(sweep.executed())
    for name in cluster.nodes:
        cluster.start(name)
    sweep.check_full_table(before, num_before)


def launch(
    network: Network, storage: Path, *more: str, on: str = "head", **changes: str | None
) -> subprocess.CompletedProcess[str]:
    """Type ``neurosweep launch`` on a node."""
    file = storage / "sweep.yaml"
    file.write_text(SWEEP)
    command = [*LAUNCH, str(file), "--storage", str(storage / "sweeps"), "--address", HEAD, *more]
    return subprocess.run(
        network.command(on, *command),
        env=network.environment(**changes),
        cwd=network.scratch,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_sweep_spreads_over_a_cluster_that_grows_and_its_token_stays_a_secret(
    cluster: Network, storage: Path
) -> None:
    cluster.stop("a")
    cluster.stop("b")
    settings = ["--set", "search.max_concurrent_trials=2", "--wait-s", "240"]
    with ThreadPoolExecutor(1) as pool:
        launching = pool.submit(launch, cluster, storage, *settings)
        cluster.start("a")
        wait_for_table(storage)
        cluster.start("b")
        run = launching.result(timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    trials = Record.open(open_sweep("spread", storage / "sweeps")).trials()
    assert [trial.state for trial in trials] == ["complete"] * 3
    # The one that came after all had been asked has taken part.
    hosts = {epoch.ran_on.split()[0] for trial in trials for epoch in trial.epochs}
    assert hosts == {"node-a", "node-b"}
    table = [line.split() for line in run.stdout.split("node  ", 1)[1].splitlines()[1:3]]
    assert ["10.77.0.1", "node-head", "0", "CPU", "no", "trial", "fits"] in table
    address = f"10.77.0.{cluster.nodes['a']}"
    [row] = [line for line in table if line[:2] == [address, "node-a"]]
    assert row[2:7] == ["1", "CPU", "same", "writes", "simulated"]
    assert not list((storage / "sweeps" / "spread").glob(".node-check-*"))

    secret = cluster.token.encode()
    assert cluster.token not in run.stdout + run.stderr
    logs = list(cluster.scratch.rglob("logs/*.log"))
    assert logs
    files = [*logs, *(path for path in storage.rglob("*") if path.is_file())]
    assert [path for path in files if secret in path.read_bytes()] == []
    pids = [pid for name in cluster.nodes for pid in cluster.pids(name)]
    assert [pid for pid in pids if cluster.token in command_line(pid)] == []


def wait_for_table(storage: Path) -> None:
    """Until all nodes there are have been asked: then the sweep can be resumed."""
    deadline_s = time.monotonic() + 120
    while not (storage / "sweeps" / "spread" / "sweep.yaml").exists():
        assert time.monotonic() < deadline_s, "the node that came was not found"
        time.sleep(0.2)


def test_a_stranger_is_told_to_bring_the_token(cluster: Network, storage: Path) -> None:
    for given, told in ((None, "none was found"), ("f" * 64, "it refuses ours")):
        run = launch(cluster, storage, on="a", RAY_AUTH_TOKEN=given)
        assert run.returncode == 2
        [line] = run.stderr.splitlines()
        assert told in line
        assert "RAY_AUTH_TOKEN_PATH" in line
    assert not (storage / "sweeps" / "spread").exists()


def test_nodes_that_cannot_take_part_are_named_together(cluster: Network, storage: Path) -> None:
    """One has another version of the code; one sees another folder in the place of the storage."""
    cluster.stop("a")
    cluster.stop("b")
    other = cluster.scratch / "other"
    for package in ("search", "lightning_modules"):
        shutil.copytree(ROOT / package, other / package, dirs_exist_ok=True)
    with (other / "search" / "sweep.py").open("a") as file:
        file.write("# changed\n")
    cluster.start("a", PYTHONPATH=str(other))
    mount = 'mount -t tmpfs none "$0"; exec "$@"'
    cluster.start("b", "unshare", "--mount", "sh", "-c", mount, str(storage))
    try:
        run = launch(cluster, storage)
    finally:
        cluster.stop("a")
        cluster.stop("b")
    assert run.returncode == 2, run.stdout + run.stderr
    [line] = run.stderr.splitlines()
    assert f"10.77.0.{cluster.nodes['a']} node-a: its files in search" in line
    assert f"10.77.0.{cluster.nodes['b']} node-b: it does not see" in line
    assert "NO: not seen" in run.stdout
    assert not (storage / "sweeps" / "spread").exists()
