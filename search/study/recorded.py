"""What the record holds of a trial; the words that record, scheduler, and workers share."""

from dataclasses import dataclass, field
from typing import Literal

from pydantic import FiniteFloat, NonNegativeInt, PositiveInt

from search.sweep import TrialParams

State = Literal["running", "complete", "pruned", "failed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointFile:
    """A checkpoint on the sweep's storage.

    Attributes:
        path: Relative to the sweep's folder.
        digest: SHA-256 of the file.
        epoch: Epochs trained when it was written.
    """

    path: str
    digest: str
    epoch: NonNegativeInt


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """What one epoch of a trial reported.

    Attributes:
        epoch: Counted from 1.
        metrics: By name; a value that is not finite is none.
        confusion: Validation images, true classes down, predicted classes across.
        last: To go on from; none after the final epoch.
        best: Of the best epoch so far.
        stopped: Why the trial ended with this epoch: ``asha``, ``diverged``, ``time_budget``,
            ``max_epochs``; empty if it went on.
        features: What became of the frozen stages' features: cached, or computed, and why.
        ran_on: Host, device, and precision.
        micro_batch_size: Most images passed at once, where memory did not allow whole batches.
    """

    epoch: PositiveInt
    metrics: dict[str, FiniteFloat | None]
    confusion: list[list[NonNegativeInt]]
    last: CheckpointFile | None
    best: CheckpointFile | None
    stopped: str
    features: str
    ran_on: str
    micro_batch_size: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial as recorded.

    Attributes:
        number: Its place in the sweep; the baseline is 0.
        params: All of them, searched or not.
        seed: Governs its head, dropout, and batch order.
        view_seed: Governs the augmented images; the sweep's, so that trials see the same.
        state: ``running`` also if it was interrupted and waits to be resumed.
        epochs: In order, without gaps.
        attempt: How often it was started before.
        reason: Why it ended, for people.
        faults: What went wrong that was not held against it, such as the loss of a worker.
    """

    number: int
    params: TrialParams
    seed: int
    view_seed: int
    state: State
    epochs: tuple[Epoch, ...] = field(repr=False)  # hundreds of lines
    attempt: int
    reason: str
    faults: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Short and sortable: names the trial's folder and TensorBoard run."""
        return f"{self.number:05d}-{self.params.backbone}-d{self.params.unfreeze_depth}"

    def best_epoch(self, metric: str, mode: str) -> Epoch | None:
        """Return the epoch with the best finite value, the earliest of equals; none if none."""
        finite = [epoch for epoch in self.epochs if epoch.metrics.get(metric) is not None]
        sign = 1 if mode == "max" else -1
        return max(finite, key=lambda epoch: sign * (epoch.metrics[metric] or 0.0), default=None)
