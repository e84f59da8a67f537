"""How much sooner does a process that needs torch, Lightning, and Ray begin, and end?

    uv run python experiments/benchmarks/startup.py --out startup.json

A process imports what a sweep's driver imports, and ends: as Python does it, and as our command
does it, which looks for garbage rarely meanwhile and unloads nothing at the end. In turn; what the
imports take is told by the process itself, the rest of its time is Python's own start and the end.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from measurement import provenance, ratio_interval, shown

IMPORT = """
import time
start_s = time.perf_counter()
import search.tuning.tuner
print(time.perf_counter() - start_s, flush=True)
"""
SIDES = {
    "plain": IMPORT,
    "ours": "import gc\ngc.set_threshold(10_000)" + IMPORT + "import os\nos._exit(0)",
}


def run(code: str) -> dict[str, float]:
    """Return the seconds of imports, of the whole process, and of its CPU time."""
    start_s, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    whole_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"imports_s": float(process.stdout), "whole_s": whole_s, "cpu_s": cpu_s}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).with_name("results") / "startup.json"
    )
    options = parser.parse_args()
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    run(SIDES["plain"])  # files come from the disk the first time
    for number in range(options.pairs):
        for name in sorted(SIDES, reverse=bool(number % 2)):
            rounds[name].append(run(SIDES[name]))
    result: dict[str, Any] = {**provenance("torch", "pytorch-lightning", "ray"), "rounds": rounds}
    for what in ("imports_s", "whole_s", "cpu_s"):
        plain, ours = ([taken[what] for taken in rounds[name]] for name in ("plain", "ours"))
        ratio = ratio_interval([p / o for p, o in zip(plain, ours, strict=True)])
        medians = statistics.median(plain), statistics.median(ours)
        result[what] = {"plain": medians[0], "ours": medians[1], "speed_up": ratio}
        print(f"{what}: {medians[0]:.1f} and {medians[1]:.1f}, {shown(ratio)}", flush=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
