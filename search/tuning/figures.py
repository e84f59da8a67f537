"""Small pictures as arrays, for TensorBoard."""

import math

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor


def tile(images: Tensor) -> npt.NDArray[np.uint8]:
    """Lay out images in a near-square grid with a thin gap.

    Args:
        images: Shape ``(B, 1, H, W)``, float in [0, 1].

    Returns:
        Shape ``(1, rows * (H + 2) - 2, columns * (W + 2) - 2)``, uint8.
    """
    num_images, _, height, width = images.shape
    columns = math.ceil(math.sqrt(num_images))
    rows = math.ceil(num_images / columns)
    gap_px = 2
    sheet = torch.full((rows * (height + gap_px), columns * (width + gap_px)), 0.5)
    for index, image in enumerate(images.detach().float().cpu()):
        top, left = (index // columns) * (height + gap_px), (index % columns) * (width + gap_px)
        sheet[top : top + height, left : left + width] = image[0]
    grey = (sheet[:-gap_px, :-gap_px] * 255).round().to(torch.uint8).unsqueeze(0).numpy()
    return np.asarray(grey)


def draw_confusion(
    counts: npt.NDArray[np.integer], classes: tuple[str, ...]
) -> npt.NDArray[np.uint8]:
    """Draw a confusion matrix: colour is the share of the true class, numbers are images.

    Args:
        counts: Shape ``(C, C)``; true classes down, predicted classes across.
        classes: C names.

    Returns:
        Shape ``(3, H, W)``, uint8.
    """
    side_inch = 0.55 * len(classes)
    # Room for the names. matplotlib's own layouts draw everything once more to find it.
    names_inch = 0.6 + 0.075 * max(map(len, classes))
    whole_inch = side_inch + names_inch + 0.15
    figure = Figure(figsize=(whole_inch, whole_inch), dpi=90)
    canvas = FigureCanvasAgg(figure)
    start = names_inch / whole_inch
    axes = figure.add_axes((start, start, side_inch / whole_inch, side_inch / whole_inch))
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color)
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right")
    axes.set_yticks(range(len(classes)), classes)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]
    return np.ascontiguousarray(image.transpose(2, 0, 1))
