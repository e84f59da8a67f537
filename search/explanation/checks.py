"""How well a network's maps do: against random ones, without weights, and on known lesions."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d

from lightning_modules.attribution_tests import (
    PointingGame,
    areas,
    cascading_correlations,
    peaks,
    pointing_game,
    random_maps,
    replacement_curves,
)
from lightning_modules.bundled_mixture import Bundled
from lightning_modules.data.phantom import CLASSES, render_slice
from lightning_modules.errors import InputError
from lightning_modules.explain import (
    enlarge,
    grad_cam,
    hide,
    integrated_gradients,
)
from lightning_modules.seeds import derive_seed
from search.evaluation.data import Progress

# Images explained at a time: bounds the memory.
BATCH_SIZE = 16

METHODS = {"grad_cam": grad_cam, "integrated_gradients": integrated_gradients}


def to_intensities(images: npt.NDArray[np.uint8]) -> Tensor:
    """Return grey ``(B, 1, H, H)`` in [0, 1] of pixels ``(B, H, H)``."""
    return torch.from_numpy(images[:, None].astype(np.float32) / 255)


def run_tests(
    network: Bundled,
    untrained: Bundled,
    intensities: Tensor,
    *,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """Test the maps of the predicted classes: against random maps, and with forgotten weights.

    Args:
        network: In eval mode.
        untrained: Its like, with random weights.
        intensities: Shape ``(B, 1, H, H)``, float grey in [0, 1].
        seed: Of random maps.
        progress: Told how many batches are done.

    Returns:
        For each method mean areas and curves of deletion and insertion, beside those of random
        maps with as many cells, and the share of images where the map did better; and the mean
        rank correlation with the maps of a network whose weights are drawn anew, from the head on,
        in all members of a mixture alike.
    """
    with torch.inference_mode():
        targets = torch.cat([network(part).argmax(1) for part in intensities.split(BATCH_SIZE)])
    num_stages = len(network.members[0].backbone.stages)
    steps: dict[str, Callable[[Bundled], list[nn.Module]]] = {"head": _heads}
    for number in range(num_stages, 0, -1):
        steps[f"stage {number}"] = functools.partial(_stages, index=number - 1)
    curves: dict[str, dict[str, list[Tensor]]] = {}
    forgotten: dict[str, dict[str, list[Any]]] = {}
    starts = range(0, len(intensities), BATCH_SIZE)
    for index, start in enumerate(starts):
        progress("testing maps", index, len(starts))
        batch = intensities[start : start + BATCH_SIZE].clone()
        explained = targets[start : start + BATCH_SIZE].clone()
        for name, method in METHODS.items():
            found = _curves(network, batch, explained, method, derive_seed(name, seed, index))
            for kind, values in found.items():
                curves.setdefault(name, {}).setdefault(kind, []).append(values)

            def attribute(
                other: Bundled,
                method: Any = method,
                batch: Tensor = batch,
                explained: Tensor = explained,
            ) -> Tensor:
                maps: Tensor = method(other, batch, explained)
                return maps

            correlations = cascading_correlations(network, untrained, steps, attribute)
            for step, of_images in correlations.items():
                forgotten.setdefault(name, {}).setdefault(step, []).append(of_images)
    progress("testing maps", len(starts), len(starts))
    result: dict[str, Any] = {"num_images": len(intensities)}
    for name in METHODS:
        joined = {kind: torch.cat(values) for kind, values in curves[name].items()}
        result[name] = {
            "deletion": _against_random(joined["deletion"], joined["random_deletion"], sign=-1),
            "insertion": _against_random(joined["insertion"], joined["random_insertion"], sign=1),
            "weights_forgotten_down_to": {
                step: _mean_correlation(np.concatenate(values))
                for step, values in forgotten[name].items()
            },
        }
    return result


def point_at_phantoms(
    network: Bundled,
    classes: Sequence[str],
    image_size_px: int,
    num_images: int,
    *,
    seed: int,
) -> dict[str, Any]:
    """Play the pointing game on simulated patients, whose lesion is known to the pixel.

    One slice a patient; none of them is one that a phantom data set holds. The true class is
    explained, whatever the network predicts.

    Args:
        network: In eval mode, trained on phantoms.
        classes: Names, in the order of the logits.
        image_size_px: Height and width of the network's input.
        num_images: Patients, dealt out over the classes with a lesion in turn.
        seed: Of the patients.

    Returns:
        For each method what ``PointingGame`` says; the same of the rightly classified images,
        and of each class; and, under ``highest_cell``, of a game that is won if any pixel of the
        lesion lies in the map's highest cell, against random and other images' cells.

    Raises:
        InputError: If no class is one of the phantoms' with a lesion.
    """
    lesions = [name for name in CLASSES if name in classes and not name.startswith("no_")]
    if not lesions:
        raise InputError(
            "the pointing game on phantoms needs a class that phantoms show as a lesion, one of "
            f"{', '.join(name for name in CLASSES if not name.startswith('no_'))}; the bundle has "
            f"{', '.join(classes)}: leave phantoms out"
        )
    labels = [lesions[index % len(lesions)] for index in range(num_images)]
    slices = [
        render_slice(
            label,
            patient_seed=derive_seed("pointing game", seed, index),
            slice_index=index % 4,
            slices_per_patient=4,
            image_size_px=image_size_px,
        )
        for index, label in enumerate(labels)
    ]
    masks = np.stack([found.lesion_mask for found in slices])
    targets = torch.tensor([list(classes).index(label) for label in labels])
    maps: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    predicted: list[Tensor] = []
    for start in range(0, num_images, BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        batch = to_intensities(np.stack([found.image for found in slices[part]]))
        with torch.inference_mode():
            predicted.append(network(batch).argmax(1))
        for name, method in METHODS.items():
            maps[name].append(method(network, batch, targets[part]))
    is_right = (torch.cat(predicted) == targets).numpy()
    result: dict[str, Any] = {
        "images": "simulated patients, one slice each, none of them in a phantom data set",
        "num_images": num_images,
        "num_right": int(is_right.sum()),
    }
    for name in METHODS:
        values = torch.cat(maps[name])
        points, cells = peaks(values.numpy(), image_size_px), tuple(values.shape[1:])
        result[name] = _game(points, masks)
        if is_right.any():
            result[name]["where_right"] = _game(points[is_right], masks[is_right])
        result[name]["by_class"] = {
            lesion: _game(points[of_class], masks[of_class])
            for lesion in lesions
            if (of_class := np.array(labels) == lesion).any()
        }
        # Whether any of the lesion is in the highest cell: tells a wrong place from coarse cells.
        touched = adaptive_max_pool2d(torch.from_numpy(masks).float(), cells).bool().numpy()
        of_cells = np.stack([_highest_cell(cell_values) for cell_values in values.numpy()])
        result[name]["highest_cell"] = {"cells": list(cells), **_game(of_cells, touched)}
    return result


def _heads(network: Bundled) -> list[nn.Module]:
    return [member.head for member in network.members]


def _stages(network: Bundled, index: int) -> list[nn.Module]:
    return [member.backbone.stages[index] for member in network.members]


def _highest_cell(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return row and column of the first highest cell of one map; NaN if it is flat."""
    if (values == values[0, 0]).all():
        return np.full(2, np.nan)
    return np.array(np.unravel_index(values.argmax(), values.shape), np.float64)


