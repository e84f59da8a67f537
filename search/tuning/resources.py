"""What a trial takes of a cluster: CPUs, and as small a share of a GPU as memory allows."""

import gc
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune

from lightning_modules.compiled_stages import check_compiler
from lightning_modules.data.pack import default_cache_dir
from lightning_modules.errors import InputError
from lightning_modules.step_cost import choose_precisions, measure_step
from search.space import Choice, Int
from search.sweep import Sweep

# Room for what a measurement of a few steps does not see: fragmentation, and images and features
# that lie on the GPU, three times ``RESIDENT_SHARE`` at most.
MEMORY_MARGIN = 1.5


@dataclass(frozen=True, kw_only=True)
class TrialResources:
    """What trials take of the connected cluster.

    Attributes:
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
        each: ``cpu`` and ``gpu`` of every trial. Ray Tune hands a warm worker on only to a trial
            that takes the same: with shares by kind most trials would start one.
        num_slots: Trials at a time.
    """

    whole: dict[str, float]
    each: dict[str, float]
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


def gpu_share(peak_bytes: Collection[int], total_bytes: int, max_trials: int) -> float:
    """Return the share of a GPU that every trial takes, so that the largest fits with a margin.

    Args:
        peak_bytes: The most that a process takes, of each kind of trial that was measured.
        total_bytes: The GPU's memory.
        max_trials: Most trials on one GPU; each takes CPUs, too.

    Example:
        >>> gpu_share([30, 1], 100, 16)
        0.5
    """
    fitting = math.floor(total_bytes / (MEMORY_MARGIN * max(peak_bytes)))
    return 1 / max(1, min(max_trials, fitting))


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
        batch_size = max(values_of(sweep, "batch_size"))
        for backbone in sweep.backbones:
            # Deep ones keep activations, shallow ones compute features in large blocks.
            for depth in sorted(values_of(sweep, "unfreeze_depth")):
                cost = measure_step(
                    backbone,
                    unfreeze_depth=depth,
                    batch_size=batch_size,
                    image_size_px=sweep.data.image_size_px,
                    precision=precisions[backbone],
                    device=device,
                )
                facts["gpu_peak_bytes"][f"{backbone} {depth} {batch_size}"] = cost.peak_bytes
    return facts


def values_of(sweep: Sweep, name: str) -> set[int]:
    """Return every value that a trial of the sweep may have of a param that counts something."""
    domain = sweep.space.get(name)
    values = {int(getattr(sweep.params, name))}
    if isinstance(domain, Int):
        values |= set(range(domain.low, domain.high + 1))
    elif isinstance(domain, Choice):
        values |= {int(str(value)) for value in domain.choices}
    return values


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
