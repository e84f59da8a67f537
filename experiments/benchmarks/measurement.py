"""What every benchmark here shares: where and when it ran, CPU seconds, and ratios of pairs."""

import contextlib
import ctypes
import datetime
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# As the user's shell has it: importing `search` later sets what Ray reads, which is not for others.
ENVIRONMENT = dict(os.environ)

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("NEUROSWEEP_SHARED", REPOSITORY.parent / "shared"))

_PR_SET_CHILD_SUBREAPER = 36
_POLL_S = 0.25
_LINGER_S = 30.0  # after a command's end, for the processes that it left


def provenance(*packages: str) -> dict[str, Any]:
    """Return date, hardware, versions, and commit, as they stand at the head of a result."""
    return {
        "date": now(),
        "hardware": hardware(),
        "versions": versions(*packages),
        "commit": commit(),
        # Names without their folders: results are shown to others.
        "command": [argument.rsplit("/", 1)[-1] for argument in sys.argv],
    }


def now() -> str:
    """Return the date and time in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def hardware() -> dict[str, Any]:
    """Return CPU model, cores, memory, GPU name if any, and how busy the machine is already."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory_gib, 1),
        "gpu": gpu_name(),
        "load_1min_before": os.getloadavg()[0],
    }


def cpu_name() -> str:
    """Return the CPU's model."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def gpu_name() -> str | None:
    """Return the first GPU's name, without importing torch."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return names[0].strip() if names else None


def versions(*packages: str) -> dict[str, str]:
    """Return Python's version and those of installed packages."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def commit() -> str:
    """Return the commit that is checked out, marked if tracked files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + (" with changes" if changed else "")


def ratio_interval(ratios: Sequence[float]) -> dict[str, Any]:
    """Return the median of paired ratios with its order-statistic interval.

    The interval assumes nothing of the distribution: the k-th smallest to the k-th largest value
    cover the median with probability 1 - 2 P(Binomial(n, 1/2) < k). The narrowest one at or above
    95 % is taken; below six pairs there is none, and the whole range stands with its own coverage
    (93.75 % for five).
    """
    ordered = sorted(ratios)
    n = len(ordered)

    def coverage(k: int) -> float:
        return float(1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n)

    k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= 0.95), default=1)
    middle = n // 2
    median = ordered[middle] if n % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {
        "median": median,
        "low": ordered[k - 1],
        "high": ordered[n - k],
        "coverage": coverage(k),
        "raw": list(ratios),
    }


def shown(interval: Mapping[str, Any]) -> str:
    """Return a ratio with its interval for people."""
    low, high, share = interval["low"], interval["high"], interval["coverage"]
    return f"{interval['median']:.2f}x [{low:.2f}, {high:.2f}] ({share:.1%} interval)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What a command took.

    Attributes:
        wall_s: From its start to its exit.
        cpu_s: User and system time of it and of every process below it.
        peak_rss_gib: Largest sum of their resident memory; a page that two share counts twice.
        returncode: Its exit code.
    """

    wall_s: float
    cpu_s: float
    peak_rss_gib: float
    returncode: int


def run_command(command: Sequence[str], *, env: Mapping[str, str], log: Path, cwd: Path) -> Cost:
    """Run a command and add up the CPU time of its whole process tree.

    Ray detaches its workers and does not wait for them, so the kernel's sum over waited-for
    children misses them. Here this process becomes the one that orphans are handed to, and every
    process below it is looked at four times a second; of one that ends, at most the last quarter of
    a second is missed. What is still there half a minute after the command's end is ended, by id.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    cpu_s: dict[tuple[int, int], float] = {}
    peak_bytes = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak_bytes
        while not done.wait(_POLL_S):
            below = _descendants()
            cpu_s.update({key: usage.cpu_s for key, usage in below.items()})
            peak_bytes = max(peak_bytes, sum(usage.rss_bytes for usage in below.values()))

    watcher = threading.Thread(target=watch, daemon=True)
    with log.open("wb") as file:
        start_s = time.perf_counter()
        process = subprocess.Popen(
            command, env=dict(env), cwd=cwd, stdout=file, stderr=subprocess.STDOUT
        )
        watcher.start()
        returncode = process.wait()
        wall_s = time.perf_counter() - start_s
    deadline_s = time.monotonic() + _LINGER_S
    while _reap() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    done.set()
    watcher.join()
    for pid, _ in _descendants():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    while _reap():
        time.sleep(_POLL_S)
    return Cost(
        wall_s=wall_s,
        cpu_s=sum(cpu_s.values()),
        peak_rss_gib=peak_bytes / 2**30,
        returncode=returncode,
    )


def tree_cpu_s() -> float:
    """Return the CPU seconds so far of this process and of those below it that still run."""
    return time.process_time() + sum(usage.cpu_s for usage in _descendants().values())


@dataclass(frozen=True, slots=True)
class _Usage:
    cpu_s: float
    rss_bytes: int


def _reap() -> bool:
    """Take in the orphans that have ended; tell whether any process is left below this one."""
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return False
        if pid == 0:
            return True


def _descendants() -> dict[tuple[int, int], _Usage]:
    """Return what every process below this one has used, by (id, start time)."""
    ticks, page_bytes = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")
    parents: dict[int, int] = {}
    found: dict[tuple[int, int], _Usage] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The command's name, in parentheses, may hold spaces.
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:  # ended meanwhile
            continue
        _, parent, *rest = fields
        pid = int(folder.name)
        parents[pid] = int(parent)
        # proc(5): utime 14, stime 15, starttime 22, rss 24, of which `rest` starts at 5.
        found[pid, int(rest[17])] = _Usage(
            cpu_s=(int(rest[9]) + int(rest[10])) / ticks, rss_bytes=int(rest[19]) * page_bytes
        )
    return {key: usage for key, usage in found.items() if _is_below(key[0], parents)}


def _is_below(pid: int, parents: Mapping[int, int]) -> bool:
    while pid > 1:
        pid = parents.get(pid, 0)
        if pid == os.getpid():
            return True
    return False
