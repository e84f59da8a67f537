"""Backbones cut into five stages, and freezing by stage.

Where the cuts are stands in ``stages``; initial weights come from ``weights``, the head
from ``classifier``.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models import VGG, VisionTransformer

from lightning_modules.convolutions import DepthwiseConvolution, PointwiseConvolution
from lightning_modules.errors import InputError
from lightning_modules.stages import (
    BACKBONES,
    HEAD_MODULE,
    IMAGENET_SIZE_PX,
    STAGE_MODULES,
    check_image_size,
)

# Images that frozen stages are given at once on a GPU, for features that are kept.
GPU_BLOCK = 256


class Backbone(nn.Module):
    """A network without its head, as five stages in forward order.

    Convolutional networks pass on activations of shape ``(B, C, h, w)``, and their features are
    the mean over all places. ViT-B/16 passes on tokens ``(B, T, 768)``, the class token first, and
    its features are that token.

    VGG16 comes without its two layers of 4096 units, which hold 90 % of its weights and expect
    7 x 7 places: its 512 channels are averaged like those of the others.

    Args:
        name: One of ``BACKBONES``.
        image_size_px: Height and width of the images. Only ViT-B/16 depends on it: it has a
            position embedding for each patch of 16 px. The others take images of any size.

    Raises:
        InputError: If ``name`` is not a known backbone, or the image size does not suit it.

    Example:
        >>> backbone = Backbone("mobilenet_v2")
        >>> len(backbone.stages), backbone.num_features
        (5, 1280)

    References:
        He et al., "Deep Residual Learning for Image Recognition", 2015, table 1,
        https://arxiv.org/abs/1512.03385. torchvision's ResNets are v1.5: the stride sits in the
        3x3 convolution.

        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2,
        https://arxiv.org/abs/1801.04381.

        Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
        2019, table 1, https://arxiv.org/abs/1905.11946.

        Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
        Recognition", 2014, table 1, column D, https://arxiv.org/abs/1409.1556.

        Dosovitskiy et al., "An Image is Worth 16x16 Words: Transformers for Image Recognition at
        Scale", 2020, table 1, https://arxiv.org/abs/2010.11929.
    """

    def __init__(self, name: str, *, image_size_px: int = IMAGENET_SIZE_PX) -> None:
        super().__init__()
        network = build_network(name, image_size_px=image_size_px)
        self.name = name
        self.image_size_px = image_size_px
        stages = [
            [network.get_submodule(module) for module in modules] for modules in STAGE_MODULES[name]
        ]
        if isinstance(network, VisionTransformer):
            stages[0][0] = PatchEmbedding(network)
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages)
        head = network.get_submodule(HEAD_MODULE[name])
        assert isinstance(head, nn.Linear)  # noqa: S101  narrows the type; true for all networks
        self.num_features = head.in_features

    def forward(self, images: Tensor) -> Tensor:
        """Return one feature vector an image, see ``pool``.

        Args:
            images: Shape ``(B, 3, H, W)``, float, normalised as the initial weights expect.

        Returns:
            Shape ``(B, num_features)``, float.
        """
        return pool(run_stages(self.stages, images))

    def torchvision_names(self) -> Iterator[tuple[str, str]]:
        """Yield (prefix in this module, prefix in torchvision's network) for each submodule."""
        for stage_index, modules in enumerate(STAGE_MODULES[self.name]):
            for module_index, module in enumerate(modules):
                ours = f"stages.{stage_index}.{module_index}."
                if module == "conv_proj":
                    for name, theirs in PatchEmbedding.TORCHVISION_NAMES:
                        yield ours + name, theirs
                else:
                    yield ours, f"{module}."


class PatchEmbedding(nn.Module):
    """Turns images into tokens: one a patch, the class token before them, each with its position.

    Args:
        network: torchvision's; its tensors are taken, not copied.
    """

    class_token: nn.Parameter
    pos_embedding: nn.Parameter

    # The names of its tensors, or their beginnings, here and in torchvision's network.
    TORCHVISION_NAMES = (
        ("class_token", "class_token"),
        ("conv_proj.", "conv_proj."),
        ("pos_embedding", "encoder.pos_embedding"),
    )

    def __init__(self, network: VisionTransformer) -> None:
        super().__init__()
        self.class_token = network.class_token
        self.conv_proj = network.conv_proj
        self.pos_embedding = network.encoder.pos_embedding

    def forward(self, images: Tensor) -> Tensor:
        """Return tokens ``(B, 1 + H/16 * W/16, D)`` of images ``(B, 3, H, W)``."""
        patches: Tensor = self.conv_proj(images).flatten(2).transpose(1, 2)
        class_tokens = self.class_token.expand(patches.shape[0], -1, -1)
        return torch.cat([class_tokens, patches], dim=1) + self.pos_embedding


def run_stages(stages: Iterable[nn.Module], activations: Tensor) -> Tensor:
    """Return what the last of some stages makes of the activations that the first is given.

    Args:
        stages: In forward order; none returns the activations.
        activations: Shape ``(B, C, h, w)`` or ``(B, T, C)``; images for the first stage of all.
    """
    for stage in stages:
        activations = stage(activations)
    return activations


def pool(activations: Tensor) -> Tensor:
    """Return one vector an image of what the last stage makes of it.

    Args:
        activations: Shape ``(B, C, h, w)``, or tokens ``(B, T, C)``, the class token first.

    Returns:
        Shape ``(B, C)``: the mean over height and width, or the class token.
    """
    if activations.ndim == 3:
        return activations[:, 0]
    return activations.mean(dim=(2, 3))


def build_network(name: str, *, image_size_px: int = IMAGENET_SIZE_PX) -> nn.Module:
    """Build torchvision's own network with random weights, head included.

    VGG16's three linear layers are replaced by one, after a mean over all places. Convolutions with
    slow gradients are ours, see ``convolutions``.

    Args:
        name: One of ``BACKBONES``.
        image_size_px: Height and width of the images, for ViT-B/16.

    Raises:
        InputError: If ``name`` is not a known backbone, or the image size does not suit it.
    """
    check_image_size(name, image_size_px)
    builders: dict[str, Callable[[], nn.Module]] = {
        "mobilenet_v2": torchvision.models.mobilenet_v2,
        "resnet50": torchvision.models.resnet50,
        "efficientnet_b0": torchvision.models.efficientnet_b0,
        "resnet152": torchvision.models.resnet152,
        "vgg16": torchvision.models.vgg16,
        "vit_b_16": functools.partial(torchvision.models.vit_b_16, image_size=image_size_px),
    }
    if name not in builders:
        raise InputError(f"backbone must be one of {', '.join(BACKBONES)}; got {name!r}")
    network = builders[name]()
    if isinstance(network, VGG):
        network.avgpool = nn.AdaptiveAvgPool2d(1)
        network.classifier = nn.Linear(512, 1000)
    for module_name, module in list(network.named_modules()):
        for own in (DepthwiseConvolution, PointwiseConvolution):
            if own.is_meant_for(module):
                network.set_submodule(module_name, own.in_place_of(module))
    return network


def freeze_below(stages: Sequence[nn.Module], unfreeze_depth: int) -> list[nn.Module]:
    """Freeze every stage except the last ``unfreeze_depth``.

    Depth is counted in stages from the head: 0 is linear probing, ``len(stages)`` is full
    fine-tuning. A frozen stage gets no gradient and is put in eval mode: without the second,
    BatchNorm would normalise by the batch and go on updating its statistics, and the stage would
    be neither constant nor cacheable. ``Trainer.fit`` keeps that mode (Lightning >= 2.2).

    It does not thaw: stages above the cut are left as they are.

    Args:
        stages: In forward order, stem first, head excluded. Changed in place.
        unfreeze_depth: Number of stages left trainable, in ``[0, len(stages)]``.

    Returns:
        The frozen stages, in forward order; empty when everything is trained.

    Raises:
        InputError: If ``unfreeze_depth`` is outside ``[0, len(stages)]``.

    Example:
        >>> stages = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
        >>> frozen = freeze_below(stages, unfreeze_depth=1)
        >>> [stage.weight.requires_grad for stage in stages]
        [False, False, True]
        >>> [stage.training for stage in stages]
        [False, False, True]
    """
    if not 0 <= unfreeze_depth <= len(stages):
        raise InputError(f"unfreeze_depth must be in [0, {len(stages)}]; got {unfreeze_depth}")
    frozen = list(stages[: len(stages) - unfreeze_depth])
    for stage in frozen:
        stage.requires_grad_(False).eval()
    return frozen
