"""Bundles and files of weights to be fuzzed."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.numpy
import torch
from fuzz_mutation import Target, by_bytes, by_header, by_values, either, to_json
from onnx import TensorProto, helper

from lightning_modules.bundle import MODEL_FILES, load_bundle
from lightning_modules.state_dicts import read_state_dict
from search.card.model_card import write_card
from search.evaluation.log import read_log

SIDE_PX = 16


def _pixels(*shape: int, dtype: Any = np.uint8) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape).astype(dtype)


# Bundles


def _onnx_model() -> bytes:
    nodes = [
        helper.make_node("Conv", ["intensities", "kernel"], ["maps"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("GlobalAveragePool", ["positive"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["features"]),
        helper.make_node("Gemm", ["features", "weight", "bias"], ["logits"]),
    ]
    shape = ["batch", 1, SIDE_PX, SIDE_PX]
    graph = helper.make_graph(
        nodes,
        "bundle",
        [helper.make_tensor_value_info("intensities", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            helper.make_tensor("kernel", TensorProto.FLOAT, [2, 1, 3, 3], [0.1] * 18),
            helper.make_tensor("weight", TensorProto.FLOAT, [2, 2], [1.0, -1.0, 0.5, 0.25]),
            helper.make_tensor("bias", TensorProto.FLOAT, [2], [-2.0, 2.0]),
        ],
    )
    opsets = [helper.make_opsetid("", 17)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return model.SerializeToString()


def _tensors() -> bytes:
    return safetensors.numpy.save(
        {"conv1.weight": np.zeros((2, 3), np.float32), "fc.bias": np.zeros(2, np.float16)}
    )


def _write_bundle(folder: Path, config: bytes | None = None, **models: bytes) -> None:
    """Write a bundle whose digests are right."""
    files = {"onnx": _MODEL, "pt2": b"unused", "safetensors": _TENSORS} | models
    for name in MODEL_FILES:
        (folder / name).write_bytes(files[name.removeprefix("model.")])
    if config is None:
        digests = {
            name: hashlib.sha256(files[name.removeprefix("model.")]).hexdigest()
            for name in MODEL_FILES
        }
        config = to_json(_CONFIG | {"digests": digests})
    (folder / "config.json").write_bytes(config)


_MODEL, _TENSORS = _onnx_model(), _tensors()
_COUNTS = {"train": {"images": 5, "groups": 2}, "val": {"images": 2, "groups": 1}}
_CONFIG: dict[str, Any] = {
    "format": 2,
    "classes": ["a", "b"],
    "input": {"image_size_px": SIDE_PX},
    "temperature": 1.5,
    "digests": {
        name: hashlib.sha256(data).hexdigest()
        for name, data in zip(MODEL_FILES, (_MODEL, b"unused", _TENSORS), strict=True)
    },
    "backbone": "resnet50",
    "leakage": {"pictures": 1, "images": 2},
    "trial": {
        "sweep": "s",
        "number": 3,
        "seed": 1,
        "epoch": 2,
        "epochs_run": 3,
        "params": {"lr": 0.1, "backbone": "resnet50"},
    },
    "metric": {
        "name": "val_macro_f1",
        "value": 0.5,
        "all": {"val_loss": 1.0},
        "confusion": [[1, 2], [3, 4]],
    },
    "search": {
        "space": {"lr": {"low": 0.1, "high": 1.0, "log": True}, "dropout": {"choices": [0]}},
        "sampler": "gp",
        "scheduler": {"grace_period_epochs": 1, "reduction_factor": 3},
        "seed": 0,
        "states": {"complete": 2},
        "num_trials": 2,
        "chosen": "confirmed",
        "confirmation": {"num_seeds": 3, "candidates": [{"number": 3, "mean": 0.5}]},
    },
    "members": [{"number": 3, "weight": 0.5, "params": {"lr": 0.1}}],
    "weights": {"origin": "imagenet", "path": "w.pth", "num_matched": 3, "licence": "MIT"},
    "data": {
        "images": {"train": 5},
        "groups": {"train": 2},
        "classes": {"a": _COUNTS},
        "sources": {"s": _COUNTS},
        "classes_by_source": {"a": {"s": 5}},
        "skipped_images": 0,
    },
    "settings": {"name": "s", "data": {"path": "images"}},
    "parity": {"differences": {"model.onnx": 0.1}},
    "calibration": {"num_images": 3, "nll_before": 1.0, "nll_after": 0.5},
    "versions": {"torch": "2.15", "exported_with": {"onnx": "1"}},
    "cost": {"latency_ms": 1.5},
}


def _configs(folder: Path) -> list[bytes]:
    _write_bundle(folder)
    return [to_json(_CONFIG)]


def _read_config(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    write_card(folder)
    load_bundle(folder).predict(_pixels(2, SIDE_PX, SIDE_PX))


_FIGURE = {"value": 0.5, "low": 0.4, "high": 0.6}
_RESULTS: dict[str, Any] = {
    "evaluations.json": [
        {
            "date": "2026-11-22",
            "as": "evaluated",
            "run": 2,
            "manifest_digest": "ab",
            "figures": {"num_images": 3, "macro_f1": _FIGURE, "per_class": {"a": {"f1": _FIGURE}}},
            "external": {"figures": {"macro_f1": _FIGURE}},
        }
    ],
    "explanation/explanation.json": {
        "tests": {"num_images": 2, "grad_cam": {"deletion": {"area": 0.1}}},
        "pointing_game": {"num_images": 2, "grad_cam": {"share": _FIGURE}},
        "images": [{"files": {"grad_cam": {"overlay": "0-grad_cam.png"}}}],
    },
}


def _results(folder: Path) -> list[bytes]:
    _write_bundle(folder)
    (folder / "explanation").mkdir()
    return [to_json(_RESULTS)]


def _read_results(data: bytes, folder: Path) -> None:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = {}
    for name, content in _RESULTS.items():
        changed = found.get(name, content) if isinstance(found, dict) else found
        (folder / name).write_bytes(to_json(changed))
    write_card(folder)
    read_log(folder)


def _read_onnx(data: bytes, folder: Path) -> None:
    _write_bundle(folder, onnx=data)
    load_bundle(folder).logits(_pixels(2, SIDE_PX, SIDE_PX))


def _read_tensors(data: bytes, folder: Path) -> None:
    path = folder / "w.safetensors"
    path.write_bytes(data)
    _write_bundle(folder, safetensors=data)
    load_bundle(folder)
    read_state_dict(path)


# Checkpoints


def _checkpoints(folder: Path) -> list[bytes]:
    state = {"conv1.weight": torch.zeros(2, 3), "fc.bias": torch.ones(2, dtype=torch.float16)}
    found = []
    for content in (state, {"state_dict": state, "epoch": 3, "hyper_parameters": {"lr": 0.1}}):
        for is_new in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=is_new)
            found.append(file.getvalue())
    return found


def _read_checkpoint(data: bytes, folder: Path) -> None:
    path = folder / "w.pth"
    path.write_bytes(data)
    read_state_dict(path)


TARGETS = {
    "config": Target(
        inputs=6_000, prepare=_configs, change=either(by_bytes, by_values), read=_read_config
    ),
    "results": Target(
        inputs=3_000, prepare=_results, change=either(by_bytes, by_values), read=_read_results
    ),
    "onnx": Target(inputs=5_000, prepare=lambda folder: [_MODEL], change=by_bytes, read=_read_onnx),
    "safetensors": Target(
        inputs=5_000,
        prepare=lambda folder: [_TENSORS],
        change=either(by_bytes, by_header),
        read=_read_tensors,
    ),
    "checkpoint": Target(
        inputs=8_000, prepare=_checkpoints, change=by_bytes, read=_read_checkpoint
    ),
}
