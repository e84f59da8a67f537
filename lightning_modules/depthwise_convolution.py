"""Depthwise convolutions whose gradients are fast in bfloat16 on a CPU, too."""

from typing import TypeGuard

import torch
from torch import Tensor, nn


class DepthwiseConvolution(nn.Conv2d):
    """Convolves each channel by itself; under a CPU's autocast it trains in float32.

    oneDNN has no fast bfloat16 kernel for two of its gradients: its input's where there is a
    stride, and its weights' where the kernel is larger than 3. With them a step of MobileNetV2
    takes longer than in float32 (torch 2.15, ``experiments/benchmarks/bf16_step.py``). So where a
    gradient will be asked for, it computes in float32, and returns its input's precision. Elsewhere
    (validation, frozen stages, no autocast) it computes as ``torch.nn.Conv2d`` does, whose state
    dict it has.
    """

    @staticmethod
    def is_meant_for(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Tell whether a module is a convolution with such gradients."""
        if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels:
            return False
        return max(module.stride) > 1 or max(module.kernel_size) > 3

    @classmethod
    def in_place_of(cls, convolution: nn.Conv2d) -> "DepthwiseConvolution":
        """Return one that takes over a convolution's very tensors and settings.

        Nothing is drawn: building one would, and random weights after it would be others.
        """
        own = cls.__new__(cls)
        own.__dict__ = convolution.__dict__
        return own

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, C, h, w)`` of ``(B, C, H, W)``."""
        has_gradient = torch.is_grad_enabled() and (
            input.requires_grad or self.weight.requires_grad
        )
        if not (has_gradient and input.is_cpu and torch.is_autocast_enabled("cpu")):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(input.dtype)
