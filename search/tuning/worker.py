"""A warm worker's state between trials: nothing of a trial may stay behind in the process."""

import ctypes
import gc
import threading
from dataclasses import dataclass
from pathlib import Path

import torch

# What may differ between two trials without anything being wrong: other params allocate other
# sizes, and libraries keep a few buffers, threads, and files of their own once they are used.
ALLOWED_BYTES = 128 * 2**20
ALLOWED_THREADS = 8
ALLOWED_FILES = 16


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """What a process holds.

    Attributes:
        allocated_bytes: On the heap and on the GPU; pages that are mapped from files do not count.
        num_threads: Threads.
        num_open_files: File descriptors.
    """

    allocated_bytes: int
    num_threads: int
    num_open_files: int

    def beyond(self, baseline: "Footprint") -> str:
        """Return what is held in excess of a baseline, for people; empty if nothing is."""
        grown_mib = (self.allocated_bytes - baseline.allocated_bytes) / 2**20
        threads = self.num_threads - baseline.num_threads
        files = self.num_open_files - baseline.num_open_files
        excess = [
            (grown_mib * 2**20 > ALLOWED_BYTES, f"{grown_mib:.0f} MiB"),
            (threads > ALLOWED_THREADS, f"{threads} threads"),
            (files > ALLOWED_FILES, f"{files} open files"),
        ]
        return ", ".join(text for is_more, text in excess if is_more)


class Worker:
    """One worker process: remembers what it held before its trials, and notices what stays.

    The first trials fill the process's caches (initial weights, images, compiled graphs), each of
    which is given as a number of entries; a baseline belongs to one such filling.
    """

    def __init__(self) -> None:
        self._baselines: dict[tuple[int, ...], Footprint] = {}
        self._is_new = True

    def leak_before_trial(self, cache_sizes: tuple[int, ...]) -> str:
        """Return what earlier trials have left behind, for people; empty if nothing.

        Args:
            cache_sizes: Entries in each of the process's own caches.
        """
        gc.collect()
        if self._is_new:
            # Modules and classes stay: looking through them again takes longer than all the rest.
            gc.freeze()
            gc.enable()  # off until all was imported
            self._is_new = False
        footprint = measure_footprint()
        if not any(cache_sizes):  # nothing has run here yet
            return ""
        return footprint.beyond(self._baselines.setdefault(cache_sizes, footprint))


WORKER = Worker()


def measure_footprint() -> Footprint:
    """Measure this process."""
    descriptors = Path("/proc/self/fd")
    allocated_bytes = _heap_bytes()
    if torch.cuda.is_initialized():
        allocated_bytes += torch.cuda.memory_allocated()
    return Footprint(
        allocated_bytes=allocated_bytes,
        num_threads=threading.active_count(),
        num_open_files=sum(1 for _ in descriptors.iterdir()) if descriptors.is_dir() else 0,
    )


class _Mallinfo2(ctypes.Structure):
    """glibc's struct mallinfo2: ten counts of bytes or chunks."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def _heap_bytes() -> int:
    """Return what is allocated and not freed; 0 where the C library cannot tell (not glibc)."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except AttributeError:
        return 0
    mallinfo2.restype = _Mallinfo2
    counts = mallinfo2()
    return int(counts.uordblks + counts.hblkhd)
