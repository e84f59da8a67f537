"""Several of a sweep's trials as one bundle: their probabilities mixed, or their weights averaged.

What counts how much is chosen on validation images, so it flatters there: `evaluate` the bundle
once, with the best single trial's as its baseline.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from lightning_modules.calibration import softmax
from lightning_modules.classifier import ImageClassifier
from lightning_modules.errors import InputError
from lightning_modules.network_files import module_logits
from search.bundles.config import describe_trial
from search.bundles.ensemble_weights import Score, greedy_weights, grid_weights
from search.bundles.export import Parity, load_trial, write_bundle
from search.data import check_same_data, prepare_data
from search.results import rank, score, with_checkpoint
from search.shareable import weights_of
from search.study.record import Record
from search.study.recorded import Trial

Method = Literal["greedy", "grid", "soup"]
Floats = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ensemble:
    """What came of several trials.

    Attributes:
        weights: What each trial counts, by number; those that count nothing left out.
        value: The sweep's metric on validation images.
        best_single: The same of the best trial alone.
        best_number: Which that is.
        parity: Of the bundle; none if nothing was written, as it is no better than one trial.
    """

    weights: dict[int, float]
    value: float
    best_single: float
    best_number: int
    parity: Parity | None


def ensemble_sweep(record: Record, out: Path, *, top: int, method: Method) -> Ensemble:
    """Write an ensemble of the best trials as a bundle, if it is better than the best alone.

    Args:
        record: The sweep's.
        out: A folder that does not exist yet.
        top: How many trials to choose from, of those that kept their checkpoints.
        method: ``greedy`` and ``grid`` mix probabilities; ``soup`` averages the weights of trials
            that share backbone and depth.

    Raises:
        InputError: If fewer than two trials kept a checkpoint that goes with another's.
    """
    sweep = record.sweep
    manifest, pack = prepare_data(sweep)
    check_same_data(record.facts, manifest, pack)
    trials = _candidates(record, top)
    modules = {trial.number: load_trial(record, trial, manifest) for trial in trials}
    images = np.asarray(pack.images()[manifest.rows("val")])
    labels = manifest.labels()[manifest.rows("val")]
    score_of = scorer(sweep.metric, labels, len(manifest.classes))

    def probabilities_of(module: ImageClassifier) -> Floats:
        return softmax(module_logits([(1.0, module)], images))

    alone = {number: probabilities_of(module) for number, module in modules.items()}
    scores = {number: score_of(probabilities) for number, probabilities in alone.items()}
    best_number = max(scores, key=scores.__getitem__)
    best_single = scores[best_number]
    if method == "soup":
        numbers, members, value = _soup(trials, modules, alone, score_of, probabilities_of)
        weights = dict.fromkeys(numbers, 1 / len(numbers))
    else:
        choose = greedy_weights if method == "greedy" else grid_weights
        found = choose(np.stack(list(alone.values())), score_of)
        weights = {n: float(w) for n, w in zip(alone, found, strict=True) if w > 0}
        members = [(weight, modules[number]) for number, weight in weights.items()]
        value = score_of(sum_of(weights, alone))
    sign = 1.0 if sweep.mode == "max" else -1.0
    result = Ensemble(weights, sign * value, sign * best_single, best_number, None)
    if len(weights) == 1 or value <= best_single:
        return result
    first = next(trial for trial in trials if trial.number in weights)
    config = describe_trial(record, first, manifest, pack, chosen=method)
    config["members"] = [
        {
            "number": trial.number,
            "weight": weights[trial.number],
            "params": dataclasses.asdict(trial.params),
            "weights": weights_of(record.facts["weights"][trial.params.backbone]),
        }
        for trial in trials
        if trial.number in weights
    ]
    config["search"]["ensemble_top"] = top
    if len(members) > 1:
        config["backbone"] = "ensemble"
    metric = config["metric"]
    metric |= {"value": result.value, "all": {sweep.metric: result.value}, "confusion": []}
    parity = write_bundle(members, config, out, manifest=manifest, pack=pack)
    return dataclasses.replace(result, parity=parity)


def scorer(metric: str, labels: Labels, num_classes: int) -> Score:
    """Return how probabilities are scored: the sweep's metric, turned so that higher is better."""
    from sklearn.metrics import f1_score

    rows = np.arange(len(labels))

    def macro_f1(probabilities: Floats) -> float:
        answers = probabilities.argmax(axis=1)
        classes = range(num_classes)
        return float(f1_score(labels, answers, average="macro", labels=classes, zero_division=0))

    def accuracy(probabilities: Floats) -> float:
        return float((probabilities.argmax(axis=1) == labels).mean())

    def minus_loss(probabilities: Floats) -> float:
        return float(np.log(np.maximum(probabilities[rows, labels], 1e-30)).mean())

    return {"val_macro_f1": macro_f1, "val_accuracy": accuracy, "val_loss": minus_loss}[metric]


