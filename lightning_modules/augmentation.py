"""Augmented views that depend on nothing but their settings, seed, epoch, and sample.

Kornia's conventions and functions on the device of the batch; geometry is one matrix and one
sampling pass, colour one multiply-add, and a grey image stays single-channel throughout.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.geometry.transform import get_affine_matrix2d
from torch import Tensor, nn

from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.errors import InputError

# One row of uniform numbers a sample; the order is part of the contract: a new draw goes last.
DRAWS = (
    "flip",
    "rotation",
    "translation_x",
    "translation_y",
    "scaling",
    "shear",
    "brightness",
    "contrast",
    "noise_std",
    "noise_offset",
    "erasing",
    "erasing_area",
    "erasing_aspect",
    "erasing_x",
    "erasing_y",
)


@dataclass(frozen=True)
class ViewParams:
    """What was drawn for each of B samples, in Kornia's conventions.

    Attributes:
        flip: Shape ``(B,)``, bool: mirrored left to right, before the affine map.
        angle_deg: Shape ``(B,)``: counter-clockwise rotation, as ``kornia`` counts it.
        translation_px: Shape ``(B, 2)``: x and y.
        scale: Shape ``(B, 2)``: x and y, equal.
        shear_rad: Shape ``(B,)``: along x.
        brightness: Shape ``(B,)``: added.
        contrast: Shape ``(B,)``: factor, applied after brightness.
        noise_std: Shape ``(B,)``.
        noise_offset: Shape ``(B,)``, int64: where in the noise field the sample's noise starts.
        box_px: Shape ``(B, 4)``, int64: erased rectangle as x, y, width, height; width 0 if none.
    """

    flip: Tensor
    angle_deg: Tensor
    translation_px: Tensor
    scale: Tensor
    shear_rad: Tensor
    brightness: Tensor
    contrast: Tensor
    noise_std: Tensor
    noise_offset: Tensor
    box_px: Tensor


class Views(nn.Module):
    """Turns images into their views of one epoch.

    The view of sample i at epoch e is a pure function of (settings, strength, seed, e, i): not of
    the batch it comes in, its place there, the worker, or the trial. The numbers come from a
    counter-based hash of (seed, epoch, sample, draw) instead of a generator with a state, and the
    noise from one field of normal numbers, fixed by the seed, that each sample reads from a place
    of its own. On one device the same view is bit-identical; between devices it agrees to rounding.

    It does not normalise and does not add channels.

    Args:
        settings: The ranges at strength 1.
        strength: Scales them; 0 returns the image unchanged.
        seed: The view seed, shared by all trials of a sweep.
        image_size_px: Height and width of the images.

    Example:
        >>> views = Views(AugmentationSettings(), strength=1.0, seed=0, image_size_px=8)
        >>> images = torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8)
        >>> both = views(images, epoch=3, samples=torch.tensor([5, 9]))
        >>> one = views(images[1:], epoch=3, samples=torch.tensor([9]))
        >>> torch.equal(both[1:], one)
        True
    """

    noise_field: Tensor
    axis: Tensor

    def __init__(
        self, settings: AugmentationSettings, *, strength: float, seed: int, image_size_px: int
    ) -> None:
        super().__init__()
        if not 0 <= strength <= 4:
            raise InputError(f"augmentation_strength must be in [0, 4]; got {strength}")
        self.settings = settings
        self.strength = strength
        self.seed = seed
        self.image_size_px = image_size_px
        generator = torch.Generator().manual_seed(_hash_to_int64(seed, "noise") >> 1)
        # Four images' worth: neighbouring samples rarely read the same stretch.
        noise_field = torch.randn(4 * image_size_px**2, generator=generator)
        self.register_buffer("noise_field", noise_field, persistent=False)
        axis = torch.linspace(-1, 1, image_size_px)
        self.register_buffer("axis", axis, persistent=False)

    def forward(self, images: Tensor, *, epoch: int, samples: Tensor) -> Tensor:
        """Return the views of ``samples`` at ``epoch``.

        Args:
            images: Shape ``(B, 1, H, W)``, uint8 grey in [0, 255].
            epoch: Counted from 0.
            samples: Shape ``(B,)``, int64: each image's row number in the manifest.

        Returns:
            Shape ``(B, 1, H, W)``, float32 in [0, 1].
        """
        if self.strength == 0:
            return images.to(torch.float32) / 255
        params = self.draw(epoch=epoch, samples=samples.to(images.device))
        views = self._sample(images.to(torch.float32), params)
        factor = (params.contrast / 255).to(torch.float32)
        offset = (params.brightness * params.contrast).to(torch.float32)
        views.mul_(_per_image(factor)).add_(_per_image(offset))
        num_pixels = self.image_size_px**2
        noise = self.noise_field.unfold(0, num_pixels, 1)[params.noise_offset].view_as(views)
        views.addcmul_(noise, _per_image(params.noise_std.to(torch.float32)))
        views.clamp_(0, 1)
        return views.addcmul_(views, self._erased(params), value=-1)

    def draw(self, *, epoch: int, samples: Tensor) -> ViewParams:
        """Return what the views of ``samples`` at ``epoch`` are made with."""
        uniform = dict(zip(DRAWS, self._uniform(epoch, samples).unbind(1), strict=True))
        settings, strength, side_px = self.settings, self.strength, self.image_size_px

        def symmetric(name: str, magnitude: float) -> Tensor:
            return (2 * uniform[name] - 1) * (magnitude * strength)

        # Beyond half a side, or a zoom to nothing, a view shows no brain: keep strong sweeps sane.
        scale = (1 + symmetric("scaling", settings.scaling)).clamp(0.2, 2.0)
        area = uniform["erasing_area"] * 0.9 + 0.1
        area_px = area * min(settings.erasing_area * strength, 0.5) * side_px**2
        aspect = torch.exp((2 * uniform["erasing_aspect"] - 1) * math.log(2.0))
        erased = uniform["erasing"] < settings.erasing_probability * strength
        width = (area_px * aspect).sqrt().floor().clamp(1, side_px) * erased
        height = (area_px / aspect).sqrt().floor().clamp(1, side_px) * erased
        left = (uniform["erasing_x"] * (side_px - width + 1)).floor()
        top = (uniform["erasing_y"] * (side_px - height + 1)).floor()
        return ViewParams(
            flip=uniform["flip"] < settings.flip_probability,
            angle_deg=symmetric("rotation", settings.rotation_deg),
            translation_px=torch.stack(
                [
                    symmetric("translation_x", settings.translation) * side_px,
                    symmetric("translation_y", settings.translation) * side_px,
                ],
                dim=1,
            ),
            scale=torch.stack([scale, scale], dim=1),
            shear_rad=symmetric("shear", math.radians(settings.shear_deg)),
            brightness=symmetric("brightness", settings.brightness),
            contrast=(1 + symmetric("contrast", settings.contrast)).clamp(min=0.1),
            noise_std=uniform["noise_std"] * (settings.noise * strength),
            noise_offset=(uniform["noise_offset"] * (3 * side_px**2)).to(torch.int64),
            box_px=torch.stack([left, top, width, height], dim=1).to(torch.int64),
        )

    def _uniform(self, epoch: int, samples: Tensor) -> Tensor:
        """Return numbers in [0, 1), shape ``(B, len(DRAWS))``, float64."""
        key = _hash_to_int64(self.seed, epoch)
        draws = torch.arange(len(DRAWS), device=samples.device)
        counters = _mix(_mix(samples ^ key).unsqueeze(1) + draws * _GOLDEN)
        return ((counters >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53

    def _sample(self, images: Tensor, params: ViewParams) -> Tensor:
        """Apply flip and affine map in one bilinear sampling pass; black outside."""
        side_px = self.image_size_px
        center = torch.full_like(params.translation_px, (side_px - 1) / 2)
        matrix = get_affine_matrix2d(
            params.translation_px,
            center,
            params.scale,
            params.angle_deg,
            params.shear_rad,
            torch.zeros_like(params.shear_rad),
        )
        # In coordinates of [-1, 1] the flip is a change of sign and the centre is the origin, so
        # only the linear part and the shift of the centre remain. The inverse of a 2x2 is written
        # out: it maps each output pixel to where it is read.
        a, b, c, d = (matrix[:, row, column] for row in (0, 1) for column in (0, 1))
        determinant = a * d - b * c
        shift = 2 * params.translation_px / (side_px - 1)
        sign = 1 - 2 * params.flip.to(torch.float64)
        of_columns = torch.stack([d * sign, -c], dim=1) / determinant.unsqueeze(1)
        of_rows = torch.stack([-b * sign, a], dim=1) / determinant.unsqueeze(1)
        offset = -(of_columns * shift[:, :1] + of_rows * shift[:, 1:])
        # A position's x and y as one complex number: their sum over rows and columns is one pass.
        columns = torch.view_as_complex(_along(self.axis, of_columns))
        rows = torch.view_as_complex(
            _along(self.axis, of_rows) + offset.to(torch.float32).unsqueeze(1)
        )
        grid = torch.view_as_real(columns.unsqueeze(1) + rows.unsqueeze(2))
        return F.grid_sample(
            images, grid, mode="bilinear", padding_mode="zeros", align_corners=True
        )

    def _erased(self, params: ViewParams) -> Tensor:
        """Return 1 where the rectangles are, else 0: shape ``(B, 1, H, W)``, float32."""
        pixels = torch.arange(self.image_size_px, device=params.box_px.device)
        left, top, width, height = params.box_px.unsqueeze(2).unbind(1)
        columns = ((pixels >= left) & (pixels < left + width)).to(torch.float32)
        rows = ((pixels >= top) & (pixels < top + height)).to(torch.float32)
        return (rows.unsqueeze(2) * columns.unsqueeze(1)).unsqueeze(1)


# Constants of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
# OOPSLA 2014) as signed 64-bit integers: torch has no unsigned multiplication.
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


def _mix(state: Tensor) -> Tensor:
    """Scramble 64-bit integers (SplitMix64's finaliser); products wrap."""
    state = (state ^ ((state >> 30) & ((1 << 34) - 1))) * _MIX_1
    state = (state ^ ((state >> 27) & ((1 << 37) - 1))) * _MIX_2
    return state ^ ((state >> 31) & ((1 << 33) - 1))


def _hash_to_int64(*parts: int | str) -> int:
    """Return a signed 64-bit integer that depends on every part."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little", signed=True)


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _along(axis: Tensor, change: Tensor) -> Tensor:
    """Return shape ``(B, len(axis), 2)``: how far each place on an axis moves in x and y."""
    return change.to(torch.float32).unsqueeze(1) * axis.unsqueeze(1)
