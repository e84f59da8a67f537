"""Is this machine, or a cluster, fit to run a sweep? What was found, each with its remedy."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

from lightning_modules.data.pack import default_cache_dir
from lightning_modules.errors import InputError
from search.config import check_address
from search.study.sweep_files import check_object_storage, is_object_storage

# What a sweep writes at least: the pack, checkpoints of a few trials, TensorBoard's files.
FREE_GIB = 5.0
# Ray's object store lies there; with less it warns, and goes to the disk.
SHARED_MEMORY_GIB = 0.25
# A worker is a process with torch in it.
WORKER_GIB = 1.5
RAY_ANSWER_WITHIN_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one look has found.

    Attributes:
        name: What was looked at.
        text: What is there.
        trouble: What is wrong with it and what to do; empty if nothing is.
        is_fatal: Whether no sweep can run as it is.
    """

    name: str
    text: str
    trouble: str = ""
    is_fatal: bool = False


def examine(storage: str, address: str | None) -> Iterator[Finding]:
    """Look at this machine, one finding after another, and at Ray.

    Args:
        storage: Where sweeps are to go.
        address: HOST:PORT of a cluster that has been checked; none starts Ray on this machine.
    """
    looks: tuple[Callable[[], Finding], ...] = (
        _versions,
        _cpus,
        _gpus,
        _precision,
        lambda: _storage(storage),
        lambda: _folder("cache", default_cache_dir(), "set NEUROSWEEP_CACHE to another"),
        _weights,
        _tensorboard,
        lambda: _ray(storage, address),
    )
    for look in looks:
        yield look()


def print_findings(console: Console, findings: Iterator[Finding]) -> bool:
    """Print a line a finding as it comes; return whether a sweep can run."""
    is_fit = True
    for finding in findings:
        word, style = ("ok", "green")
        if finding.trouble:
            word, style = ("bad", "red") if finding.is_fatal else ("note", "yellow")
        is_fit &= not finding.is_fatal
        line = Text.assemble((f"{word:<5}", style), f"{finding.name:<12}{finding.text}")
        console.print(line, soft_wrap=True)
        if finding.trouble:
            console.print(f"{'':17}{finding.trouble}", soft_wrap=True)
    return is_fit


def _versions() -> Finding:
    shown = [f"python {platform.python_version()}"]
    wrong = []
    for text in importlib.metadata.requires("neurosweep") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement.name} {found} is not {requirement.specifier}")
        if requirement.name in ("ray", "torch", "pytorch-lightning", "optuna", "kornia"):
            shown.append(f"{requirement.name} {found}")
    trouble = f"{', '.join(wrong)}: install with `uv sync` or `pip install .`" if wrong else ""
    return Finding(name="versions", text=", ".join(shown), trouble=trouble, is_fatal=bool(wrong))


