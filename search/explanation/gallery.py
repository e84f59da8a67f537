"""Cases worth looking at, and a page that shows them and can be sent around by itself."""

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

KINDS = {
    "given": "Images given",
    "right": "Right: the most confident of each class in turn",
    "wrong": "Wrong: the most confident first",
    "uncertain": "Uncertain: the two likeliest classes closest together",
}

_STYLE = (
    "body{font:15px/1.4 sans-serif;margin:2em;max-width:75em}"
    "section{display:flex;flex-wrap:wrap;gap:1.5em}figure{margin:0}"
    "img{width:9em;image-rendering:pixelated;margin-right:2px}"
    "figcaption{max-width:28em;overflow-wrap:anywhere}"
)

Pixels = npt.NDArray[np.uint8]
Probabilities = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One image that is explained.

    Attributes:
        kind: One of ``KINDS``.
        name: The file's base name.
        image: Shape ``(H, W)``, as the network is given it.
        probabilities: Shape ``(C,)``.
        label: The true class's index; none where it is not known.
        group: The patient's hash; empty where it is not known.
        overlays: For each method shape ``(H, W, 3)``.
    """

    kind: str
    name: str
    image: Pixels
    probabilities: Probabilities
    label: int | None = None
    group: str = ""
    overlays: dict[str, Pixels] = field(default_factory=dict)

    @property
    def explained(self) -> int:
        """The class that is explained: the likeliest, whether or not it is the true one."""
        return int(self.probabilities.argmax())


def choose_cases(
    probabilities: Probabilities, labels: npt.NDArray[np.integer], num_each: int
) -> dict[str, list[int]]:
    """Choose which labelled images to show; no image twice.

    Args:
        probabilities: Shape ``(N, C)``.
        labels: Shape ``(N,)``, class indices.
        num_each: At most so many of each kind.

    Returns:
        Rows: ``right`` has the most confident of each class in turn, ``wrong`` the most confident,
        ``uncertain`` those of the others whose two likeliest classes are closest.
    """
    predicted = probabilities.argmax(axis=1)
    by_confidence = np.argsort(-probabilities.max(axis=1), kind="stable")
    right = [int(row) for row in by_confidence if predicted[row] == labels[row]]
    wrong = [int(row) for row in by_confidence if predicted[row] != labels[row]][:num_each]
    place_in_class: dict[int, int] = {}
    seen: dict[int, int] = {}
    for row in right:
        label = int(labels[row])
        place_in_class[row] = seen[label] = seen.get(label, -1) + 1
    right = sorted(right, key=place_in_class.__getitem__)[:num_each]
    top_two = np.sort(probabilities, axis=1)[:, -2:]
    by_margin = np.argsort(top_two[:, 1] - top_two[:, 0], kind="stable")
    shown = {*right, *wrong}
    uncertain = [int(row) for row in by_margin if int(row) not in shown][:num_each]
    return {"right": right, "wrong": wrong, "uncertain": uncertain}


def draw_overlay(image: Pixels, values: npt.NDArray[np.floating]) -> Pixels:
    """Lay a map over an image: the higher the value, the more colour and the less image.

    The highest value has full colour, zero and below none: maps of two images do not compare, and
    what speaks against the class is not shown.

    Args:
        image: Shape ``(H, W)``, grey.
        values: Shape ``(H, W)``.

    Returns:
        Shape ``(H, W, 3)``.
    """
    positive = np.clip(values, 0, None)
    share = positive / max(float(positive.max()), np.finfo(np.float32).tiny)
    colours = matplotlib.colormaps["inferno"](share)[..., :3] * 255
    weight = 0.65 * share[..., None]
    mixed: Pixels = np.rint((1 - weight) * image[..., None] + weight * colours).astype(np.uint8)
    return mixed


def png(pixels: Pixels) -> bytes:
    """Return an image as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_gallery(cases: Sequence[Case], classes: Sequence[str], title: str) -> str:
    """Return a page of HTML with every image in it; it loads nothing and names no folder."""
    parts = [
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        "<p>Research only. Not a medical device. Each image beside its maps of the predicted "
        "class; colours of two images do not compare.</p>",
    ]
    for kind, heading in KINDS.items():
        figures = [_figure(case, classes) for case in cases if case.kind == kind]
        if figures:
            parts += [f"<h2>{heading} ({len(figures)})</h2><section>", *figures, "</section>"]
    return "\n".join([*parts, "</html>\n"])


def _figure(case: Case, classes: Sequence[str]) -> str:
    pictures = {"image": case.image, **case.overlays}
    images = "".join(
        f'<img alt="{html.escape(name)}" title="{html.escape(name)}" '
        f'src="data:image/png;base64,{base64.b64encode(png(pixels)).decode()}">'
        for name, pixels in pictures.items()
    )
    ranked = np.argsort(-case.probabilities, kind="stable")[:2]
    said = ", ".join(f"{classes[index]} {case.probabilities[index]:.2f}" for index in ranked)
    truth = "" if case.label is None else f"<b>{html.escape(classes[case.label])}</b>; "
    group = f" (group {case.group})" if case.group else ""
    return (
        f"<figure>{images}<figcaption>{truth}predicted {html.escape(said)}<br>"
        f"<small>{html.escape(case.name)}{group}</small></figcaption></figure>"
    )
