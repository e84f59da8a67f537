"""Processes that a test has started, and all below them, by a mark in their environment."""

from pathlib import Path


def marked_processes(mark: str) -> list[str]:
    """Command lines of what still runs.

    Args:
        mark: ``NAME=VALUE``, as the first of them was started with.
    """
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
