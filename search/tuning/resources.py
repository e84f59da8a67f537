"""What a trial takes of a cluster: CPUs, and as small a share of a GPU as its memory allows."""

import gc
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune

from lightning_modules.compiled_stages import check_compiler
from lightning_modules.data.pack import default_cache_dir
from lightning_modules.errors import InputError
from lightning_modules.stages import NUM_STAGES
from lightning_modules.step_cost import choose_precisions, measure_step
from search.space import grid_of
from search.sweep import Sweep, TrialParams

# Room for what a measurement of a few steps does not see: validation, fragmentation, the features.
MEMORY_MARGIN = 1.25

# By (backbone, unfreeze_depth, batch_size): the share of a GPU.
Shares = dict[tuple[str, int, int], float]


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """What trials take of the connected cluster.

    Attributes:
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
        shares: Of a GPU, by kind of trial; empty where all take the same.
        num_slots: Trials at a time.
    """

    whole: dict[str, float]
    shares: Shares
    num_slots: int


def check_devices(sweep: Sweep, address: str | None) -> None:
    """Refuse what this machine does not have; a cluster is asked once it is connected.

    Raises:
        InputError: If a trial asks for more than there is.
    """
    if address is not None:
        return
    if sweep.training.compile:
        check_compiler()
    for name, asked, there in (
        ("cpus_per_trial", sweep.resources.cpus_per_trial, os.cpu_count() or 1),
        ("gpus_per_trial", sweep.resources.gpus_per_trial or 0, torch.cuda.device_count()),
    ):
        if asked > there:
            raise InputError(
                f"resources.{name} must fit this machine; got {asked:g}, and it has {there}: ask "
                "for less"
            )


def whole_resources(sweep: Sweep) -> dict[str, float]:
    """Return what a trial takes, a whole GPU if the sweep does not say, where a node has it.

    Raises:
        InputError: If no node of the connected cluster has it.
    """
    nodes = _nodes()
    gpus = sweep.resources.gpus_per_trial
    if gpus is None:
        gpus = 1.0 if any(node.get("GPU", 0.0) for node in nodes) else 0.0
    resources = {"cpu": float(sweep.resources.cpus_per_trial), "gpu": gpus}
    if not any(num_fitting(node, resources) for node in nodes):
        raise InputError(
            f"a trial must fit a node of the cluster; it asks for {resources['cpu']:g} CPUs and "
            f"{gpus:g} GPUs, and no node has both: lower resources.cpus_per_trial or "
            "resources.gpus_per_trial"
        )
    return resources


def max_concurrent(resources: Mapping[str, float]) -> int:
    """Return how many trials with such resources the connected cluster runs at once."""
    return sum(num_fitting(node, resources) for node in _nodes())


def placement_of(
    resources: Mapping[str, float], config: Mapping[str, Any]
) -> tune.PlacementGroupFactory:
    """Return what Ray gives a trial, and where.

    Args:
        resources: As Ray names them.
        config: The trial's; the nodes that it avoids are not placed on.
    """
    avoided = config["avoided_nodes"]
    if not avoided:
        return tune.PlacementGroupFactory([dict(resources)])
    selector = {"ray.io/node-id": f"!in({','.join(avoided)})"}
    return tune.PlacementGroupFactory([dict(resources)], bundle_label_selector=[selector])


def max_trials_per_gpu(sweep: Sweep) -> int:
    """Return how many trials the CPUs of a node with GPUs allow on each of them, at least one."""
    per_gpu = [
        node["CPU"] / (sweep.resources.cpus_per_trial * node["GPU"])
        for node in _nodes()
        if node.get("GPU", 0.0)
    ]
    return max(1, math.floor(min(per_gpu, default=1.0)))


