"""The mixture of networks that a bundle of several trials holds, in torch."""

import functools
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from lightning_modules.bundled_network import BundledNetwork

SMALLEST_PROBABILITY = 1e-30


class BundledMixture(nn.Module):
    """Networks whose probabilities are mixed, in eval mode: from grey intensities to logits.

    Args:
        members: No two of them the same object, as no two of a bundle's are.
        weights: What each counts, summing to 1.
    """

    def __init__(self, members: Sequence[BundledNetwork], weights: Sequence[float]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(members)
        self.weights = tuple(weights)
        self.eval()

    @property
    def members(self) -> tuple[BundledNetwork, ...]:
        """The networks, in the order of the weights."""
        return tuple(cast(Iterable[BundledNetwork], self.networks))

    def forward(self, intensities: Tensor) -> Tensor:
        """Return the logarithms of mixed probabilities ``(B, C)`` of ``(B, 1, H, W)`` in [0, 1].

        They are mixed in float64, which not every device has that the exported files may run on.
        Here it is for the gradients: that of log p is in proportion to 1 - p, of which float32 has
        nothing left once p is within 6e-8 of 1.
        """
        logits = [member(intensities).double() for member in self.members]
        return mixed_logits(logits, self.weights).float()


# What load_network may find, both of them with `members`.
Bundled = BundledNetwork | BundledMixture


def mixed_logits(logits: Iterable[Tensor], weights: Iterable[float | Tensor]) -> Tensor:
    """Return the logarithms of mixed probabilities, which are logits too.

    Args:
        logits: Of each network, shape ``(B, C)``.
        weights: What each counts, summing to 1.

    Returns:
        Shape ``(B, C)``, at least the logarithm of ``SMALLEST_PROBABILITY``.
    """
    # A sum in a loop: the exporters need not stack what they can add.
    parts = [weight * one.softmax(dim=1) for weight, one in zip(weights, logits, strict=True)]
    # Where all are certain that it is another class, there is no logarithm.
    return functools.reduce(torch.add, parts).clamp_min(SMALLEST_PROBABILITY).log()
