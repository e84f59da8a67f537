"""A sweep played through: trials with plausible learning curves, the sweep's own ASHA, a clock."""

import heapq
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from lightning_modules.feature_cache import READ_SHARE
from lightning_modules.seeds import derive_seed
from lightning_modules.stages import NUM_STAGES
from search.planning.blind_draws import BlindDraws
from search.planning.kind_cost import Kind, KindCost
from search.space import from_unit, to_unit
from search.sweep import Sweep, TrialParams
from search.tuning.scheduler import ResumableASHA

# A sampler that learns is played by taking the best of several draws; of so many at most, at the
# end of the sweep. How well it learns differs between simulations.
MOST_DRAWS = 6

# Learning curves: how fast trials rise, in epochs, how much an epoch's value is off, and how far
# apart trials end.
RISE_EPOCHS = (0.7, 4.0)
NOISE = 0.02
SPREAD = 0.08

# What a worker adds to an epoch (Lightning, the report to the driver and its answer, TensorBoard),
# and to a trial (Ray, the sampler): estimates, not yet held against sweeps of a quiet machine.
EPOCH_OVERHEAD_S = 0.2
TRIAL_OVERHEAD_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a simulation needs to know besides the sweep.

    Attributes:
        costs: By kind of trial.
        num_train: Images.
        num_val: Images.
        num_slots: Trials at a time.
        worker_start_s: Before the first trial of each slot.
        store_bytes: Room for features.
        network_costs: By backbone, where the sweep has a cost as its second objective.
        stored: Features that are there: backbone, split, epoch, and cut.
    """

    costs: Mapping[Kind, KindCost]
    num_train: int
    num_val: int
    num_slots: int
    worker_start_s: float
    store_bytes: float
    network_costs: Mapping[str, float] = field(default_factory=dict)
    stored: frozenset[tuple[str, str, int, int]] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a simulated sweep took.

    Attributes:
        duration_s: Until its last trial ended.
        epochs: Of all trials.
        feature_bytes: In the store.
    """

    duration_s: float
    epochs: int
    feature_bytes: float


