"""What all kinds of a sweep's trials take, measured beside each other on the cluster's workers."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray

from search.planning.kind_cost import Kind, KindCost, measure_kinds
from search.sweep import Sweep
from search.tuning.resources import max_concurrent, values_of
from search.tuning.trial import Run

# As many workers measure at once, at most: beside each other, as trials run.
MOST_MEASURING = 16


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of a sweep's trials.

    Attributes:
        costs: By kind of trial.
        worker_start_s: Until a worker is ready for its first trial.
        age_s: How long ago that was, if not just now.
    """

    costs: Mapping[Kind, KindCost]
    worker_start_s: float
    age_s: float = 0.0


def measure(run: Run, whole: Mapping[str, float]) -> Measurement:
    """Measure every kind of trial, on as many workers at once as run beside each other.

    Args:
        run: What trials share.
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
    """
    kinds = kinds_of(run.sweep)
    count = max(1, min(max_concurrent(whole), len(kinds), MOST_MEASURING))
    task = ray.remote(num_cpus=whole["cpu"], num_gpus=whole["gpu"])(_answer)
    shared = ray.put(run)
    answers = ray.get([task.remote(shared, dealt) for dealt in deal(kinds, count)])
    costs: dict[Kind, KindCost] = {}
    for _, found in answers:
        costs.update(found)
    return Measurement(costs=costs, worker_start_s=max(seconds for seconds, _ in answers))


def kinds_of(sweep: Sweep) -> list[Kind]:
    """Return every backbone and depth that a trial of the sweep may have, shallow ones first."""
    depths = sorted(values_of(sweep, "unfreeze_depth"))
    return [(backbone, depth) for depth in depths for backbone in sweep.backbones]


def deal(kinds: Sequence[Kind], count: int) -> list[list[Kind]]:
    """Deal kinds out so that each worker gets as much of the slower backbone, shallow ones first.

    Example:
        >>> deal([("a", 0), ("b", 0), ("a", 1), ("b", 1)], 2)
        [[('a', 0), ('b', 0)], [('a', 1), ('b', 1)]]
    """
    by_backbone = sorted(kinds)
    return [sorted(by_backbone[i::count], key=lambda kind: kind[1]) for i in range(count)]


def _answer(run: Run, kinds: Sequence[Kind]) -> tuple[float, dict[Kind, KindCost]]:
    """Measure in a worker; return the seconds that it took to get ready, too."""
    started_s, costs = measure_kinds(run, kinds)
    ready_s = 0.0
    try:
        # Fields of proc_pid_stat(5): since the process began, in ticks since the system did.
        began = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
        age_s = up_s - began / os.sysconf("SC_CLK_TCK")
        ready_s = max(0.0, age_s - (time.monotonic() - started_s))
    except (OSError, ValueError, IndexError):
        pass  # not Linux: then a worker's start is left out
    return ready_s, costs
