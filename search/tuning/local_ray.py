"""Ray on this machine alone, for one sweep: out of others' reach, and nothing left behind."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray

# In the environment of every process of one driver's Ray, so that they can be told from others'.
MARK = "NEUROSWEEP_RAY"

# A socket's path may have 107 bytes, of which Ray's folders and names, and ours, take up to 82.
MAX_FOLDER_BYTES = 25

# How long processes are given to end by themselves.
GRACE_S = 2.0


@contextlib.contextmanager
def local_ray(options: dict[str, Any]) -> Iterator[None]:
    """Start Ray on this machine; end it with all its processes and files, however it went.

    A driver that is killed with SIGKILL cannot do the latter; its processes notice and end.

    Args:
        options: For ``ray.init``.
    """
    # Ray asks for a token by default, also on loopback, which a machine's users share. Given here,
    # the token is this sweep's alone and none is written to the home folder.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    mark = secrets.token_hex(8)
    os.environ[MARK] = mark
    above = tempfile.gettempdir()
    if len(os.fsencode(above)) > MAX_FOLDER_BYTES:
        above = "/tmp"  # noqa: S108  a new folder in it, for this user alone
    folder = tempfile.mkdtemp(prefix="nsweep-", dir=above)
    try:
        ray.init(
            address="local",
            _node_ip_address="127.0.0.1",
            _temp_dir=folder,
            include_dashboard=False,
            **options,
        )
        yield
    finally:
        ray.shutdown()
        end_processes(mark)
        os.environ.pop(MARK, None)
        shutil.rmtree(folder, ignore_errors=True)


def end_processes(mark: str) -> None:
    """End what is left of a Ray, such as workers whose raylet was ended before them.

    Does nothing where there is no ``/proc``.
    """
    deadline_s = time.monotonic() + GRACE_S
    while (left := processes_of(mark)) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def processes_of(mark: str) -> list[int]:
    """Return the ids of the processes with a mark, this one aside."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        # It may have ended meanwhile, or be another user's.
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]
