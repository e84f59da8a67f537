"""Backbones cut into five stages by resolution, and freezing by stage.

Where the cuts are stands in ``stages``; initial weights come from ``weights``, the head
from ``classifier``.
"""

from collections.abc import Callable, Iterator, Sequence

import torchvision
from torch import Tensor, nn

from lightning_modules.errors import InputError
from lightning_modules.stages import BACKBONES, HEAD_MODULE, STAGE_MODULES


class Backbone(nn.Module):
    """A convolutional network without its head, as five stages in forward order.

    Args:
        name: One of ``BACKBONES``.

    Raises:
        InputError: If ``name`` is not a known backbone.

    Example:
        >>> backbone = Backbone("mobilenet_v2")
        >>> len(backbone.stages), backbone.num_features
        (5, 1280)

    References:
        He et al., "Deep Residual Learning for Image Recognition", 2015, table 1,
        https://arxiv.org/abs/1512.03385. torchvision's ResNet-50 is v1.5: the stride sits in the
        3x3 convolution.

        Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2,
        https://arxiv.org/abs/1801.04381.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        network = build_network(name)
        self.name = name
        self.stages = nn.ModuleList(
            nn.Sequential(*(network.get_submodule(module) for module in modules))
            for modules in STAGE_MODULES[name]
        )
        head = network.get_submodule(HEAD_MODULE[name])
        assert isinstance(head, nn.Linear)  # noqa: S101  narrows the type; true for both networks
        self.num_features = head.in_features

    def forward(self, images: Tensor) -> Tensor:
        """Return globally average-pooled features.

        Args:
            images: Shape ``(B, 3, H, W)``, float, normalised as the initial weights expect.

        Returns:
            Shape ``(B, num_features)``, float.
        """
        return pool(self.run(images, first_stage=0))

    def run(self, activations: Tensor, *, first_stage: int) -> Tensor:
        """Return what the last stage makes of the activations that one of the stages is given.

        Args:
            activations: Shape ``(B, C, h, w)``: the output of the stage before ``first_stage``.
            first_stage: The stage to start from; the stages below it are left out.
        """
        for stage in self.stages[first_stage:]:
            activations = stage(activations)
        return activations

    def torchvision_names(self) -> Iterator[tuple[str, str]]:
        """Yield (prefix in this module, prefix in torchvision's network) for each submodule."""
        for stage_index, modules in enumerate(STAGE_MODULES[self.name]):
            for module_index, module in enumerate(modules):
                yield f"stages.{stage_index}.{module_index}.", f"{module}."


def pool(activations: Tensor) -> Tensor:
    """Return the mean over height and width: ``(B, C, h, w)`` to ``(B, C)``."""
    return activations.mean(dim=(2, 3))


def build_network(name: str) -> nn.Module:
    """Build torchvision's own network with random weights, head included."""
    builders: dict[str, Callable[[], nn.Module]] = {
        "mobilenet_v2": torchvision.models.mobilenet_v2,
        "resnet50": torchvision.models.resnet50,
    }
    if name not in builders:
        raise InputError(f"backbone must be one of {', '.join(BACKBONES)}; got {name!r}")
    return builders[name]()


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
