"""What was measured on this machine lately: a launch after a plan measures nothing again."""

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_modules.data.pack import default_cache_dir
from lightning_modules.files import write_atomically
from lightning_modules.step_cost import name_of_device
from search.planning.kind_cost import KindCost
from search.planning.measurement import Measurement, kinds_of
from search.study.sweep_files import LocalFiles
from search.sweep import Sweep
from search.tuning.survey import source_digest
from search.tuning.trial import Run, are_views_shared

# What else runs on a machine changes, and its speed with it.
KEPT_S = 24 * 3600.0


def recall(run: Run, whole: Mapping[str, float]) -> Measurement | None:
    """Return what was measured on this machine for such trials, within a day; none if nothing was.

    Args:
        run: What trials share.
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
    """
    try:
        found = _known()[_key(run, whole)]
        costs = {}
        for name, cost in found["costs"].items():
            backbone, depth = name.split()
            if not all(isinstance(value, int | float) for value in cost.values()):
                return None
            costs[backbone, int(depth)] = KindCost(**cost)
        return Measurement(
            costs=costs,
            worker_start_s=float(found["worker_start_s"]),
            age_s=max(1.0, time.time() - found["measured_at_s"]),
        )
    except (LookupError, TypeError, ValueError, AttributeError):
        return None  # nothing, or nothing that can be read: it is measured again


def remember(run: Run, whole: Mapping[str, float], measurement: Measurement) -> None:
    """Keep what was just measured on this machine; what is older than a day is dropped.

    Args:
        run: What trials share.
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
        measurement: Of all their kinds.
    """
    known = _known()
    known[_key(run, whole)] = {
        "measured_at_s": time.time(),
        "worker_start_s": measurement.worker_start_s,
        "costs": {
            f"{backbone} {depth}": dataclasses.asdict(cost)
            for (backbone, depth), cost in measurement.costs.items()
        },
    }
    with contextlib.suppress(OSError):  # then it is measured again
        _path().parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(_path(), json.dumps(known, indent=1).encode())


def _path() -> Path:
    return default_cache_dir() / "measurements.json"


def _known() -> dict[str, Any]:
    """Return what is kept and not too old; nothing if the file is damaged."""
    now_s = time.time()
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, AttributeError):
        return {
            key: found
            for key, found in json.loads(_path().read_bytes()).items()
            if 0 <= now_s - found["measured_at_s"] <= KEPT_S
        }
    return {}


def _key(run: Run, whole: Mapping[str, float]) -> str:
    """Return what two sweeps have in common whose trials take the same."""
    sweep = run.sweep
    device = name_of_device(torch.device("cuda" if run.on_gpu else "cpu"))
    setting = {
        "machine": [platform.node(), os.cpu_count(), torch.cuda.device_count(), device, whole],
        "code": [torch.__version__, source_digest()],
        "disk": _disk(sweep),
        "kinds": kinds_of(sweep),
        "precisions": run.precisions,
        "images": [len(run.manifest.rows(split)) for split in ("train", "val")],
        "image_size_px": sweep.data.image_size_px,
        "batch_size": sweep.params.batch_size,
        "head": [len(run.manifest.classes), sweep.data.class_balance],
        "views": [dataclasses.asdict(sweep.augmentation), sweep.params.augmentation_strength],
        "features": [are_views_shared(sweep), sweep.resources.feature_cache_gib],
    }
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()


def _disk(sweep: Sweep) -> str:
    """Return what tells apart the disks, or servers, that checkpoints are written to."""
    if isinstance(sweep.files, LocalFiles):
        return str(sweep.files.folder.stat().st_dev)
    return sweep.storage
