"""What a node of a cluster finds when it looks at itself: code, storage, images, cache, GPUs."""

import errno
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lightning_modules.compiled_stages import check_compiler
from lightning_modules.data.manifest import some_of
from lightning_modules.data.pack import default_cache_dir
from lightning_modules.errors import InputError
from search.study.sweep_files import StorageError, files_at, remedy_for

# Trials import these; the versions of the rest follow from them.
PACKAGES = ("neurosweep", "ray", "torch", "torchvision", "pytorch-lightning", "kornia", "numpy")

# torch takes its time to be imported where disks are cold.
GPU_ANSWER_WITHIN_S = 90.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was found of one thing.

    Attributes:
        text: For a cell of the table.
        trouble: What is wrong, and the remedy; empty if nothing.
    """

    text: str
    trouble: str = ""


# By "code", "storage", "images", "cache", and, where there are GPUs, "device".
Survey = dict[str, Finding]


@dataclass(frozen=True, kw_only=True)
class Question:
    """What every node is asked.

    Attributes:
        location: The sweep's.
        probe: The name of a folder there, in which the driver has written a file ``driver``; nodes
            write theirs beside it.
        content: What the file holds.
        images_root: Where images are; none if they are simulated.
        images: Some of them.
        pack: The images, decoded, if the node sees the driver's cache.
        pack_bytes: Its size.
        compiles: Whether trials need a compiler.
        num_gpus: What Ray says the node has.
    """

    location: str
    probe: str
    content: str
    images_root: Path | None
    images: tuple[str, ...]
    pack: Path
    pack_bytes: int
    compiles: bool = False
    num_gpus: int = 0


def look(question: Question, node_id: str) -> Survey:
    """Look at the node that this process runs on.

    Whether its code is the driver's has been looked at by who called.
    """
    found = {
        "storage": _look_at_storage(question, node_id),
        "images": _look_at_images(question),
        "cache": _look_at_cache(question),
    }
    if question.compiles:
        try:
            check_compiler()
        except InputError as error:
            found["code"] = Finding(text="no compiler", trouble=str(error))
    if question.num_gpus:
        found["device"] = _look_at_gpus(question.num_gpus)
    return found


@functools.cache
def check_joined_node(location: str, digest: str) -> None:
    """Refuse to train on a node that has joined since all were asked, and is not like them.

    Args:
        location: The sweep's.
        digest: The driver's ``source_digest()``.

    Raises:
        InputError: If the node has other code, or does not see the sweep.
    """
    if source_digest() != digest:
        raise InputError(
            f"every node must have the driver's code; {platform.node()} has other files in search "
            "or lightning_modules: install the same version there"
        )
    if not files_at(location).has("sweep.yaml"):
        raise InputError(
            f"every node must see the sweep's files; {platform.node()} has no {location}: mount "
            "the storage there"
        )


def source_digest() -> str:
    """Return a digest of the code that trials run, as this process would import it."""
    digest = hashlib.sha256()
    for package in ("lightning_modules", "search"):
        spec = importlib.util.find_spec(package)
        root = Path(next(iter((spec and spec.submodule_search_locations) or ())))
        for path in sorted(root.rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{package}/{path.relative_to(root).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of what trials import.

    Without what does not change results: Python's third number, and what torch was built for.
    """
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for package in PACKAGES:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "none"
    return found


def _look_at_storage(question: Question, node_id: str) -> Finding:
    files, content = files_at(question.location), question.content.encode()
    try:
        with files.open(f"{question.probe}/driver") as file:
            if file.read() != content:
                raise FileNotFoundError(errno.ENOENT, "another folder of that name")
    except StorageError as error:
        return Finding(text="not reached", trouble=f"{error}: {remedy_for(str(error))} there")
    except InputError as error:
        return Finding(text="not reached", trouble=str(error))
    except OSError as error:
        return Finding(
            text="not seen",
            trouble=f"it does not see {files.location} ({error.strerror}): mount the storage there",
        )
    try:
        files.write(f"{question.probe}/{node_id}", content)
    except OSError as error:
        return Finding(
            text="read only",
            trouble=f"it cannot write to {files.location} ({error.strerror or error}): permit that",
        )
    return Finding(text="writes")


def _look_at_images(question: Question) -> Finding:
    if question.images_root is None:
        return Finding(text="simulated")
    if question.pack.is_file():
        return Finding(text="pack")
    missing = []
    for image in question.images:
        try:
            with (question.images_root / image).open("rb") as file:
                file.read(1)
        except OSError:
            missing.append(Path(image).name)
    if missing:
        return Finding(
            text="not read",
            trouble=f"it cannot read {len(missing)} of {len(question.images)} images in "
            f"{question.images_root} ({some_of(missing, limit=2)}): mount them under the same path",
        )
    return Finding(text="read")


def _look_at_cache(question: Question) -> Finding:
    try:
        folder = default_cache_dir()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
        free_bytes = shutil.disk_usage(folder).free
    except (InputError, OSError) as error:
        return Finding(
            text="not writable",
            trouble=f"its cache cannot be written ({error}): set NEUROSWEEP_CACHE in the "
            "environment of its `ray start` to a folder on its disk",
        )
    needed_bytes = 0 if question.pack.is_file() else question.pack_bytes
    if free_bytes < needed_bytes:
        return Finding(
            text=f"{free_bytes / 2**30:.1f} GiB free",
            trouble=f"its cache {folder} has {free_bytes / 2**30:.1f} GiB free and the images take "
            f"{needed_bytes / 2**30:.1f}: make room, or set NEUROSWEEP_CACHE elsewhere",
        )
    return Finding(text=f"{free_bytes / 2**30:.0f} GiB free")


def _look_at_gpus(num_gpus: int) -> Finding:
    # In another process: this one is used again, and torch remembers which GPUs it has seen.
    program = (
        "import torch; "
        "print(*(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())), sep='|')"
    )
    hidden = ("CUDA_VISIBLE_DEVICES",)  # Ray hides GPUs from tasks that ask for none
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    try:
        run = subprocess.run(  # noqa: S603  our own program
            [sys.executable, "-c", program],
            env=environment,
            capture_output=True,
            text=True,
            timeout=GPU_ANSWER_WITHIN_S,
        )
        names = [name for name in run.stdout.strip().split("|") if name]
    except (OSError, subprocess.TimeoutExpired):
        names = []
    if len(names) < num_gpus:
        return Finding(
            text=f"{len(names)} GPU seen",
            trouble=f"torch sees {len(names)} GPUs where Ray has {num_gpus}: install a build of "
            "torch for its driver",
        )
    return Finding(text=names[0])
