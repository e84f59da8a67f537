"""How far views may differ from their images: numbers only, quick to import."""

from dataclasses import dataclass, fields

from lightning_modules.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationSettings:
    """How far a view may differ from its image at ``strength`` 1.

    Every magnitude is the end of a uniform range and is multiplied by the strength.

    Attributes:
        flip_probability: Of a left-right flip; not scaled, but strength 0 never flips.
        rotation_deg: Rotation within plus or minus this.
        translation: Shift within plus or minus this share of the side, each axis.
        scaling: Zoom within 1 plus or minus this.
        shear_deg: Shear along x within plus or minus this.
        brightness: Added to intensities in [0, 1], within plus or minus this.
        contrast: Intensities multiplied by 1 plus or minus this.
        noise: Largest standard deviation of the Gaussian noise; drawn from 0 up to it.
        erasing_probability: Of blanking one rectangle; scaled by the strength.
        erasing_area: Largest share of the image that the rectangle covers; at least a tenth of it.
    """

    flip_probability: float = 0.5
    rotation_deg: float = 15.0
    translation: float = 0.06
    scaling: float = 0.12
    shear_deg: float = 6.0
    brightness: float = 0.12
    contrast: float = 0.2
    noise: float = 0.03
    erasing_probability: float = 0.25
    erasing_area: float = 0.1

    def __post_init__(self) -> None:
        limits = {"rotation_deg": 180.0, "shear_deg": 45.0, "scaling": 0.9, "contrast": 0.9}
        for field in fields(self):
            value, high = getattr(self, field.name), limits.get(field.name, 1.0)
            if not 0 <= value <= high:
                raise InputError(f"augmentation.{field.name} must be in [0, {high:g}]; got {value}")