def _cpus() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    trials = min(cores or 1, int(memory_gib // WORKER_GIB))
    trouble = ""
    if trials < (cores or 1):
        trouble = (
            f"memory is for {max(1, trials)} trial(s) at a time: set "
            f"search.max_concurrent_trials to {max(1, trials)}"
        )
    shared = Path("/dev/shm")  # noqa: S108  Linux's shared memory, of which the size is asked
    text = f"{cores} cores, {memory_gib:.0f} GiB of memory"
    if shared.is_dir():
        free_gib = shutil.disk_usage(shared).free / 2**30
        text += f", {free_gib:.1f} GiB of it to share"
        if free_gib < SHARED_MEMORY_GIB:
            trouble = (
                f"{shared} is small: start the container with --shm-size=1g, or Ray's object store "
                "lies on the disk"
            )
    return Finding(name="cpus", text=text, trouble=trouble)


def _gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
        shown = [f"{device.name}, {device.total_memory / 2**30:.0f} GiB" for device in names]
        return Finding(name="gpus", text="; ".join(shown))
    if Path("/dev/nvidiactl").exists():
        return Finding(
            name="gpus",
            text="none that torch can use",
            trouble="the driver is there: it may be too old for this torch (`nvidia-smi` says "
            f"which CUDA it knows, torch was built for {torch.version.cuda}); trials run on CPUs",
        )
    return Finding(name="gpus", text="none: trials run on CPUs")


def _precision() -> Finding:
    import torch

    from lightning_modules.step_cost import computes_in_bf16

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = "float32 alone"
    if computes_in_bf16(device):
        text = "bf16 is computed; a launch measures where it pays"
    return Finding(name="precision", text=text)


def _folder(name: str, folder: Path, remedy: str) -> Finding:
    above = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=above) as probe:
            probe.write(b"\0" * 4096)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        trouble = f"it cannot be written ({error.strerror}): {remedy}"
        return Finding(name=name, text=str(folder), trouble=trouble, is_fatal=True)
    free_gib = shutil.disk_usage(above).free / 2**30
    trouble = f"less than {FREE_GIB:.0f} GiB: make room, or {remedy}" if free_gib < FREE_GIB else ""
    return Finding(name=name, text=f"{folder}, {free_gib:.0f} GiB free", trouble=trouble)


def _storage(storage: str) -> Finding:
    if not is_object_storage(storage):
        return _folder("storage", Path(storage).absolute(), "give another with --storage")
    try:
        check_address(storage)
        check_object_storage(storage)
    except InputError as error:
        return Finding(name="storage", text="an object storage", trouble=str(error), is_fatal=True)
    return Finding(name="storage", text=f"{storage}, writes, reads, and deletes")


def _weights() -> Finding:
    from lightning_modules.stages import BACKBONES
    from lightning_modules.weight_files import imagenet_file

    here = [name for name in BACKBONES if imagenet_file(name)[1].is_file()]
    text = f"ImageNet's at hand for {', '.join(here)}" if here else "ImageNet's are not at hand"
    missing = [name for name in BACKBONES if name not in here]
    trouble = ""
    if missing:
        folder = imagenet_file(missing[0])[1].parent
        trouble = (
            f"a launch downloads those it needs; without a network, put them into {folder}, or "
            "give `--weights FOLDER`"
        )
    return Finding(name="weights", text=text, trouble=trouble)


def _ray(storage: str, address: str | None) -> Finding:
    import ray

    from search.tuning.nodes import check_storage
    from search.tuning.tuner import connected

    table: list[str] = []
    try:
        with connected(address):
            if address is None:
                # A whole worker, on the loopback device, with a token: what a sweep needs.
                ray.get(ray.remote(lambda: None).remote(), timeout=RAY_ANSWER_WITHIN_S)
                return Finding(name="ray", text="starts here, on loopback, with a token of its own")
            if not is_object_storage(storage):
                storage = str(Path(storage).absolute())
                Path(storage).mkdir(parents=True, exist_ok=True)
            check_storage(storage, tell=table.append)
    except InputError as error:
        return Finding(name="ray", text=_below(table), trouble=str(error), is_fatal=True)
    except Exception as error:
        # Whatever it is that Ray cannot do here is what there is to say.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        return Finding(
            name="ray",
            text="does not start",
            trouble=f"{reason}: look for a firewall on the loopback device, and at `ulimit -n`",
            is_fatal=True,
        )
    return Finding(name="ray", text=_below(table))


def _below(table: list[str]) -> str:
    """Return the lines of a table, those after the first below it."""
    return f"\n{'':17}".join(table)


def _tensorboard() -> Finding:
    if importlib.util.find_spec("tensorboard") is None:
        trouble = "curves cannot be looked at: install tensorboard"
        return Finding(name="tensorboard", text="missing", trouble=trouble, is_fatal=True)
    text = f"{importlib.metadata.version('tensorboard')}"
    beside = Path(sys.executable).with_name("tensorboard")
    if shutil.which("tensorboard") is None and not beside.exists():
        return Finding(
            name="tensorboard",
            text=text,
            trouble="its command is not on PATH: `python -m tensorboard.main --logdir ...`",
        )
    return Finding(name="tensorboard", text=text)
