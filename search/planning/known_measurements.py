"""What was measured on this machine lately: a launch after a plan measures nothing again."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_modules.data.pack import default_cache_dir
from lightning_modules.files import write_atomically
from lightning_modules.step_cost import name_of_device
from search.planning.kind_cost import Kind, KindCost
from search.planning.measurement import Measurement, kinds_of
from search.study.sweep_files import LocalFiles
from search.sweep import Sweep
from search.tuning.resources import max_concurrent
from search.tuning.survey import source_digest, versions
from search.tuning.trial import Run, are_views_shared

# What else runs on a machine changes, and its speed with it; `plan` always measures anew.
KEPT_S = 7 * 24 * 3600.0


def recall(run: Run, whole: Mapping[str, float]) -> Measurement | None:
    """Return what was measured on this machine for such trials, within a week; none if nothing was.

    Nothing is known of trials on GPUs.

    Args:
        run: What trials share.
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
    """
    found = _known().get(_key(run, whole))
    try:
        return _read(found, kinds_of(run.sweep))
    except (LookupError, TypeError, ValueError, OverflowError):
        return None  # nothing, or nothing that can be read: it is measured again


def remember(run: Run, whole: Mapping[str, float], measurement: Measurement) -> None:
    """Keep what was just measured on this machine; what is older than a week is dropped.

    Args:
        run: What trials share.
        whole: ``cpu`` and ``gpu`` of a trial that shares no GPU.
        measurement: Of all their kinds.
    """
    key = _key(run, whole)
    if not key:
        return
    known = _known()
    known[key] = {
        "measured_at_s": time.time(),
        "worker_start_s": measurement.worker_start_s,
        "costs": {
            _name(kind): dataclasses.asdict(cost) for kind, cost in measurement.costs.items()
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
    try:
        return {
            key: found
            for key, found in json.loads(_path().read_bytes()).items()
            if 0 <= now_s - _number(found["measured_at_s"]) <= KEPT_S
        }
    except (OSError, LookupError, TypeError, ValueError, AttributeError, ArithmeticError):
        return {}
    except RecursionError:  # brackets in brackets
        return {}


def _read(found: Any, kinds: Sequence[Kind]) -> Measurement:
    """Read what was kept of these kinds, which a damaged file may lack, or hold nonsense of."""
    costs = {}
    for kind in kinds:
        kept = found["costs"][_name(kind)]
        numbers = {name: _number(kept[name]) for name in kept.keys() - {"is_shared"}}
        costs[kind] = KindCost(is_shared=kept["is_shared"] is True, **numbers)
    return Measurement(
        costs=costs,
        worker_start_s=_number(found["worker_start_s"]),
        age_s=max(1.0, time.time() - _number(found["measured_at_s"])),
    )


def _number(value: Any) -> Any:
    """Return a number as it is, if it can be a time or a size.

    Raises:
        ValueError: If it cannot.
        OverflowError: If no float is as large.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:
        raise ValueError
    return value


def _name(kind: Kind) -> str:
    return f"{kind[0]} {kind[1]}"


def _key(run: Run, whole: Mapping[str, float]) -> str:
    """Return what two sweeps have in common whose trials take the same; empty if nobody can say."""
    if run.on_gpu:
        return ""  # a driver that asks a GPU for its name takes of its memory
    sweep = run.sweep
    try:
        setting = {
            "machine": [platform.node(), name_of_device(torch.device("cpu"))],
            "beside": [whole, max_concurrent(whole)],
            "code": [torch.__version__, versions(), source_digest()],
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
    except OSError:
        return ""
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()


def _disk(sweep: Sweep) -> str:
    """Return what tells apart the disks, or servers, that checkpoints are written to."""
    if isinstance(sweep.files, LocalFiles):
        return str(sweep.files.folder.stat().st_dev)
    return f"{sweep.storage} {os.environ.get('AWS_ENDPOINT_URL')}"
