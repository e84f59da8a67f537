"""Backbones in order of what they cost: a trial competes with those that cost no more."""

from collections.abc import Mapping

import numpy as np


class CostLevels:
    """The costs of a sweep's backbones, cheapest first; one level where only the metric counts.

    Args:
        costs: By backbone; empty where only the metric is searched.
    """

    def __init__(self, costs: Mapping[str, float]) -> None:
        self.values = tuple(sorted(set(costs.values())))
        self._of_backbone = {name: self.values.index(cost) for name, cost in costs.items()}

    def __len__(self) -> int:
        return max(1, len(self.values))

    def of(self, backbone: str) -> int:
        """Return a backbone's level, counted from 0."""
        return self._of_backbone.get(backbone, 0)

    def widths(self) -> np.ndarray:
        """Return what each level counts: how far it lies below the next, as a ratio of costs.

        The last counts as much as the others on average. They sum to 1.
        """
        if len(self) == 1:
            return np.ones(1)
        steps = np.diff(np.log(self.values))
        widths = np.append(steps, steps.mean())
        return np.asarray(widths / widths.sum())
