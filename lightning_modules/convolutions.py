"""Convolutions that are trained faster on a CPU than as torch trains them."""

from typing import Self, TypeGuard

import torch
from torch import Tensor, nn

# Where a pointwise convolution has fewer channels than these, on either side, oneDNN is as fast.
MIN_POINTWISE_CHANNELS = 64


class TrainedConvolution(nn.Conv2d):
    """Convolves as torch does, but for what a subclass does where a gradient will be asked for.

    It has the state dict of ``torch.nn.Conv2d``.
    """

    @classmethod
    def in_place_of(cls, convolution: nn.Conv2d) -> Self:
        """Return one that takes over a convolution's very tensors and settings.

        Nothing is drawn: building one would, and random weights after it would be others.
        """
        own = cls.__new__(cls)
        own.__dict__ = convolution.__dict__
        return own

    def _is_trained_on_cpu(self, input: Tensor) -> bool:
        has_gradient = input.requires_grad or self.weight.requires_grad
        return torch.is_grad_enabled() and has_gradient and input.is_cpu


class DepthwiseConvolution(TrainedConvolution):
    """Convolves each channel by itself; under a CPU's autocast it trains in float32.

    oneDNN has no fast bfloat16 kernel for two of its gradients: its input's where there is a
    stride, and its weights' where the kernel is larger than 3. With them a step of MobileNetV2
    takes longer than in float32 (torch 2.15, ``experiments/benchmarks/bf16_step.py``). So where a
    gradient will be asked for, it computes in float32, and returns its input's precision. Elsewhere
    (validation, frozen stages, no autocast) it computes as ``torch.nn.Conv2d`` does.
    """

    @staticmethod
    def is_meant_for(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Tell whether a module is a convolution with such gradients."""
        if not isinstance(module, nn.Conv2d) or module.groups != module.in_channels:
            return False
        return max(module.stride) > 1 or max(module.kernel_size) > 3

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, C, h, w)`` of ``(B, C, H, W)``."""
        if not (self._is_trained_on_cpu(input) and torch.is_autocast_enabled("cpu")):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float()).to(input.dtype)


class PointwiseConvolution(TrainedConvolution):
    """Mixes channels, each place by itself; on a CPU without AVX-512 it trains as a linear layer.

    There oneDNN takes some 1.4 times as long for the same products as the matrix multiplication of
    linear layers (torch 2.15, ``experiments/benchmarks/pointwise_step.py``). The two differ by
    rounding. Elsewhere (validation, frozen stages, autocast) it computes as ``torch.nn.Conv2d``
    does.
    """

    @staticmethod
    def is_meant_for(module: nn.Module) -> TypeGuard[nn.Conv2d]:
        """Tell whether a module is a convolution that is trained faster so, on this machine."""
        return (
            torch.backends.cpu.get_cpu_capability() == "AVX2"
            and isinstance(module, nn.Conv2d)
            and max(*module.kernel_size, *module.stride, module.groups) == 1
            and module.padding in (0, (0, 0))
            and min(module.in_channels, module.out_channels) >= MIN_POINTWISE_CHANNELS
        )

    def forward(self, input: Tensor) -> Tensor:
        """Return ``(B, C', H, W)`` of ``(B, C, H, W)``."""
        if not self._is_trained_on_cpu(input) or torch.is_autocast_enabled("cpu"):
            return super().forward(input)
        channels_last = input.permute(0, 2, 3, 1)  # a view that is contiguous, as networks pass it
        mixed = nn.functional.linear(channels_last, self.weight.flatten(1), self.bias)
        return mixed.permute(0, 3, 1, 2)
