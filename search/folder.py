"""A sweep's folder, or its place in an object storage: new, writable, and one process's."""

import contextlib
import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator

from lightning_modules.errors import InputError
from search.study.storage import check_name_is_free, in_use
from search.study.sweep_files import check_object_storage, is_object_storage
from search.sweep import Sweep


@contextlib.contextmanager
def new_folder(sweep: Sweep) -> Iterator[None]:
    """Create a sweep's folder and hold it; take it away again if no sweep comes of it.

    In an object storage there is nothing to create: the name is the study's, which no two sweeps
    can have.

    Raises:
        InputError: If there is a sweep in it already, or it cannot be written; or if the study's
            server cannot be reached, or has a study of that name.
    """
    if is_object_storage(sweep.storage):
        check_object_storage(sweep.location)
    _check_new(sweep)
    if sweep.study_url is not None:
        check_name_is_free(sweep)
    if is_object_storage(sweep.storage):
        yield
        return
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
    if sweep.files.has("sweep.yaml"):
        raise InputError(
            f"the sweep's name must be new; {sweep.location} exists: `neurosweep resume "
            f"{sweep.reference}` goes on with it, `--name` takes another"
        )


@contextlib.contextmanager
def lock(sweep: Sweep) -> Iterator[None]:
    """Hold a sweep's folder, so that no two processes run it; let go if this one dies.

    A sweep without a folder has its study on a server, where ``Record.being_written`` holds it.

    Raises:
        InputError: If another process holds it.
    """
    if is_object_storage(sweep.storage):
        yield
        return
    sweep.folder.mkdir(parents=True, exist_ok=True)
    with (sweep.folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise in_use(sweep) from error
        yield
