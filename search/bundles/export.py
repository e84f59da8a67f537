"""The best checkpoint as a bundle, proven to be the model that was ranked."""

import dataclasses
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_modules.bundle import CONFIG_FILE, MODEL_FILES, Images, Logits, load_bundle
from lightning_modules.calibration import fit_temperature, softmax
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.manifest import Manifest
from lightning_modules.data.pack import Pack
from lightning_modules.errors import InputError
from lightning_modules.files import sha256_of, write_atomically
from lightning_modules.network_cost import MEASURED_ON, cost_of_file
from lightning_modules.network_files import (
    Members,
    module_logits,
    pt2_logits,
    safetensors_logits,
    write_network,
)
from lightning_modules.state_dicts import first_line
from search.bundles.config import Chosen, describe_trial
from search.card.model_card import write_card
from search.data import check_same_data, prepare_data
from search.results import best_trial
from search.study.origins import recorded_weights
from search.study.record import Record
from search.study.recorded import Trial
from search.tuning.checkpoint import read_checkpoint
from search.tuning.shared_weights import local_weights
from search.tuning.trial import build_module

# The largest difference of a logit between the module and any of the files.
TOLERANCE = 1e-3

# A file that is wrong is wrong on every image; each is computed four times.
MAX_PARITY_IMAGES = 64

# One number is fitted on them: more would only take longer.
MAX_CALIBRATION_IMAGES = 2048


@dataclass(frozen=True)
class Parity:
    """How far the exported files are from the trained module.

    Attributes:
        num_images: Validation images compared on.
        differences: The largest of any logit of any of them, by file.
    """

    num_images: int
    differences: dict[str, float]

    @property
    def largest_difference(self) -> float:
        """The largest of all files; NaN if any is."""
        return float(np.max(list(self.differences.values())))


def export_trial(record: Record, out: Path, *, trial_number: int | None) -> Parity:
    """Write a trial's best epoch as a bundle, if all of its files prove equal to the module.

    Args:
        record: The sweep's.
        out: A folder that does not exist yet; it appears whole or not at all.
        trial_number: Which trial; if none, the confirmed winner, or else the best that finished.

    Returns:
        How well they agree on validation images.

    Raises:
        InputError: If there is no such checkpoint, or the models differ by more than ``TOLERANCE``.
    """
    trial, chosen = _choose(record, trial_number)
    manifest, pack = prepare_data(record.sweep)
    check_same_data(record.facts, manifest, pack)
    module = load_trial(record, trial, manifest)
    config = describe_trial(record, trial, manifest, pack, chosen=chosen)
    return write_bundle([(1.0, module)], config, out, manifest=manifest, pack=pack)


