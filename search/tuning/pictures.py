"""What can be seen of the trials that are kept, in their TensorBoard runs.

Drawn by the driver when the last trial has ended: only then is it known which are kept, and no
trial is slowed down by it. On a GPU if the driver has one.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from lightning_modules.bundled_network import BundledNetwork
from lightning_modules.calibration import softmax
from lightning_modules.classifier import ImageClassifier
from lightning_modules.data.datamodule import VAL_BATCH_SIZE, PackDataModule, Steps
from lightning_modules.explain import enlarge, grad_cam
from search.bundles.export import load_trial
from search.explanation.gallery import draw_overlay
from search.results import with_checkpoint
from search.study.record import Record
from search.study.recorded import Epoch, Trial
from search.tuning.figures import draw_confusion, draw_pairs, draw_reliability, tile
from search.tuning.trial import Run, feature_cache_of
from search.tuning.trial_board import CONFUSION_TAG

MAX_MISTAKES = 8
NUM_VIEWS = 16

# Validation images that are looked through for mistakes, evenly spaced. The confusion matrix is
# the record's, of all of them.
MAX_IMAGES = 512

# 16 views of this side take at most 100 KiB as PNG: a run stays below 1 MB at any image size.
MAX_VIEW_PX = 80

# Marks the event files that are written here, to be found again.
FILE_SUFFIX = ".pictures"


def draw_kept(record: Record, run: Run, tell: Callable[[str], None]) -> None:
    """Draw every trial that kept its checkpoint, and take the pictures of others away.

    Nothing is drawn before every trial has ended. What cannot be drawn is told, and no harm done.

    Args:
        record: The sweep's.
        run: What its trials shared.
        tell: Given a line for the user.
    """
    trials = record.trials()
    if any(trial.state == "running" for trial in trials):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = record.sweep.files
    drawn: dict[str, list[str]] = {}
    try:
        kept = with_checkpoint(trials, record.sweep)
        for name in files.names("tensorboard"):
            if name.endswith(FILE_SUFFIX):
                drawn.setdefault(name.split("/")[1], []).append(name)
    except OSError as error:
        tell(f"pictures left out: {error}")
        return
    if kept:
        tell(f"draws   {len(kept)} kept trials for TensorBoard: mistakes, Grad-CAM, reliability")
    for trial in trials:
        is_drawn = trial.name in drawn
        try:
            if is_drawn and trial not in kept:
                files.remove(drawn[trial.name])
            elif trial in kept and not is_drawn:
                _draw(record, trial, run, device)
        except Exception as error:  # the sweep has ended well: pictures must not change that
            reason = (str(error).splitlines() or [""])[0]
            tell(f"pictures of trial {trial.number:05d} left out: {type(error).__name__}: {reason}")


def worst_mistakes(
    probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64], num_most: int
) -> list[int]:
    """Return the misclassified images, the most confident first."""
    by_confidence = np.argsort(-probabilities.max(axis=1), kind="stable")
    wrong = probabilities.argmax(axis=1) != labels
    return [int(index) for index in by_confidence if wrong[index]][:num_most]


def _draw(record: Record, trial: Trial, run: Run, device: torch.device) -> None:
    sweep = record.sweep
    best = trial.best_epoch(sweep.metric, sweep.mode)
    assert best is not None  # noqa: S101  it has a checkpoint; narrows the type
    module = load_trial(record, trial, run.manifest).to(device)
    with tempfile.TemporaryDirectory(prefix="neurosweep-pictures-") as folder:
        with SummaryWriter(folder, filename_suffix=FILE_SUFFIX) as writer:
            _add_validation(writer, best, module, run)
            for epoch in sorted({1, (1 + best.epoch) // 2, best.epoch}):
                views = _views(module, run, epoch)
                writer.add_image("pictures/augmented training images", views, epoch)
        for path in Path(folder).iterdir():
            sweep.files.write(f"tensorboard/{trial.name}/{path.name}", path.read_bytes())


def _add_validation(writer: SummaryWriter, best: Epoch, module: ImageClassifier, run: Run) -> None:
    """Add what the network makes of the validation images."""
    classes, step = run.manifest.classes, best.epoch
    writer.add_image(CONFUSION_TAG, draw_confusion(np.asarray(best.confusion), classes), step)
    rows = run.manifest.rows("val")
    rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), MAX_IMAGES)).astype(int)]
    images = np.asarray(run.pack.images()[rows])
    labels = run.manifest.labels()[rows]
    probabilities = softmax(_logits(rows, module, run).numpy())
    writer.add_image("pictures/reliability", draw_reliability(probabilities, labels), step)
    wrong = worst_mistakes(probabilities, labels, MAX_MISTAKES)
    if not wrong:
        return
    decided = probabilities[wrong].argmax(axis=1)
    maps = grad_cam(
        BundledNetwork(module.backbone, module.head).to(module.device),
        _intensities(torch.from_numpy(images[wrong]), module),
        torch.from_numpy(decided).to(module.device),
    )
    values = enlarge(maps.float(), run.pack.image_size_px).cpu().numpy()
    overlays = [draw_overlay(image, v) for image, v in zip(images[wrong], values, strict=True)]
    captions = [
        f"{classes[labels[index]]}, taken for {classes[guess]} {probabilities[index, guess]:.2f}"
        for index, guess in zip(wrong, decided, strict=True)
    ]
    sheet = draw_pairs(images[wrong], overlays, captions)
    writer.add_image("pictures/misclassified beside Grad-CAM", sheet, step)


def _logits(rows: npt.NDArray[np.int64], module: ImageClassifier, run: Run) -> Tensor:
    """Return the logits of validation images.

    On a CPU from the frozen stages' features if the trials have stored them; a GPU computes anew.

    Args:
        rows: The images' row numbers.
        module: The trial's, at its best epoch.
        run: What the trials shared.
    """
    backbone = module.backbone.name
    precision = run.precisions[backbone]
    data = PackDataModule(run.manifest, run.pack, batch_size=VAL_BATCH_SIZE, seed=0)
    # As it was trained; on a device of another kind in float32, which each of them computes fast.
    is_alike = run.on_gpu == (module.device.type == "cuda")
    is_bf16 = is_alike and precision == "bf16-mixed"
    if is_alike:
        data.features_of = feature_cache_of(run, module, data).stored
    batches = torch.from_numpy(rows).split(VAL_BATCH_SIZE)
    with (
        torch.inference_mode(),
        torch.autocast(module.device.type, torch.bfloat16, enabled=is_bf16),
    ):
        steps = Steps(batches, split="val", epoch=0, data=data)
        logits = [module.score(move_data_to_device(batch, module.device)) for batch in steps]
    return torch.cat(logits).cpu()


def _intensities(images: Tensor, module: ImageClassifier) -> Tensor:
    return images.unsqueeze(1).to(module.device).float() / 255


def _views(module: ImageClassifier, run: Run, epoch: int) -> npt.NDArray[np.uint8]:
    """Return what some training images looked like to the network in an epoch, from 1."""
    rows = run.manifest.rows("train")[:NUM_VIEWS]
    images = torch.from_numpy(np.asarray(run.pack.images()[rows])).unsqueeze(1).to(module.device)
    samples = torch.from_numpy(rows).to(module.device)
    views = module.views(images, epoch=epoch - 1, samples=samples).float()
    if views.shape[-1] > MAX_VIEW_PX:
        views = F.interpolate(views, (MAX_VIEW_PX, MAX_VIEW_PX), mode="area")
    return tile(views)