def sum_of(weights: dict[int, float], probabilities: dict[int, Floats]) -> Floats:
    """Return mixed probabilities."""
    parts = [weight * probabilities[number] for number, weight in weights.items()]
    return functools.reduce(np.add, parts)


def average(modules: Sequence[ImageClassifier]) -> dict[str, torch.Tensor]:
    """Return the mean of classifiers' tensors, BatchNorm's statistics included.

    Whole numbers, which count batches, are the first one's.
    """
    states = [module.state_dict() for module in modules]
    return {
        name: torch.stack([state[name] for state in states]).mean(dim=0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in states[0].items()
    }


def _soup(
    trials: list[Trial],
    modules: dict[int, ImageClassifier],
    alone: dict[int, Floats],
    score_of: Score,
    probabilities_of: Callable[[ImageClassifier], Floats],
) -> tuple[list[int], list[tuple[float, ImageClassifier]], float]:
    """Average weights greedily, best trial first, keeping each only if validation improves.

    Wortsman et al., "Model soups", 2022, https://arxiv.org/abs/2203.05482, recipe 1. Of the kinds
    of network (backbone and depth), the one with the best soup is taken.
    """
    kinds: dict[tuple[str, int], list[Trial]] = {}
    for trial in trials:
        kinds.setdefault((trial.params.backbone, trial.params.unfreeze_depth), []).append(trial)
    if all(len(alike) == 1 for alike in kinds.values()):
        raise InputError(
            "a soup needs two trials of one backbone and depth that kept their checkpoints; no two "
            f"of the best {len(trials)} are: mix probabilities with `--method greedy`"
        )
    soups = []
    for alike in kinds.values():
        ordered = sorted(alike, key=lambda trial: -score_of(alone[trial.number]))
        numbers, value = [ordered[0].number], score_of(alone[ordered[0].number])
        soup = modules[ordered[0].number]
        for trial in ordered[1:]:
            tried = [*numbers, trial.number]
            mixed = _copy_of(modules[tried[0]], average([modules[n] for n in tried]))
            mixed_value = score_of(probabilities_of(mixed))
            if mixed_value > value:
                numbers, soup, value = tried, mixed, mixed_value
        soups.append((value, numbers, soup))
    value, numbers, soup = max(soups, key=lambda found: found[0])
    return numbers, [(1.0, soup)], value


def _copy_of(module: ImageClassifier, state: dict[str, torch.Tensor]) -> ImageClassifier:
    copy = ImageClassifier(**module.hparams)
    copy.load_state_dict(state)
    return copy.eval()


def _candidates(record: Record, top: int) -> list[Trial]:
    """Return the best trials that kept their checkpoints."""
    sweep = record.sweep
    measured = [t for t in rank(record.trials(), sweep) if score(t, sweep) > -math.inf]
    kept = with_checkpoint(measured, sweep)
    if len(kept) < 2:
        raise InputError(
            f"an ensemble needs two trials that kept their checkpoints; {len(kept)} of "
            f"{sweep.name} did: launch it with a larger search.keep_trials"
        )
    return kept[:top]