def measure_device(sweep: Sweep, *, is_local: bool) -> dict[str, Any]:
    """Measure what trials are trained in, and what they take of a GPU's memory.

    On CPUs of this machine it is done in this process; else by a task with a whole trial's
    resources, on the kind of device that trials get.

    Returns:
        ``precisions`` by backbone, and ``gpu_peak_bytes`` by "backbone depth batch", empty without
        a GPU or where the sweep says what a trial takes.
    """
    resources = whole_resources(sweep)
    on_gpu = resources["gpu"] > 0
    if is_local and not on_gpu:
        # Starting a worker takes longer than most measurements.
        num_threads = torch.get_num_threads()
        torch.set_num_threads(sweep.resources.cpus_per_trial)
        try:
            return _measure_here(sweep, on_gpu)
        finally:
            torch.set_num_threads(num_threads)
    task = ray.remote(num_cpus=resources["cpu"], num_gpus=resources["gpu"])(_measure_here)
    facts: dict[str, Any] = ray.get(task.remote(sweep, on_gpu))
    return facts


def shares_of(peak_bytes: Mapping[str, int], total_bytes: int, max_trials: int) -> Shares:
    """Return which share of a GPU each kind of trial takes: one in a whole number of trials.

    Args:
        peak_bytes: By "backbone depth batch": the most that a process takes.
        total_bytes: The GPU's memory.
        max_trials: Most trials on one GPU; each takes CPUs, too.

    Example:
        >>> shares_of({"resnet50 5 32": 30, "resnet50 0 32": 1}, 100, 16)
        {('resnet50', 5, 32): 0.5, ('resnet50', 0, 32): 0.0625}
    """
    shares = {}
    for key, peak in peak_bytes.items():
        backbone, depth, batch_size = key.split()
        fitting = max(1, min(max_trials, math.floor(total_bytes / (MEMORY_MARGIN * peak))))
        shares[backbone, int(depth), int(batch_size)] = 1 / fitting
    return shares


def share_of(params: TrialParams, shares: Shares) -> float:
    """Return the share of a GPU that a trial takes: of the measured batch size next above its own.

    A whole GPU if nothing was measured that is at least as large.
    """
    larger = [
        (batch_size, share)
        for (backbone, depth, batch_size), share in shares.items()
        if (backbone, depth) == (params.backbone, params.unfreeze_depth)
        and batch_size >= params.batch_size
    ]
    return min(larger)[1] if larger else 1.0


def _measure_here(sweep: Sweep, on_gpu: bool) -> dict[str, Any]:
    gc.enable()  # in a worker it was off until all was imported
    device = torch.device("cuda" if on_gpu else "cpu")
    precision = sweep.training.precision
    if precision == "auto":
        precisions = choose_precisions(
            sweep.backbones,
            image_size_px=sweep.data.image_size_px,
            device=device,
            cache_dir=default_cache_dir(),
        )
    else:
        precisions = dict.fromkeys(sweep.backbones, precision)
    facts: dict[str, Any] = {"precisions": precisions, "gpu_peak_bytes": {}, "gpu_total_bytes": 0}
    if on_gpu and sweep.resources.gpus_per_trial is None:
        facts["gpu_total_bytes"] = torch.cuda.get_device_properties(device).total_memory
        for backbone in sweep.backbones:
            for depth in _values(sweep, "unfreeze_depth", range(NUM_STAGES + 1)):
                for batch_size in _values(sweep, "batch_size", ()):
                    cost = measure_step(
                        backbone,
                        unfreeze_depth=depth,
                        batch_size=batch_size,
                        image_size_px=sweep.data.image_size_px,
                        precision=precisions[backbone],
                        device=device,
                    )
                    key = f"{backbone} {depth} {batch_size}"
                    facts["gpu_peak_bytes"][key] = cost.peak_bytes
    return facts


def _values(sweep: Sweep, name: str, whole_range: Any) -> list[int]:
    """Return the values of a param to measure at: the grid's, the baseline's, or a whole range."""
    if name not in sweep.space:
        return [getattr(sweep.params, name)]
    searched = list(whole_range) or [int(str(value)) for value in grid_of(sweep.space)[name]]
    return sorted({*searched, getattr(sweep.params, name)})


def _nodes() -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def num_fitting(node: Mapping[str, float], resources: Mapping[str, float]) -> int:
    """Return how many trials with such resources a node runs at once."""
    fits = [
        node.get(key, 0.0) / resources[name]
        for name, key in (("cpu", "CPU"), ("gpu", "GPU"))
        if resources[name]
    ]
    return math.floor(min(fits) + 1e-6)
