"""The best checkpoint as a bundle, proven to be the model that was ranked."""

import dataclasses
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_modules.bundle import CONFIG_FILE, FORMAT, Bundle, load_bundle
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.files import sha256_of
from lightning_modules.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    WeightOrigin,
    to_torchvision,
)
from search.checkpoint import AtomicCheckpointIO
from search.checkpoint_files import is_whole
from search.data import check_same_data, prepare_data
from search.record import Record
from search.recorded import Epoch, Trial
from search.results import best_trial
from search.trial import build_module

# The largest difference of a logit between the module and its ONNX model.
TOLERANCE = 1e-3

MAX_PARITY_IMAGES = 256


@dataclass(frozen=True)
class Parity:
    """How far the exported model is from the trained one.

    Attributes:
        num_images: Validation images compared on.
        largest_difference: Of any logit of any of them.
    """

    num_images: int
    largest_difference: float


class Network(nn.Module):
    """What is exported: from grey intensities to logits, normalisation included.

    Args:
        module: The trained classifier.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: ImageClassifier) -> None:
        super().__init__()
        self.backbone = module.backbone
        self.head = module.head
        self.register_buffer("mean", module.mean)
        self.register_buffer("std", module.std)

    def forward(self, intensities: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of ``(B, 1, H, W)`` grey intensities in [0, 1]."""
        logits: Tensor = self.head(self.backbone((intensities - self.mean) / self.std))
        return logits


def export_trial(record: Record, out: Path, *, trial_number: int | None) -> Parity:
    """Write a trial's best epoch as a bundle, if its ONNX model proves equal to the module.

    Args:
        record: The sweep's.
        out: A folder that does not exist yet; it appears whole or not at all.
        trial_number: Which trial; the best that finished if none.

    Returns:
        How well the two agree on validation images.

    Raises:
        InputError: If there is no such checkpoint, or the models differ by more than ``TOLERANCE``.
    """
    sweep = record.sweep
    trial = best_trial(record) if trial_number is None else _trial(record, trial_number)
    best = trial.best_epoch(sweep.metric, sweep.mode)
    manifest, pack = prepare_data(sweep)
    check_same_data(record.facts, manifest, pack)
    module = load_trial(record, trial, manifest)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        state = to_torchvision(module.backbone, module.head)
        safetensors.torch.save_file(
            {name: tensor.contiguous() for name, tensor in state.items()},
            folder / "model.safetensors",
        )
        _write_onnx(Network(module).eval(), sweep.data.image_size_px, folder / "model.onnx")
        config = _describe(record, trial, best, manifest, pack)
        config["digests"] = {
            name: sha256_of(folder / name) for name in ("model.onnx", "model.safetensors")
        }
        _write_json(config, folder / CONFIG_FILE)
        parity = compare(module, load_bundle(folder), manifest, pack)
        if not parity.largest_difference <= TOLERANCE:
            raise InputError(
                f"an exported model must equal the trained one within {TOLERANCE}; logits differ "
                f"by {parity.largest_difference:.2e}: nothing was written"
            )
        config["parity"] = dataclasses.asdict(parity)
        _write_json(config, folder / CONFIG_FILE)
        # Temporary folders and safetensors' files are their owner's alone.
        folder.chmod(0o755)
        for path in folder.iterdir():
            path.chmod(0o644)
        if out.is_dir():
            out.rmdir()
        shutil.move(folder, out)
    return parity


def load_trial(record: Record, trial: Trial, manifest: Manifest) -> ImageClassifier:
    """Rebuild a trial's module at its best epoch, in eval mode.

    Raises:
        InputError: If the trial kept no checkpoint, or the file is not the one recorded.
    """
    sweep = record.sweep
    checkpoint = trial.epochs[-1].best if trial.epochs else None
    if checkpoint is None or not (sweep.folder / checkpoint.path).is_file():
        raise InputError(
            f"a trial must have kept its checkpoint to be exported; {trial.number} has none: only "
            f"the best {sweep.search.keep_trials} do (search.keep_trials)"
        )
    if not is_whole(sweep.folder, checkpoint):
        raise InputError(
            f"a checkpoint must be the one that was recorded; {sweep.folder / checkpoint.path} is "
            "torn or changed: export another trial with `--trial`"
        )
    weights = {name: WeightOrigin(**fact) for name, fact in record.facts["weights"].items()}
    module = build_module(
        trial.params, sweep=sweep, manifest=manifest, weights=weights, seed=trial.seed
    )
    loaded = AtomicCheckpointIO().load_checkpoint(sweep.folder / checkpoint.path)
    module.on_load_checkpoint(loaded)
    module.load_state_dict(loaded["state_dict"])
    return module.eval()


def compare(module: ImageClassifier, bundle: Bundle, manifest: Manifest, pack: Pack) -> Parity:
    """Compare the logits of the module and of its ONNX model on validation images."""
    rows = manifest.rows("val")[:MAX_PARITY_IMAGES]
    images = np.asarray(pack.images()[rows])
    batches = torch.from_numpy(images).unsqueeze(1).split(32)
    with torch.inference_mode():
        ours = torch.cat([module(batch.to(torch.float32) / 255) for batch in batches]).numpy()
    theirs = bundle.logits(images)
    return Parity(num_images=len(rows), largest_difference=float(np.abs(ours - theirs).max()))


def _trial(record: Record, number: int) -> Trial:
    trials = record.trials()
    for trial in trials:
        if trial.number == number:
            return trial
    raise InputError(f"--trial must be a trial of the sweep, 0 to {len(trials) - 1}; got {number}")


def _write_onnx(network: Network, image_size_px: int, path: Path) -> None:
    example = torch.zeros(2, 1, image_size_px, image_size_px)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations; parity is checked
        program = torch.onnx.export(
            network,
            (example,),
            dynamo=True,
            verbose=False,
            input_names=["intensities"],
            output_names=["logits"],
            dynamic_shapes={"intensities": {0: torch.export.Dim("batch")}},
        )
        # By default the weights would go into a second file.
        assert program is not None  # noqa: S101  it is with dynamo=True; narrows the type
        program.save(path, external_data=False)


def _describe(
    record: Record, trial: Trial, best: Epoch | None, manifest: Manifest, pack: Pack
) -> dict[str, Any]:
    sweep, facts = record.sweep, record.facts
    counts = {split: len(manifest.rows(split)) for split in ("train", "val", "test")}
    return {
        "format": FORMAT,
        "use": "Research only. Not a medical device.",
        "backbone": trial.params.backbone,
        "classes": list(manifest.classes),
        "input": {
            "image_size_px": sweep.data.image_size_px,
            "channels": "grey (ITU-R 601 luminance), float32 in [0, 1], shape (B, 1, H, W)",
            "preparation": "padded with black to a square, resized bilinearly with antialiasing",
            "normalisation": {
                "mean": list(IMAGENET_MEAN),
                "std": list(IMAGENET_STD),
                "where": "inside model.onnx; to be done before torchvision's network, the grey "
                "channel repeated, when model.safetensors is used",
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
            "num_trials": len(record.trials()),
        },
        "weights": _weights_of(facts["weights"][trial.params.backbone]),
        "data": {
            "manifest_digest": manifest.digest,
            "pack_digest": pack.digest,
            "images": counts,
            "skipped_images": len(facts["skipped_images"]),
        },
        "versions": facts["versions"],
    }


def _weights_of(fact: dict[str, Any]) -> dict[str, Any]:
    """Return where the initial weights came from, without the folders of whoever ran the sweep."""
    return {**fact, "origin": Path(fact["origin"]).name, "path": Path(fact["path"] or "").name}


def _write_json(config: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
