"""Ray on this machine alone, for one sweep: out of others' reach, and nothing left behind."""

import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray._private import ray_constants

# A socket's path may have 107 bytes, of which Ray's folders and names, and ours, take up to 82.
MAX_FOLDER_BYTES = 25


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
    above = tempfile.gettempdir()
    if len(os.fsencode(above)) > MAX_FOLDER_BYTES:
        above = "/tmp"  # noqa: S108  a new folder in it, for this user alone
    folder = Path(tempfile.mkdtemp(prefix="nsweep-", dir=above))
    is_interrupted = False
    in_main_thread = threading.current_thread() is threading.main_thread()
    try:
        with _on_loopback(), _own_sigterm_handler(), _sigterm_blocked():
            ray.init(
                address="local",
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
                include_dashboard=False,
                # As many as there are CPUs, without the workers' environment: ended unused.
                _system_config={"prestart_worker_first_driver": False},
                **options,
            )
        yield
    except KeyboardInterrupt:
        # Nothing of Ray is needed any more, and taking leave of it takes time.
        is_interrupted = True
        if in_main_thread:
            # It takes a moment, in which another signal would leave half of it behind.
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
        raise
    finally:
        try:
            if not is_interrupted:
                _kill_where_ray_would_terminate()
                ray.shutdown()
        finally:
            end_processes(folder)
            shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Have Ray, which is started meanwhile, listen on loopback alone.

    On Linux it takes the machine's own address where it is given loopback's, and then listens on
    all of them. Its switch for that is named after the systems where it does so by itself; it was
    read when Ray was imported, and is read again by each process that Ray starts.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before, was_enabled = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    try:
        os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = was_enabled
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


@contextlib.contextmanager
def _own_sigterm_handler() -> Iterator[None]:
    """Give SIGTERM back to the handler that Ray puts its own in place of.

    Ray's ends the process with an exit code of its own, also while it starts.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        signal.signal(signal.SIGTERM, before)
        signal.raise_signal(signal.SIGTERM)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Have what is started meanwhile, threads and processes, never see SIGTERM.

    Schedulers send it to every process of a job. Ray's own would end by it, and where they end
    first, Ray ends the driver, before that has said how to resume. From Ctrl-C Ray shields them
    itself.
    """
    if sys.platform != "linux":
        # There Ray has a process that ends the others by SIGTERM once the driver is gone.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill_where_ray_would_terminate() -> None:
    """Spare ``ray.shutdown`` a second of waiting for each process, none of which sees SIGTERM."""
    # Ray's own list has no public name; if it moves, the end takes that much longer.
    with contextlib.suppress(AttributeError):
        node: Any = ray._private.worker._global_node
        for started in node.all_processes.values():
            for each in started:
                each.process.terminate = each.process.kill


def end_processes(folder: Path) -> None:
    """End what is left of a Ray; do nothing where there is no ``/proc``.

    Args:
        folder: Ray's.
    """
    # Until there are none: one may start another while it is looked for.
    while left := processes_of(folder):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_of(folder: Path) -> list[int]:
    """Return the ids of the processes that log to a Ray's folder, as all of its own do.

    Their parents may be gone, and their environments overwritten with their titles.
    """
    start = f"{folder}/"
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # It may have ended meanwhile, or be another user's.
        with contextlib.suppress(OSError):
            files = (str(file.readlink()) for file in (process / "fd").iterdir())
            if any(file.startswith(start) for file in files):
                found.append(int(process.name))
    return [pid for pid in found if pid != os.getpid()]
