"""Whether attribution maps tell anything: about the image, about the weights, about the lesion.

Three questions, and what a map that says nothing would score on each. None of them asks whether a
map looks plausible: edge detectors do.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import scipy.stats  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn

# From images (B, 1, H, W) to one number an image, such as the probability of the explained class.
Score = Callable[[Tensor], Tensor]

Values = npt.NDArray[np.float64]
Masks = npt.NDArray[np.bool_]

Network = TypeVar("Network", bound=nn.Module)


def replacement_curves(
    score: Score, start: Tensor, end: Tensor, maps: Tensor, *, num_steps: int = 16, seed: int = 0
) -> Tensor:
    """Score images while their pixels are replaced, the map's highest first.

    Deletion starts at the image and ends at one that shows nothing: the sooner the score falls, the
    better the map. Insertion starts there and ends at the image: the sooner it rises, the better.
    The images between are none that a network has seen, so only differences to another map count.

    Args:
        score: Called with the whole batch at every step.
        start: Images at the start of the curve, shape ``(B, 1, H, W)``.
        end: Images at its end, of the same shape.
        maps: Shape ``(B, H, W)``. Pixels of equal value are taken in random order: in raster order
            they would all lie at the top.
        num_steps: Steps of equal numbers of pixels.
        seed: Of the order of equal pixels.

    Returns:
        Scores, shape ``(B, num_steps + 1)``; the first is of ``start``, the last of ``end``.

    References:
        Petsiuk et al., "RISE", 2018, section 4.3, https://arxiv.org/abs/1806.07421.
    """
    batch_size, height, width = maps.shape
    num_pixels = height * width
    shuffled = torch.randperm(num_pixels, generator=torch.Generator().manual_seed(seed))
    values = maps.flatten(1)[:, shuffled]
    order = shuffled[values.argsort(dim=1, descending=True, stable=True)]
    # The place of each pixel in that order: the inverse permutation.
    place = order.argsort(dim=1).view(batch_size, 1, height, width)
    scores = [
        score(torch.where(place < round(num_pixels * step / num_steps), end, start))
        for step in range(num_steps + 1)
    ]
    return torch.stack(scores, dim=1)


def areas(curves: Tensor) -> Tensor:
    """Return the areas under curves ``(B, num_steps + 1)`` over [0, 1], by trapezoids: ``(B,)``."""
    return torch.trapezoid(curves, dx=1 / (curves.shape[1] - 1), dim=1)


def random_maps(shape: Sequence[int], *, seed: int) -> Tensor:
    """Return uniform noise.

    To compare a method with, draw it at the shape of the method's own cells and enlarge it in the
    same way: single random pixels destroy an image sooner than patches do, wherever these lie.
    """
    return torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed))


def cascading_correlations(
    network: Network,
    untrained: Network,
    steps: Mapping[str, Callable[[Network], Sequence[nn.Module]]],
    attribute: Callable[[Network], Tensor],
) -> dict[str, Values]:
    """Compare maps with those of a network whose weights are forgotten from the head on.

    A map that does not change when the weights do shows the image, not what was learnt.

    Args:
        network: Trained; not changed.
        untrained: Of the same shape, with other weights.
        steps: For each step its name, and which modules of a network have their weights replaced in
            it, the head first; they stay so.
        attribute: From a network to maps ``(B, h, w)``, for the same images and classes each time.

    Returns:
        For each step ``rank_correlations`` of the maps after it.

    References:
        Adebayo et al., "Sanity Checks for Saliency Maps", 2018, section 3,
        https://arxiv.org/abs/1810.03292.
    """
    trained_maps = attribute(network).numpy()
    forgetting = copy.deepcopy(network)
    correlations = {}
    for name, modules_of in steps.items():
        for module, other in zip(modules_of(forgetting), modules_of(untrained), strict=True):
            module.load_state_dict(other.state_dict())
        correlations[name] = rank_correlations(trained_maps, attribute(forgetting).numpy())
    return correlations


def rank_correlations(first: npt.NDArray[np.floating], second: npt.NDArray[np.floating]) -> Values:
    """Return Spearman's correlation of each pair of maps; NaN where one of them is flat.

    Args:
        first: Shape ``(B, h, w)``.
        second: The same shape.

    Returns:
        Shape ``(B,)``, in [-1, 1].
    """
    ranks = [scipy.stats.rankdata(maps.reshape(len(maps), -1), axis=1) for maps in (first, second)]
    centred = [values - values.mean(axis=1, keepdims=True) for values in ranks]
    lengths = np.linalg.norm(centred[0], axis=1) * np.linalg.norm(centred[1], axis=1)
    products = (centred[0] * centred[1]).sum(axis=1)
    correlations = np.full(len(first), np.nan)
    np.divide(products, lengths, out=correlations, where=lengths > 0)
    return correlations


@dataclass(frozen=True, kw_only=True)
class PointingGame:
    """How often a map's maximum lies inside the lesion.

    Attributes:
        num_images: Images with a lesion.
        num_hits: Those whose maximum lies in it; a flat map has no maximum, and misses.
        share: Hits an image.
        interval: Of the share, 95 %, by Wilson; images count as independent.
        random_point: The share expected of a point drawn anywhere in the image.
        other_lesion: The share of maxima that lie where *another* image's lesion is: what knowing
            where lesions tend to be would score, without looking. NaN for a single image.
    """

    num_images: int
    num_hits: int
    share: float
    interval: tuple[float, float]
    random_point: float
    other_lesion: float


def peaks(maps: npt.NDArray[np.floating], image_size_px: int) -> Values:
    """Return where in the image each map is highest: the centre of that cell.

    Args:
        maps: Shape ``(B, h, w)``, as computed: enlarged ones are highest on the whole rim of the
            image where the highest cell is one at the border.
        image_size_px: Height and width of the image.

    Returns:
        Shape ``(B, 2)``: row and column in pixels, 0 at the centre of the first pixel. Of several
        highest cells the mean; NaN if all are.
    """
    points = np.full((len(maps), 2), np.nan)
    for point, values in zip(points, maps, strict=True):
        highest = np.argwhere(values == values.max())
        if len(highest) < values.size:
            point[:] = (highest.mean(axis=0) + 0.5) * image_size_px / values.shape - 0.5
    return points


def pointing_game(points: Values, masks: Masks) -> PointingGame:
    """Count the points that lie inside their image's lesion.

    Args:
        points: Shape ``(B, 2)``, from ``peaks``.
        masks: Shape ``(B, H, W)``; at least one.

    References:
        Zhang et al., "Top-down Neural Attention by Excitation Backprop", 2016, section 4.1,
        https://arxiv.org/abs/1608.00507; without their tolerance of 15 px around the object.
    """
    is_point: Masks = ~np.isnan(points[:, 0])
    rows, columns = np.floor(np.where(is_point[:, None], points, 0) + 0.5).astype(int).T
    # inside[i, j]: the maximum of image i lies where the lesion of image j is.
    inside = masks[:, rows, columns].T & is_point[:, None]
    count, hits = len(masks), int(np.trace(inside))
    interval = scipy.stats.binomtest(hits, count).proportion_ci(method="wilson")
    others = (inside.sum() - hits) / (count * (count - 1)) if count > 1 else math.nan
    return PointingGame(
        num_images=count,
        num_hits=hits,
        share=hits / count,
        interval=(float(interval.low), float(interval.high)),
        random_point=float(masks.mean()),
        other_lesion=float(others),
    )
