"""A sweep's folder: new, writable, and held by one process at a time."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

from lightning_modules.errors import InputError
from search.sweep import Sweep


@contextlib.contextmanager
def new_folder(sweep: Sweep) -> Iterator[None]:
    """Create a sweep's folder and hold it; take it away again if no sweep comes of it.

    Raises:
        InputError: If there is a sweep in it already, or it cannot be written.
    """
    _check_new(sweep)
    try:
        sweep.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=sweep.folder) as probe:
            probe.write(b"\0" * 65536)
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            sweep.folder.rmdir()
        remedy = "free space there, or " if error.errno == errno.ENOSPC else ""
        raise InputError(
            f"storage must be a folder that can be written; {sweep.folder}: {error.strerror}: "
            f"{remedy}give another with `--storage`"
        ) from error
    with lock(sweep):
        _check_new(sweep)
        # Left by a launch that was killed before there was a sweep to resume.
        (sweep.folder / "study.db").unlink(missing_ok=True)
        try:
            yield
        finally:
            if not (sweep.folder / "sweep.yaml").exists():
                for name in (".lock", "study.db", "manifest.csv"):
                    (sweep.folder / name).unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    sweep.folder.rmdir()


def _check_new(sweep: Sweep) -> None:
    # A folder with a sweep.yaml can be resumed.
    if (sweep.folder / "sweep.yaml").exists():
        raise InputError(
            f"the sweep's name must be new; {sweep.folder} exists: `neurosweep resume "
            f"{sweep.reference}` goes on with it, `--name` takes another"
        )


@contextlib.contextmanager
def lock(sweep: Sweep) -> Iterator[None]:
    """Hold the sweep, so that no two processes run it; let go by the system if this one dies.

    Raises:
        InputError: If another process holds it.
    """
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with (sweep.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                f"a sweep runs in one process at a time; another runs {sweep.name}: wait for it, "
                f"or look with `neurosweep top {sweep.reference}`"
            ) from error
        yield
