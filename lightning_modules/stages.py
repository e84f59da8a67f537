"""The backbones there are, and where each is cut: names and sizes only, quick to import."""

import itertools

from lightning_modules.errors import InputError

NUM_STAGES = 5

BACKBONES = ("mobilenet_v2", "resnet50", "efficientnet_b0", "resnet152", "vgg16", "vit_b_16")

# The side of the images that the published weights were trained on.
IMAGENET_SIZE_PX = 224

# The side of ViT-B/16's patches: images must be a whole number of them wide.
PATCH_PX = 16


def _features(*cuts: int) -> tuple[tuple[str, ...], ...]:
    """Return the blocks of torchvision's ``features`` between each cut and the next."""
    return tuple(
        tuple(f"features.{block}" for block in range(first, last))
        for first, last in itertools.pairwise(cuts)
    )


def _encoder_layers(first: int, last: int) -> tuple[str, ...]:
    return tuple(f"encoder.layers.encoder_layer_{layer}" for layer in range(first, last))


_RESNET = (("conv1", "bn1", "relu", "maxpool"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))

# Names of torchvision's modules, a tuple a stage, stem first. A stage ends where the resolution
# halves (/2, /4, /8, /16, /32; ResNets: their own stem and layers), so a depth means the same share
# of the network's scales in each. ViT-B/16 has one scale: its twelve layers are five runs, the
# embedding of patches with the first.
STAGE_MODULES: dict[str, tuple[tuple[str, ...], ...]] = {
    "mobilenet_v2": _features(0, 2, 4, 7, 14, 19),
    "resnet50": _RESNET,
    "efficientnet_b0": _features(0, 2, 3, 4, 6, 9),
    "resnet152": _RESNET,
    "vgg16": _features(0, 5, 10, 17, 24, 31),
    "vit_b_16": (
        ("conv_proj", *_encoder_layers(0, 2)),
        _encoder_layers(2, 4),
        _encoder_layers(4, 6),
        _encoder_layers(6, 9),
        (*_encoder_layers(9, 12), "encoder.ln"),
    ),
}

# torchvision's name of the last linear layer; of VGG16's, which has three, their name.
HEAD_MODULE = {
    "mobilenet_v2": "classifier.1",
    "resnet50": "fc",
    "efficientnet_b0": "classifier.1",
    "resnet152": "fc",
    "vgg16": "classifier",
    "vit_b_16": "heads.head",
}


def check_image_size(backbone: str, image_size_px: int) -> None:
    """Refuse images that a backbone could not cut into patches.

    Raises:
        InputError: If the side is not a whole number of ViT-B/16's patches.
    """
    if backbone == "vit_b_16" and (image_size_px < PATCH_PX or image_size_px % PATCH_PX):
        below = max(1, image_size_px // PATCH_PX) * PATCH_PX
        raise InputError(
            f"image_size_px must be a multiple of {PATCH_PX} for vit_b_16, which cuts images into "
            f"patches; got {image_size_px}: take {below} or {below + PATCH_PX}"
        )
