"""The batch script of ``cluster/`` on a real Slurm, made for the test: preempted, it goes on.

Slurm runs in a network and a process namespace of its own: ``ray symmetric-run`` stops all Ray that
it sees at its end, and must not see that of others.
"""

import os
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from search.results import open_sweep
from search.study.record import Record
from search.study.recorded import Trial

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cluster" / "slurm.sbatch"
DAEMONS = ("munged", "slurmctld", "slurmd")

# Many and short: some have ended when the job is preempted, and some have not, on any machine.
NUM_TRIALS = 20
SWEEP = f"""
name: preempted
metric: val_loss
data: {{phantom: {{num_patients: 25, slices_per_patient: 2, image_size_px: 32}}, image_size_px: 32}}
weights: random
params: {{backbone: mobilenet_v2, unfreeze_depth: 5, batch_size: 16}}
space: {{lr: {{low: 1.0e-4, high: 1.0e-2, log: true}}}}
training: {{max_epochs: 5, precision: 32-true}}
search: {{num_trials: {NUM_TRIALS}}}
scheduler: null
"""

# One node with two partitions that share it; jobs of `urgent` send jobs of `cpu` back to the queue.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort=6817
SlurmdPort=6818
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
GresTypes=gpu
MpiDefault=none
ReturnToService=2
KillWait=2
NodeName=localhost CPUs=2 RealMemory=1000 Gres=gpu:1
PartitionName=cpu Nodes=localhost PriorityTier=1 Default=YES
PartitionName=gpu Nodes=localhost PriorityTier=1
PartitionName=urgent Nodes=localhost PriorityTier=9
"""


class Slurm:
    """A controller and one node.

    Args:
        folder: For everything they write.
        namespace: The name of their network namespace.
    """

    def __init__(self, folder: Path, namespace: str) -> None:
        self.folder = folder
        self.namespace = namespace
        (folder / "spool").mkdir()
        (folder / "state").mkdir()
        (folder / "slurm.conf").write_text(SLURM_CONF.format(folder=folder))
        # A device file will do: no job of the test uses it.
        (folder / "gres.conf").write_text("NodeName=localhost Name=gpu File=/dev/null\n")
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        munged = (
            f"munged --foreground --force --num-threads=1 --socket={folder}/munge.socket "
            f"--key-file={key} --log-file={folder}/munged.log --pid-file={folder}/munged.pid "
            f"--seed-file={folder}/munge.seed"
        )
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "SLURM_CONF": f"{folder}/slurm.conf",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "USER": "root",
            "RAY_TMPDIR": str(folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "NEUROSWEEP_CACHE": str(folder / "cache"),
        }
        daemons = f"{munged} & sleep 1; slurmctld -D & slurmd -D -N localhost & wait"
        # With its first process goes all of a process namespace.
        isolated = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", namespace, *isolated, "sh", "-c", daemons],
            env=self.environment,
            stdout=(folder / "daemons.log").open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *command: str, **variables: str) -> str:
        """Type a command of Slurm's; return what it prints."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.namespace, *command],
            env=self.environment | variables,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr + self.logs()
        return done.stdout + done.stderr

    def state(self, job: str) -> str:
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return shown.split("JobState=")[1].split()[0]

    def logs(self) -> str:
        return "".join(
            f"\n--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.glob("*.log"))
        )

    def stop(self) -> None:
        # `ip` has become `unshare`, whose child goes with it.
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    missing = [name for name in (*DAEMONS, "ip") if shutil.which(name, path=SEARCH_PATH) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} (Debian: slurm-wlm, munge, iproute2)")
    namespace = f"slurm{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", namespace], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted here: {made.stderr.strip()}")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    folder.chmod(0o755)
    try:
        # Slurm looks up no name where loopback is all there is.
        for command in (
            "link set lo up",
            "link add eth0 type bridge",
            "address add 10.78.0.1/24 dev eth0",
            "link set eth0 up",
        ):
            subprocess.run(["ip", "-n", namespace, *command.split()], check=True)
        slurm = Slurm(folder, namespace)
        try:
            wait_until(lambda: "idle" in slurm.run("sinfo", "--noheader", "-o", "%T"), slurm, 60)
            yield slurm
        finally:
            slurm.stop()
    finally:
        subprocess.run(["ip", "netns", "delete", namespace], check=True)
        shutil.rmtree(folder, ignore_errors=True)


SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def wait_until(condition: Callable[[], bool], slurm: Slurm, seconds: float) -> None:
    deadline_s = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
            reason = ""
        except AssertionError as error:  # Slurm does not answer yet
            reason = str(error)
        assert time.monotonic() < deadline_s, reason + slurm.logs()
        time.sleep(0.5)


def num_epochs(storage: Path) -> int:
    """Epochs in the record, read beside the process that writes it."""
    database = storage / "preempted" / "study.db"
    if not database.is_file():
        return 0
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            query = "select count(*) from trial_user_attributes where key like 'epoch_%'"
            return int(connection.execute(query).fetchone()[0])
    except sqlite3.OperationalError:
        return 0


def read_trials(storage: Path) -> list[Trial]:
    return Record.open(open_sweep("preempted", storage)).trials()


def submit(slurm: Slurm, *options: str, **variables: str) -> str:
    return slurm.run("sbatch", "--parsable", *options, **variables).strip()


def test_a_preempted_job_goes_on_by_itself_where_it_was(slurm: Slurm, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    output, storage = tmp_path / "job.log", tmp_path / "sweeps"
    job = submit(
        slurm,
        "--partition=cpu",
        "--gpus-per-node=0",
        "--cpus-per-task=2",
        f"--output={output}",
        str(SCRIPT),
        SWEEP=str(tmp_path / "sweep.yaml"),
        NAME="preempted",
        STORAGE=str(storage),
    )

    def check_not_failed() -> str:
        state = slurm.state(job)
        if state in ("FAILED", "CANCELLED", "TIMEOUT"):
            pytest.fail(f"{state}\n{output.read_text()}{slurm.logs()}")
        return state

    def runs_for_a_while() -> bool:
        check_not_failed()
        return num_epochs(storage) >= 12  # two trials of 5 have ended

    wait_until(runs_for_a_while, slurm, 300)
    urgent = submit(slurm, "--partition=urgent", "--exclusive", "--wrap=true", "--output=/dev/null")
    wait_until(lambda: slurm.state(urgent) == "COMPLETED", slurm, 60)
    assert slurm.state(job) in ("PENDING", "RUNNING"), "the job was sent back to the queue"
    before = read_trials(storage)
    num_complete = sum(trial.state == "complete" for trial in before)
    assert 0 < num_complete < NUM_TRIALS, "it was preempted in mid sweep"

    wait_until(lambda: check_not_failed() == "COMPLETED", slurm, 600)
    after = read_trials(storage)
    assert [trial.state for trial in after] == ["complete"] * NUM_TRIALS
    for was, now in zip(before, after, strict=False):
        assert now.epochs[: len(was.epochs)] == was.epochs, "a recorded epoch is lost"
        if was.state != "running":
            assert now == was, "a finished trial ran again"
    printed = output.read_text()
    assert "started 0 times before: neurosweep launch" in printed
    assert "started 1 times before: neurosweep resume preempted" in printed


def test_the_script_fits_both_partitions(slurm: Slurm) -> None:
    # Slurm says so of a job that it could start.
    options = ["--test-only", "--cpus-per-task=2"]
    assert "to start at" in slurm.run("sbatch", *options, str(SCRIPT))
    more = ["--partition=cpu", "--gpus-per-node=0"]
    assert "to start at" in slurm.run("sbatch", *options, *more, str(SCRIPT))
