"""Reads changed files of every kind: does each end well, or in one line, in time, and in memory?

    uv run python experiments/benchmarks/fuzz.py --inputs 110500 --out RESULT.json
    uv run python experiments/benchmarks/fuzz.py --target record --only 17   # one input again

An input is a function of (target, seed, number). One that raises anything but what a command says
in one line, takes more CPU than ``LIMIT_S``, or ends the process, is a finding.
"""

import argparse
import collections
import json
import mmap
import multiprocessing
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import fuzz_bundles
import fuzz_images
import fuzz_records
from measurement import REPOSITORY, provenance

from lightning_modules.errors import InputError, printable

TARGETS = fuzz_records.TARGETS | fuzz_images.TARGETS | fuzz_bundles.TARGETS

LIMIT_S = 20  # of CPU time: the machine may have other work
STUCK_S = 600
MAX_GROWTH_BYTES = 2**31
TOTAL = sum(target.inputs for target in TARGETS.values())


class TooLong(BaseException):
    """An input took longer than it may; no reader may catch it."""


def changed(name: str, files: Any, seed: int, number: int) -> bytes:
    """Return one input."""
    rng = random.Random(f"{name}/{seed}/{number}")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)  # what is changed may be nested deeper than it can be read
    try:
        return TARGETS[name].change(rng.choice(files), rng.choice(files), rng)
    finally:
        sys.setrecursionlimit(limit)


def outcome(name: str, data: bytes, folder: Path) -> str:
    """Read one input: ``accepted``, ``refused``, or what it did instead."""
    try:
        TARGETS[name].read(data, folder)
    except (InputError, OSError) as error:
        line = str(error)
        # The command cleans a line before it prints it; it is still to be one.
        is_line = len(line.splitlines()) == 1 and len(line) < 4000 and printable(line)
        return "refused" if is_line or isinstance(error, OSError) else f"no line: {line[:80]!r}"
    except TooLong:
        return f"took more than {LIMIT_S} s"
    except BaseException as error:
        frames = [
            f for f in traceback.extract_tb(error.__traceback__) if str(REPOSITORY) in f.filename
        ]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
        return f"{type(error).__name__} at {place}: {str(error)[:100]!r}"
    return "accepted"


def fuzz(name: str, numbers: Any, seed: int, progress: Any) -> dict[str, Any]:
    """Read many inputs in this process."""
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _raise)
    outcomes: collections.Counter[str] = collections.Counter()
    first: dict[str, int] = {}
    slowest = (0.0, -1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        files = TARGETS[name].prepare(folder)
        for data in files:
            found = outcome(name, data, folder)
            assert found == "accepted", f"{name}: a valid file is not read: {found}"
        before = _peak_bytes()
        _limit_memory()
        for number in numbers:
            data = changed(name, files, seed, number)
            progress[:8] = struct.pack("<q", number)
            start_s = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
            found = outcome(name, data, folder)
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, (time.process_time() - start_s, number))
            outcomes[found] += 1
            first.setdefault(found, number)
        growth = _peak_bytes() - before
    findings = {what: first[what] for what in outcomes if what not in ("accepted", "refused")}
    return {
        "inputs": sum(outcomes.values()),
        "outcomes": dict(outcomes),
        "findings": findings,
        "slowest_s": slowest[0],
        "slowest_input": slowest[1],
        "peak_growth_mib": growth / 2**20,
    }


def fuzz_apart(name: str, num_inputs: int, seed: int) -> dict[str, Any]:
    """Read inputs in a process of its own; one that ends it is a finding, and the rest is read."""
    progress = mmap.mmap(-1, 8)
    context = multiprocessing.get_context("fork")
    done: dict[str, Any] = {"inputs": 0, "outcomes": {}, "findings": {}, "slowest_s": 0.0}
    done |= {"slowest_input": -1, "peak_growth_mib": 0.0}
    start = 0
    start_s = time.perf_counter()
    while start < num_inputs:
        progress[:8] = struct.pack("<q", start)
        ours, theirs = context.Pipe(duplex=False)

        def run(theirs: Any = theirs, start: int = start) -> None:
            theirs.send(fuzz(name, range(start, num_inputs), seed, progress))

        process = context.Process(target=run)
        process.start()
        theirs.close()
        part, start = _watch(process, ours, progress, start, num_inputs)
        done["outcomes"] = dict(
            collections.Counter(done["outcomes"]) + collections.Counter(part["outcomes"])
        )
        done["findings"] = part["findings"] | done["findings"]
        done["inputs"] += part["inputs"]
        done["peak_growth_mib"] = max(done["peak_growth_mib"], part.get("peak_growth_mib", 0.0))
        if part.get("slowest_s", 0.0) > done["slowest_s"]:
            done |= {key: part[key] for key in ("slowest_s", "slowest_input")}
    return {**done, "wall_s": time.perf_counter() - start_s}


def _watch(
    process: Any, ours: Any, progress: Any, start: int, end: int
) -> tuple[dict[str, Any], int]:
    """Wait for a process that moves on; return what came of it, and where to go on."""
    last, since_s = start, time.monotonic()
    while not ours.poll(1.0):
        (number,) = struct.unpack("<q", progress[:8])
        if number != last:
            last, since_s = number, time.monotonic()
        if time.monotonic() - since_s > STUCK_S:
            process.kill()  # inside a library that no signal gets out of
            break
    try:
        part = ours.recv()
        process.join()
        return part, end
    except EOFError:
        process.join()
        (number,) = struct.unpack("<q", progress[:8])
        what = f"the process ended with {process.exitcode}"
        counts = {"accepted or refused": number - start, what: 1}
        return {
            "inputs": number - start + 1,
            "outcomes": counts,
            "findings": {what: number},
        }, number + 1


def _raise(*_: object) -> None:
    raise TooLong


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    # What is asked for beyond fails: a finding, and no machine without memory.
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = used + MAX_GROWTH_BYTES
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=TOTAL, help="shared out over the targets")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one input, with its traceback")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    names = options.target or list(TARGETS)
    if options.only is not None:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary).resolve()
            files = TARGETS[names[0]].prepare(folder)
            data = changed(names[0], files, options.seed, options.only)
            print(repr(data[:2000]))
            TARGETS[names[0]].read(data, folder)
        return
    share = options.inputs / sum(TARGETS[name].inputs for name in names)
    result = provenance(
        "numpy",
        "pillow",
        "pydicom",
        "nibabel",
        "pyyaml",
        "pandas",
        "torch",
        "onnx",
        "onnxruntime",
        "safetensors",
        "optuna",
        "sqlalchemy",
    )
    result |= {"seed": options.seed, "limit_s": LIMIT_S, "targets": {}}
    for name in names:
        found = fuzz_apart(name, max(1, round(TARGETS[name].inputs * share)), options.seed)
        result["targets"][name] = found
        print(
            f"{name:12} {found['inputs']:7} inputs  {found['wall_s']:6.0f} s  slowest "
            f"{found['slowest_s']:.2f} s  +{found['peak_growth_mib']:.0f} MiB",
            flush=True,
        )
        for what, number in found["findings"].items():
            print(
                f"    {found['outcomes'][what]}x {what}; --target {name} --only {number}",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if any(found["findings"] for found in result["targets"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