def _game(points: npt.NDArray[np.float64], masks: npt.NDArray[np.bool_]) -> dict[str, Any]:
    game: PointingGame = pointing_game(points, masks)
    low, high = game.interval
    return {
        "share": {"value": game.share, "low": low, "high": high},
        "num_hits": game.num_hits,
        "num_images": game.num_images,
        "random_point": game.random_point,
        # NaN of a single image, which JSON does not have.
        "other_lesion": None if math.isnan(game.other_lesion) else game.other_lesion,
    }


def _curves(
    network: Bundled, intensities: Tensor, targets: Tensor, method: Any, seed: int
) -> dict[str, Tensor]:
    """Return deletion and insertion curves of a method's maps and of random ones, ``(B, n)``."""
    size_px, hidden = intensities.shape[-1], hide(intensities)
    maps = method(network, intensities, targets)

    def probability(images: Tensor) -> Tensor:
        with torch.inference_mode():
            chosen: Tensor = network(images).softmax(1).gather(1, targets[:, None])
            return chosen[:, 0]

    found = {}
    for prefix, values in (("", maps), ("random_", random_maps(maps.shape, seed=seed))):
        large = enlarge(values, size_px)
        for kind, ends in (
            ("deletion", (intensities, hidden)),
            ("insertion", (hidden, intensities)),
        ):
            found[prefix + kind] = replacement_curves(probability, *ends, large, seed=seed)
    return found


def _against_random(curves: Tensor, of_random: Tensor, *, sign: int) -> dict[str, Any]:
    """Return means over images; ``sign`` is 1 where a larger area is better, -1 where a smaller."""
    ours, random = areas(curves), areas(of_random)
    return {
        "area": float(ours.mean()),
        "random_area": float(random.mean()),
        "share_better_than_random": float((sign * (ours - random) > 0).float().mean()),
        "curve": [round(value, 4) for value in curves.mean(0).tolist()],
        "random_curve": [round(value, 4) for value in of_random.mean(0).tolist()],
    }


def _mean_correlation(values: npt.NDArray[np.float64]) -> dict[str, Any]:
    known = values[np.isfinite(values)]
    return {
        "spearman": float(known.mean()) if len(known) else None,
        "num_flat_maps": int(len(values) - len(known)),
    }
