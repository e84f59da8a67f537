"""What a bundle says of the sweep, the trial, and the data it came from: its ``config.json``.

No folder, host, group, or address of whoever ran the sweep gets into it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import pandas as pd

from lightning_modules.bundle import FORMAT, USE
from lightning_modules.data.manifest import SPLITS, Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.weights import IMAGENET_MEAN, IMAGENET_STD
from search.shareable import count_images, numbers_of, settings_of, weights_of
from search.study.record import Record
from search.study.recorded import Trial

EXPORTED_WITH = ("torch", "onnx", "onnxscript", "onnxruntime", "safetensors", "numpy", "pillow")

Chosen = Literal["best", "confirmed", "by hand", "greedy", "grid", "soup"]


def describe_trial(
    record: Record, trial: Trial, manifest: Manifest, pack: Pack, *, chosen: Chosen
) -> dict[str, Any]:
    """Return what there is to know of a trial, as JSON can hold it.

    Args:
        record: The sweep's.
        trial: Which.
        manifest: Its images, with their splits.
        pack: Its images, decoded.
        chosen: How: by the metric, by a confirmation with fresh seeds, by its number, or as the
            best of several that were put together.
    """
    sweep, facts = record.sweep, record.facts
    best = trial.best_epoch(sweep.metric, sweep.mode)
    trials = record.trials()
    described = {
        "format": FORMAT,
        "use": USE,
        "leakage": numbers_of(facts.get("leakage") or {}),
        "backbone": trial.params.backbone,
        "classes": list(manifest.classes),
        "input": {
            "image_size_px": sweep.data.image_size_px,
            "channels": "grey (ITU-R 601 luminance), float32 in [0, 1], shape (B, 1, H, W)",
            "preparation": "deeper than 8 bits: linear from the 0.5th to the 99.5th percentile; "
            "padded with black to a square, resized bilinearly with antialiasing",
            "normalisation": {
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "where": "inside model.onnx and model.pt2; to be done before torchvision's "
                "network, the grey channel repeated, when model.safetensors is used",
            },
        },
        "trial": {
            "sweep": sweep.name,
            "number": trial.number,
            "seed": trial.seed,
            "params": dataclasses.asdict(trial.params),
            "epoch": None if best is None else best.epoch,
            "epochs_run": len(trial.epochs),
        },
        "metric": {
            "name": sweep.metric,
            "value": None if best is None else best.metrics[sweep.metric],
            "split": "val",
            "all": {} if best is None else best.metrics,
            "confusion": [] if best is None else best.confusion,
            "num_trials": len(trials),
        },
        "search": {
            "space": {name: dataclasses.asdict(domain) for name, domain in sweep.space.items()},
            "sampler": sweep.search.sampler,
            "scheduler": None if sweep.scheduler is None else dataclasses.asdict(sweep.scheduler),
            "seed": sweep.seed,
            "max_epochs": sweep.training.max_epochs,
            "num_trials": len(trials),
            "num_epochs": sum(len(other.epochs) for other in trials),
            "states": dict(
                sorted(pd.Series([other.state for other in trials]).value_counts().items())
            ),
            "chosen": chosen,
            "confirmation": facts.get("confirmation"),
        },
        "weights": weights_of(facts["weights"][trial.params.backbone]),
        "data": _describe_data(manifest, pack, facts),
        "settings": settings_of(sweep),
        "versions": {
            **facts["versions"],
            "exported_with": {name: version(name) for name in EXPORTED_WITH},
        },
    }
    # numpy's numbers, tuples
    plain: dict[str, Any] = json.loads(json.dumps(described, default=int))
    return plain


def _describe_data(manifest: Manifest, pack: Pack, facts: Mapping[str, Any]) -> dict[str, Any]:
    frame = manifest.frame
    counts = count_images(frame)
    splits = json.dumps([frame["path"].tolist(), frame["split"].tolist()]).encode()
    return {
        "manifest_digest": manifest.digest,
        "split_digest": hashlib.sha256(splits).hexdigest(),
        "pack_digest": pack.digest,
        "images": {split: counts[split]["images"] for split in SPLITS},
        "groups": {split: counts[split]["groups"] for split in SPLITS},
        "classes": {str(name): count_images(part) for name, part in frame.groupby("label")},
        "sources": {str(name): count_images(part) for name, part in frame.groupby("source")},
        "classes_by_source": {
            str(label): {str(source): len(part) for source, part in of_label.groupby("source")}
            for label, of_label in frame.groupby("label")
        },
        "every_image_is_a_group": frame["group_id"].nunique() == len(frame),
        "skipped_images": len(facts["skipped_images"]),
    }