class Simulation:
    """One way that a sweep may go; the same for the same number.

    Args:
        sweep: Which one.
        setting: What its trials take.
        number: Of the simulation.
        blind_draws: The sweep's; trials whose params are known beforehand get these.
    """

    def __init__(
        self, sweep: Sweep, setting: Setting, number: int, blind_draws: BlindDraws
    ) -> None:
        self.sweep = sweep
        self.setting = setting
        self._blind_draws = blind_draws
        self._num_observed = 0
        self._rng = np.random.default_rng(derive_seed("plan", sweep.seed, number))
        self._scheduler: Any = ResumableASHA(sweep, (), setting.network_costs)
        self._most_draws = (
            1 if sweep.search.sampler in ("random", "grid") else self._rng.uniform(1, MOST_DRAWS)
        )
        # How good a place of the space is: a wave along each param, of its own length.
        self._waves = {
            name: (self._rng.normal(), self._rng.uniform(0, 2 * math.pi), self._rng.uniform(1, 5))
            for name in sweep.space
        }
        # What other sweeps have stored for cuts that this one does not have is of no use to it.
        self._stored = {
            place for place in setting.stored if (place[0], NUM_STAGES - place[3]) in setting.costs
        }
        self._stored_bytes = float(
            sum(self._num_bytes(backbone, split, cut) for backbone, split, _, cut in self._stored)
        )

    def run(self) -> Outcome:
        """Play the sweep through."""
        sweep, setting = self.sweep, self.setting
        # By time, then by number, which settles ties.
        ahead: list[tuple[float, int, SimpleNamespace]] = []
        num_started, epochs, now_s = 0, 0, 0.0

        def start(when_s: float) -> None:
            nonlocal num_started
            if num_started < sweep.search.num_trials:
                trial = self._draw(num_started)
                num_started += 1
                self._scheduler.on_trial_add(None, trial)
                heapq.heappush(ahead, (self._starts_s(trial) + when_s, trial.number, trial))

        for _ in range(setting.num_slots):
            start(setting.worker_start_s)
        while ahead:
            now_s, _, trial = heapq.heappop(ahead)
            if sweep.search.time_budget_s is not None and now_s > sweep.search.time_budget_s:
                now_s = sweep.search.time_budget_s
                break
            epochs += 1
            trial.epoch += 1
            self._num_observed += trial.epoch == sweep.rung_epochs[0]
            result = {"epoch": trial.epoch, sweep.metric: self._value(trial)}
            action = self._scheduler.on_trial_result(None, trial, result)
            if action == "STOP" or trial.epoch >= sweep.training.max_epochs:
                start(now_s)
            else:
                when_s = now_s + self._epoch_s(trial)
                heapq.heappush(ahead, (when_s, trial.number, trial))
        return Outcome(duration_s=now_s, epochs=epochs, feature_bytes=self._stored_bytes)

    def _draw(self, number: int) -> SimpleNamespace:
        baseline = asdict(self.sweep.params)
        drawn = self._blind_draws.params(number, self._num_observed) if number else {}
        if drawn is not None:
            params = {**baseline, **drawn}
            quality = self._quality(params)
        else:
            share = number / self.sweep.search.num_trials
            draws = 1 + int(self._rng.random() + share * (self._most_draws - 1))
            params, quality = max(
                (self._anywhere(baseline) for _ in range(draws)), key=lambda found: found[1]
            )
        return SimpleNamespace(
            trial_id=f"{number}",
            number=number,
            config={"number": number, "params": params},
            quality=quality,
            rise_epochs=self._rng.uniform(*RISE_EPOCHS),
            epoch=0,
        )

    def _anywhere(self, baseline: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
        drawn = {
            name: from_unit(domain, self._rng.random()) for name, domain in self.sweep.space.items()
        }
        params = {**baseline, **drawn}
        return params, self._quality(params)

    def _quality(self, params: Mapping[str, Any]) -> float:
        found = sum(
            height * math.sin(shift + length * to_unit(self.sweep.space[name], params[name]))
            for name, (height, shift, length) in self._waves.items()
        )
        return float(found / math.sqrt(len(self._waves)))

    def _value(self, trial: SimpleNamespace) -> float:
        risen = 1 - math.exp(-trial.epoch / trial.rise_epochs)
        value: float = (
            0.3 + 0.4 * risen + SPREAD * trial.quality + NOISE * float(self._rng.normal())
        )
        return value if self.sweep.mode == "max" else -value

    def _starts_s(self, trial: SimpleNamespace) -> float:
        """Return the seconds until a new trial's first report."""
        cost: KindCost = self.setting.costs[kind_of(trial.config["params"])]
        return cost.build_s + TRIAL_OVERHEAD_S + self._epoch_s(trial)

    def _epoch_s(self, trial: SimpleNamespace) -> float:
        """Return the seconds that a trial's next epoch takes."""
        kind = kind_of(trial.config["params"])
        cost, setting = self.setting.costs[kind], self.setting
        return (
            self._features_s(kind, "train", trial.epoch)
            + setting.num_train * cost.train_s
            + self._features_s(kind, "val", 0)
            + setting.num_val * cost.val_s
            + cost.save_s
            + EPOCH_OVERHEAD_S
        )

    def _features_s(self, kind: Kind, split: str, epoch: int) -> float:
        """Return the seconds that features take: to compute, or, once they are stored, to read."""
        cost = self.setting.costs[kind]
        cut, num_images = NUM_STAGES - kind[1], self._num_images(split)
        if (kind[0], split, epoch, cut) in self._stored:
            return num_images * cost.read_s / 2
        filled_s = self._fill_s(kind[0], split, epoch, cut) if _is_stored(cost, split) else None
        return num_images * cost.compute_s if filled_s is None else filled_s

    def _fill_s(
        self, backbone: str, split: str, epoch: int, cut: int, spare_s: float | None = None
    ) -> float | None:
        """Return the seconds to compute and store features; none if they are not stored.

        As ``FeatureCache`` does it, but that nothing makes room for anything.

        Args:
            backbone: Whose.
            split: Of which images.
            epoch: Of which views.
            cut: Of how many stages.
            spare_s: What it may take an image to write them and read them back, on the way to those
                of a deeper cut; none if they are what is asked for.
        """
        costs, num_images = self.setting.costs, self._num_images(split)
        cost = costs[backbone, NUM_STAGES - cut]
        num_bytes = self._num_bytes(backbone, split, cut)
        has_room = self._stored_bytes + num_bytes <= self.setting.store_bytes
        if not has_room or (spare_s is not None and cost.read_s > spare_s):
            return None
        self._stored.add((backbone, split, epoch, cut))
        self._stored_bytes += num_bytes
        spare_s = (READ_SHARE * cost.compute_s if spare_s is None else spare_s) - cost.read_s
        # From the deepest of the shallower cuts, which is stored on the way if a trial may have it.
        before_s, passed_s = 0.0, 0.0
        for shallower in range(cut - 1, 0, -1):
            other = costs.get((backbone, NUM_STAGES - shallower))
            if other is None:
                continue
            filled_s: float | None = None
            if (backbone, split, epoch, shallower) in self._stored:
                filled_s = 0.0
            elif _is_stored(other, split):
                filled_s = self._fill_s(backbone, split, epoch, shallower, spare_s)
            if filled_s is not None:
                before_s, passed_s = filled_s, other.compute_s
                break
        return before_s + num_images * (max(0.0, cost.compute_s - passed_s) + cost.read_s)

    def _num_images(self, split: str) -> int:
        return self.setting.num_train if split == "train" else self.setting.num_val

    def _num_bytes(self, backbone: str, split: str, cut: int) -> int:
        """Return the room that features take in the store."""
        return (
            self._num_images(split) * self.setting.costs[backbone, NUM_STAGES - cut].feature_bytes
        )


def _is_stored(cost: KindCost, split: str) -> bool:
    """Tell whether features are worth their room.

    The images as they are do not depend on a trial's own strength of augmentation.
    """
    return cost.is_shared or (split == "val" and cost.feature_bytes > 0)


def kind_of(params: Mapping[str, Any] | TrialParams) -> Kind:
    """Return a trial's backbone and depth."""
    values = asdict(params) if isinstance(params, TrialParams) else params
    return str(values["backbone"]), int(values["unfreeze_depth"])
