"""Small pictures as arrays, for TensorBoard: shape ``(channels, H, W)``, uint8."""

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lightning_modules.scores import NUM_BINS, reliability, score_calibration

Pixels = npt.NDArray[np.uint8]

# Of an image beside its map: a sheet of eight pairs takes less than 600 KiB as PNG, even of noise.
PAIR_SIDE_PX = 112
CAPTION_PX = 18


def tile(images: Tensor) -> Pixels:
    """Lay out images in a near-square grid with a thin gap.

    Args:
        images: Shape ``(B, 1, H, W)``, float in [0, 1].

    Returns:
        Shape ``(1, rows * (H + 2) - 2, columns * (W + 2) - 2)``.
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


def draw_pairs(
    images: Sequence[Pixels] | Pixels, overlays: Sequence[Pixels], captions: Sequence[str]
) -> Pixels:
    """Draw images beside their maps, two pairs a row, each with a line of text below.

    Args:
        images: Each of shape ``(H, W)``, grey.
        overlays: Each of shape ``(H, W, 3)``.
        captions: Cut where they are too long.
    """
    side, gap_px = PAIR_SIDE_PX, 6
    width, height = 2 * side + gap_px, side + CAPTION_PX
    columns = min(2, len(captions))
    rows = math.ceil(len(captions) / columns)
    sheet = Image.new("RGB", (columns * (width + gap_px), rows * (height + gap_px)), "white")
    draw = ImageDraw.Draw(sheet)
    # Names of classes may be in any script that matplotlib's own font has.
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(path), 11)
    for index, caption in enumerate(captions):
        left, top = (index % columns) * (width + gap_px), (index // columns) * (height + gap_px)
        for offset, pixels in ((0, images[index]), (side + 2, overlays[index])):
            picture = Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(picture, (left + offset, top))
        text = caption
        while draw.textlength(text, font) > width:
            text = f"{text.removesuffix('…')[:-1]}…"
        draw.text((left, top + side + 2), text, fill="black", font=font)
    return np.asarray(sheet).transpose(2, 0, 1)


def draw_confusion(counts: npt.NDArray[np.integer], classes: tuple[str, ...]) -> Pixels:
    """Draw a confusion matrix: colour is the share of the true class, numbers are images.

    Args:
        counts: Shape ``(C, C)``; true classes down, predicted classes across.
        classes: C names.
    """
    side_inch = 0.55 * len(classes)
    # Room for the names. matplotlib's own layouts draw everything once more to find it.
    names_inch = 0.6 + 0.075 * max(map(len, classes))
    whole_inch = side_inch + names_inch + 0.15
    figure = Figure(figsize=(whole_inch, whole_inch), dpi=90)
    start = names_inch / whole_inch
    axes = figure.add_axes((start, start, side_inch / whole_inch, side_inch / whole_inch))
    share = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        color = "white" if share[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=color)
    # A class may be named like a formula.
    axes.set_xticks(range(len(classes)), classes, rotation=40, ha="right", parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    return _pixels(figure)


def draw_reliability(
    probabilities: npt.NDArray[np.float64], labels: npt.NDArray[np.int64]
) -> Pixels:
    """Draw accuracy over confidence, before any calibration; the area of a dot is its images.

    Args:
        probabilities: Shape ``(N, C)``.
        labels: Shape ``(N,)``, class indices.
    """
    figure = Figure(figsize=(4, 4), dpi=90)
    axes: Axes = figure.add_axes((0.15, 0.13, 0.8, 0.78))
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    bins = reliability(probabilities, labels)
    confidence, accuracy, num_images = (
        np.array([part[name] for part in bins]) for name in ("confidence", "accuracy", "num_images")
    )
    axes.vlines(confidence, confidence, accuracy, color="tab:red", linewidth=1)
    axes.scatter(confidence, accuracy, s=10 + 400 * num_images / num_images.sum(), alpha=0.7)
    ece = float(score_calibration(probabilities, labels)["ece"][0])
    axes.set(
        title=f"{len(labels)} validation images, ECE {ece:.3f}",
        xlabel=f"confidence, {NUM_BINS} bins",
        ylabel="accuracy",
        xlim=(0, 1),
        ylim=(-0.02, 1.02),
    )
    return _pixels(figure)


def _pixels(figure: Figure) -> Pixels:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    image = np.asarray(canvas.buffer_rgba())[..., :3]
    return np.ascontiguousarray(image.transpose(2, 0, 1))
