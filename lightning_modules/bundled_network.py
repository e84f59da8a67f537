"""The network that a bundle holds, in torch."""

import torch
from torch import Tensor, nn

from lightning_modules.backbones import Backbone
from lightning_modules.weights import IMAGENET_MEAN, IMAGENET_STD


class BundledNetwork(nn.Module):
    """The network of a bundle, in eval mode: from grey intensities to logits.

    Args:
        backbone: Its five stages; the last is what Grad-CAM looks at.
        head: The linear layer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, head: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(1, -1, 1, 1))
        self.eval().requires_grad_(False)

    @property
    def members(self) -> tuple["BundledNetwork", ...]:
        """Itself alone: it is mixed with nothing."""
        return (self,)

    def forward(self, intensities: Tensor) -> Tensor:
        """Return logits ``(B, C)`` of ``(B, 1, H, W)`` grey intensities in [0, 1]."""
        logits: Tensor = self.head(self.backbone((intensities - self.mean) / self.std))
        return logits