def write_bundle(
    members: Members, config: dict[str, Any], out: Path, *, manifest: Manifest, pack: Pack
) -> Parity:
    """Write one or several classifiers as a bundle, calibrated and compared on validation images.

    Args:
        members: On the CPU, in eval mode; several are mixed.
        config: What there is to know of it, such as `describe_trial` returns; digests,
            temperature, and parity are added.
        out: A folder that does not exist yet; it appears whole or not at all.
        manifest: Its images, with the splits it was trained on.
        pack: Its images, decoded.

    Returns:
        How well its files agree with the module.

    Raises:
        InputError: If they differ by more than ``TOLERANCE``.
    """
    rows = _spread(manifest.rows("val"), MAX_CALIBRATION_IMAGES)
    images = np.asarray(pack.images()[rows])
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as temporary:
        folder = Path(temporary) / "bundle"
        folder.mkdir()
        compared = _spread(np.arange(len(rows)), MAX_PARITY_IMAGES)
        ours = module_logits(members, images[compared])
        write_network(members, pack.image_size_px, folder)
        digests = {name: sha256_of(folder / name) for name in MODEL_FILES}
        config = {**config, "temperature": 1.0, "digests": digests}
        _write_json(config, folder / CONFIG_FILE)
        logits = load_bundle(folder).logits(images)
        found = {
            "model.onnx": logits[compared],
            **_torch_logits(folder, members, len(config["classes"]), images[compared]),
        }
        parity = compare(ours, found)
        labels = manifest.labels()[rows]
        config["temperature"] = fit_temperature(logits, labels)
        config["calibration"] = {
            "split": "val",
            "num_images": len(rows),
            "nll_before": _nll(logits, labels, 1.0),
            "nll_after": _nll(logits, labels, config["temperature"]),
        }
        cost = cost_of_file(folder / "model.onnx", pack.image_size_px)
        config["cost"] = {**dataclasses.asdict(cost), "measured_on": MEASURED_ON}
        config["parity"] = {
            **dataclasses.asdict(parity),
            "largest_difference": parity.largest_difference,
        }
        _write_json(config, folder / CONFIG_FILE)
        write_card(folder)
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
    loaded = None if checkpoint is None else read_checkpoint(sweep.files, checkpoint)
    if checkpoint is None or loaded is None:
        raise InputError(
            f"a trial must have kept its checkpoint to be exported; {trial.number} has none: only "
            f"the best {sweep.search.keep_trials} do (search.keep_trials)"
        )
    weights = {
        trial.params.backbone: local_weights(recorded_weights(record)[trial.params.backbone])
    }
    module = build_module(
        trial.params,
        sweep=sweep,
        manifest=manifest,
        weights=weights,
        seed=trial.seed,
        view_seed=trial.view_seed,
    )
    try:
        module.on_load_checkpoint(loaded)
        module.load_state_dict(loaded["state_dict"])
    except InputError:
        raise
    # What torch raises for states of other networks, and Python for what is no state.
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"a checkpoint must be of the trial's network; {sweep.location}/{checkpoint.path}: "
            f"{first_line(error):.200}: export another trial with `--trial`"
        ) from error
    return module.eval()


def compare(ours: Logits, found: dict[str, Logits]) -> Parity:
    """Compare the logits of the module with those of each file.

    Args:
        ours: Shape ``(B, C)``.
        found: The same, by file.

    Raises:
        InputError: If any differs by more than ``TOLERANCE``, or is not a number.
    """
    differences = {name: float(np.abs(ours - theirs).max()) for name, theirs in found.items()}
    for name, difference in differences.items():
        if not difference <= TOLERANCE:
            raise InputError(
                f"an exported model must equal the trained one within {TOLERANCE}; logits of "
                f"{name} differ by {difference:.2e}: nothing was written"
            )
    return Parity(num_images=len(ours), differences=differences)


def _torch_logits(
    folder: Path, members: Members, num_classes: int, images: Images
) -> dict[str, Logits]:
    path = folder / "model.safetensors"
    backbones = [(weight, module.backbone.name) for weight, module in members]
    return {
        "model.pt2": pt2_logits(folder / "model.pt2", images),
        "model.safetensors": safetensors_logits(path, backbones, num_classes, images),
    }


def _spread(rows: np.ndarray[Any, np.dtype[np.int64]], limit: int) -> Any:
    """Return at most so many of the rows, evenly spaced: manifests are often ordered by class."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


def _nll(logits: Logits, labels: Any, temperature: float) -> float:
    probabilities = softmax(logits, temperature)[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(probabilities, np.finfo(np.float64).tiny)).mean())


def _choose(record: Record, number: int | None) -> tuple[Trial, Chosen]:
    if number is not None:
        return _trial(record, number), "by hand"
    return best_trial(record), "confirmed" if record.facts.get("confirmation") else "best"


def _trial(record: Record, number: int) -> Trial:
    trials = record.trials()
    for trial in trials:
        if trial.number == number:
            return trial
    raise InputError(f"--trial must be a trial of the sweep, 0 to {len(trials) - 1}; got {number}")


def _write_json(config: dict[str, Any], path: Path) -> None:
    text = json.dumps(config, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())
