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

    What is drawn for views takes some 180 operations on a few numbers, nearly as many as the way
    through a network. Where ``num_samples`` is set, they are done once an epoch, for all samples.

    It does not normalise and does not add channels.

    Args:
        settings: The ranges at strength 1.
        strength: Scales them; 0 returns the image unchanged.
        seed: The view seed, shared by all trials of a sweep.
        image_size_px: Height and width of the images.

    Attributes:
        num_samples: How many samples there are, numbered from 0; none, as at first, prepares
            views batch by batch.

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
    pixels: Tensor

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
        pixels = torch.arange(image_size_px, dtype=torch.float32)
        self.register_buffer("pixels", pixels, persistent=False)
        self.num_samples: int | None = None
        self._prepared_epoch = -1
        self._prepared = torch.empty(0)

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
        prepared = self._prepared_for(epoch, samples.to(images.device))
        of_columns, of_rows, shift, box, colours = prepared.split([2, 2, 2, 4, 4], dim=1)
        factor, offset, noise_std = colours[:, :3, None, None, None].unbind(1)
        # A position's x and y as one complex number: their sum over rows and columns is one pass.
        columns = torch.view_as_complex(_along(self.axis, of_columns))
        rows = torch.view_as_complex(_along(self.axis, of_rows) + shift.unsqueeze(1))
        grid = torch.view_as_real(columns.unsqueeze(1) + rows.unsqueeze(2))
        views = F.grid_sample(
            images.to(torch.float32),
            grid,
            mode="bilinear",
            padding_mode="zeros",
            align_corners=True,
        )
        views.mul_(factor).add_(offset)
        starts = colours[:, 3].to(torch.int64)
        noise = self.noise_field.unfold(0, self.image_size_px**2, 1)[starts]
        views.addcmul_(noise.view_as(views), noise_std).clamp_(0, 1)
        return views.addcmul_(views, self._erased(box), value=-1)

    def prepare(self, *, epoch: int, samples: Tensor) -> Tensor:
        """Return the numbers that the views of ``samples`` at ``epoch`` are made with.

        Returns:
            Shape ``(B, 14)``, float32: by how much x and y, in [-1, 1], of where a pixel is read
            change along a row (2) and a column (2), and their shift (2); the erased rectangle's
            first column and row, and those behind it (4); what grey values are multiplied by, what
            is added, the noise's standard deviation, and where it starts (4).
        """
        params = self.draw(epoch=epoch, samples=samples)
        left, top, width, height = params.box_px.unbind(1)
        columns = [
            *self._geometry(params),
            *(left, top, left + width, top + height),
            *(params.contrast / 255, params.brightness * params.contrast),
            *(params.noise_std, params.noise_offset),
        ]
        return torch.stack([column.to(torch.float32) for column in columns], dim=1)

    def _prepared_for(self, epoch: int, samples: Tensor) -> Tensor:
        if self.num_samples is None:
            return self.prepare(epoch=epoch, samples=samples)
        now = epoch, self.num_samples, samples.device
        if now != (self._prepared_epoch, len(self._prepared), self._prepared.device):
            everyone = torch.arange(self.num_samples, device=samples.device)
            self._prepared = self.prepare(epoch=epoch, samples=everyone)
            self._prepared_epoch = epoch
        return self._prepared.index_select(0, samples)

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

    def _geometry(self, params: ViewParams) -> tuple[Tensor, ...]:
        """Return flip and affine map as six columns of ``prepare``."""
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
        return (*of_columns.unbind(1), *of_rows.unbind(1), *offset.unbind(1))

    def _erased(self, box: Tensor) -> Tensor:
        """Return 1 where the rectangles are, else 0: shape ``(B, 1, H, W)``, float32."""
        left, top, right, bottom = box.unsqueeze(2).unbind(1)
        columns = ((self.pixels >= left) & (self.pixels < right)).to(torch.float32)
        rows = ((self.pixels >= top) & (self.pixels < bottom)).to(torch.float32)
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


def _along(axis: Tensor, change: Tensor) -> Tensor:
    """Return shape ``(B, len(axis), 2)``: how far each place on an axis moves in x and y."""
    return change.unsqueeze(1) * axis.unsqueeze(1)
