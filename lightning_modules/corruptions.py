"""Images made worse on purpose, to see how much of a classifier's skill is left.

Three strengths of four kinds, after the design of ImageNet-C [1]_: every strength is applied to
the images as they are, and to nothing that is trained on.

References:
    .. [1] Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions
       and Perturbations", 2019, https://arxiv.org/abs/1903.12261
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from scipy.ndimage import gaussian_filter, rotate  # type: ignore[import-untyped]

Images = npt.NDArray[np.uint8]

# Noise: standard deviation over the range from black to white. Blur: standard deviation over the
# side of the image, so that it means the same at any size. Contrast: what is left of it.
# Rotation: degrees, either way.
STRENGTHS: Mapping[str, tuple[float, float, float]] = {
    "noise": (0.025, 0.05, 0.1),
    "blur": (0.005, 0.01, 0.02),
    "contrast": (0.75, 0.5, 0.25),
    "rotation": (5.0, 10.0, 20.0),
}


def corrupt(images: Images, kind: str, strength: float, seed: int) -> Images:
    """Return a corrupted copy.

    Args:
        images: Shape ``(B, H, H)``, uint8 grey.
        kind: A key of ``STRENGTHS``: Gaussian noise, Gaussian blur, contrast around the image's
            mean, or rotation around the middle with black in the corners.
        strength: In the unit of its kind.
        seed: Of the noise, and of which way each image is turned.
    """
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return _to_uint8(images + rng.normal(0, 255 * strength, images.shape))
    if kind == "blur":
        sigma_px = strength * images.shape[1]
        return _to_uint8(gaussian_filter(images.astype(np.float64), sigma_px, axes=(1, 2)))
    if kind == "contrast":
        mean = images.mean(axis=(1, 2), keepdims=True)
        return _to_uint8(mean + strength * (images - mean))
    if kind == "rotation":
        return np.stack(
            [
                rotate(image, angle_deg, reshape=False, order=1)
                for image, angle_deg in zip(
                    images, strength * rng.choice([-1, 1], len(images)), strict=True
                )
            ]
        )
    raise ValueError(f"kind must be one of {', '.join(STRENGTHS)}; got {kind!r}")


def _to_uint8(intensities: npt.NDArray[np.float64]) -> Images:
    return np.clip(np.rint(intensities), 0, 255).astype(np.uint8)
