"""Ray on this machine, for one sweep: nobody else reaches it."""

import contextlib
import os
import socket
import struct
from pathlib import Path

import pytest
import ray

from search.tuning.local_ray import processes_of
from search.tuning.tuner import connected


def listening(pids: list[int]) -> set[str]:
    """The addresses that some processes accept TCP connections at."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for file in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):  # this one alone was closed
                    link = str(file.readlink())
                    if link.startswith("socket:["):
                        inodes.add(link[8:-1])
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:  # LISTEN
                # Words of 32 bits, each in this machine's order.
                raw = bytes.fromhex(fields[1].partition(":")[0])
                words = struct.unpack(f">{len(raw) // 4}I", raw)
                found.add(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return found


def test_sockets_are_found_and_read() -> None:
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0")):
        with socket.socket(family) as server:
            server.bind((address, 0))
            server.listen()
            assert address in listening([os.getpid()])
    with socket.socket(socket.AF_INET6) as server:
        server.bind(("::", 0))
        server.listen()
        assert "::" in listening([os.getpid()])


@pytest.mark.slow
def test_a_sweeps_own_ray_listens_on_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
    with connected(None):
        folder = Path(ray._private.worker._global_node.get_temp_dir_path())
        assert ray.get(ray.remote(lambda: os.getpid()).remote()) > 0  # a worker listens, too
        pids = [*processes_of(folder), os.getpid()]
        assert len(pids) > 5
        assert listening(pids) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        assert "::ffff:127.0.0.1" in listening(pids)
    # A cluster that this process joins later has other addresses.
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ
