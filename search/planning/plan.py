"""What a sweep will probably take: trials, epochs, time, disk, and money."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.planning.blind_draws import BlindDraws
from search.planning.duration import in_words
from search.planning.kind_cost import Kind, KindCost
from search.planning.measurement import Measurement
from search.planning.simulation import Outcome, Setting, Simulation
from search.planning.span import Span
from search.planning.stored_features import stored_features
from search.samplers.sampler import num_grid_points
from search.sweep import Sweep
from search.tuning.resources import TrialResources
from search.tuning.trial import Run, feature_store

# Simulations, fewer of long sweeps, which differ less.
NUM_SIMULATIONS = 60
MIN_SIMULATIONS = 12
SIMULATED_TRIALS = 5000

# The middle nine tenths of the simulations.
QUANTILES = (0.05, 0.5, 0.95)

# How much a few timed steps are off, as the standard deviation of a factor: a machine's speed
# changes with its heat, and with who else is on it.
SPEED_SPREAD = 0.1

# What a TensorBoard run takes with its pictures, measured; trials that are not kept take far less.
BOARD_BYTES = 300 * 1024

MOST_TRIALS = 4096


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A forecast of a sweep.

    Attributes:
        sweep: With the number of trials that was planned for.
        num_slots: Trials at a time.
        epochs: Of all trials.
        duration_s: From the first trial to the end of the last.
        costs: By kind of trial.
        measured_ago_s: How long ago those were measured, if not just now.
        num_train: Images.
        num_val: Images.
        disk_bytes: By what takes it: ``features``, ``checkpoints``, ``images``, ``TensorBoard``.
        num_gpus: That the trials hold.
    """

    sweep: Sweep
    num_slots: int
    epochs: Span
    duration_s: Span
    costs: Mapping[Kind, KindCost]
    measured_ago_s: float
    num_train: int
    num_val: int
    disk_bytes: Mapping[str, float]
    num_gpus: float

    @property
    def price(self) -> float | None:
        """What the GPUs cost, in the currency of ``price_per_gpu_hour``; none if not given."""
        rate = self.sweep.resources.price_per_gpu_hour
        return None if rate is None else rate * self.num_gpus * self.duration_s.middle / 3600

    def epoch_s(self, kind: Kind) -> tuple[float, float]:
        """Return an epoch's seconds with all features computed, and with all of them stored."""
        cost = self.costs[kind]
        rest = self.num_train * cost.train_s + self.num_val * cost.val_s + cost.save_s
        whole = rest + self.num_train * cost.compute_s
        return whole, rest + self.num_train * cost.read_s / 2 if cost.is_shared else whole

    def as_fact(self) -> dict[str, Any]:
        """Return what the record keeps of it."""
        return {
            "num_trials": self.sweep.search.num_trials,
            "num_slots": self.num_slots,
            "epochs": dataclasses.asdict(self.epochs),
            "duration_s": dataclasses.asdict(self.duration_s),
            "disk_bytes": sum(self.disk_bytes.values()),
            "price": self.price,
            "measured_ago_s": self.measured_ago_s,
        }


def make_plan(
    run: Run,
    *,
    resources: TrialResources,
    measurement: Measurement,
    network_costs: Mapping[str, float],
    is_local: bool,
    budget_s: float | None = None,
) -> Plan:
    """Simulate a sweep on the connected cluster.

    Args:
        run: What its trials share.
        resources: What they take of the cluster.
        measurement: What each kind of them takes.
        network_costs: By backbone, where the sweep has a cost as its second objective.
        is_local: Whether all of it happens on this machine: what other nodes have stored is not
            known here.
        budget_s: Choose the number of trials whose upper bound fits; none takes the sweep's.

    Raises:
        InputError: If not even one trial fits the budget.
    """
    sweep = run.sweep
    store = feature_store(sweep.resources.feature_cache_gib, since=run.started)
    setting = Setting(
        costs=measurement.costs,
        num_train=len(run.manifest.rows("train")),
        num_val=len(run.manifest.rows("val")),
        num_slots=resources.num_slots,
        worker_start_s=measurement.worker_start_s,
        store_bytes=0.0 if store is None else float(store.limit_bytes),
        network_costs=network_costs,
        stored=stored_features(run) if is_local else frozenset(),
    )
    if budget_s is not None:
        num_trials = fitting_num_trials(sweep, setting, budget_s)
        search = dataclasses.replace(sweep.search, num_trials=num_trials)
        sweep = dataclasses.replace(sweep, search=search)
    epochs, duration_s, outcomes = foretell(sweep, setting)
    return Plan(
        sweep=sweep,
        num_slots=min(resources.num_slots, sweep.search.num_trials),
        epochs=epochs,
        duration_s=duration_s,
        costs=measurement.costs,
        measured_ago_s=measurement.age_s,
        num_train=setting.num_train,
        num_val=setting.num_val,
        disk_bytes=_disk_bytes(sweep, setting, outcomes, run.pack.path.stat().st_size),
        num_gpus=_num_gpus(resources.whole, resources.num_slots),
    )


def foretell(sweep: Sweep, setting: Setting) -> tuple[Span, Span, list[Outcome]]:
    """Return the epochs and seconds that a sweep takes in many simulations, and those."""
    wanted = SIMULATED_TRIALS // sweep.search.num_trials
    count = max(MIN_SIMULATIONS, min(NUM_SIMULATIONS, wanted))
    draws = BlindDraws(sweep)
    outcomes = [Simulation(sweep, setting, number, draws).run() for number in range(count)]
    rng = np.random.default_rng(derive_seed("plan speed", sweep.seed))
    speeds = np.exp(SPEED_SPREAD * rng.standard_normal(count))
    durations = [
        outcome.duration_s * speed for outcome, speed in zip(outcomes, speeds, strict=True)
    ]
    if sweep.search.time_budget_s is not None:
        durations = [min(seconds, sweep.search.time_budget_s) for seconds in durations]
    return _span([outcome.epochs for outcome in outcomes]), _span(durations), outcomes


def fitting_num_trials(sweep: Sweep, setting: Setting, budget_s: float) -> int:
    """Return the most trials whose duration's upper bound fits.

    Raises:
        InputError: If not even the baseline does.
    """

    def upper_s(num_trials: int) -> float:
        # Without the guard, which would make everything fit.
        search = dataclasses.replace(sweep.search, num_trials=num_trials, time_budget_s=None)
        return foretell(dataclasses.replace(sweep, search=search), setting)[1].high

    if upper_s(1) > budget_s:
        raise InputError(
            f"--budget must have room for one trial, which takes up to {in_words(upper_s(1))}; got "
            f"{in_words(budget_s)}: give more, or lower training.max_epochs or data.image_size_px"
        )
    most = num_grid_points(sweep.space) if sweep.search.sampler == "grid" else MOST_TRIALS
    fits, beyond = 1, 2
    while beyond <= most and upper_s(beyond) <= budget_s:
        fits, beyond = beyond, 2 * beyond
    beyond = min(beyond, most + 1)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if upper_s(middle) <= budget_s else (fits, middle)
    return fits


def _disk_bytes(
    sweep: Sweep, setting: Setting, outcomes: Sequence[Outcome], pack_bytes: int
) -> dict[str, float]:
    kept = sweep.search.keep_trials + 1
    largest = max(setting.costs.values(), key=lambda cost: cost.best_bytes)
    # A running trial has its best and its last, and of each the one before.
    running = setting.num_slots * 2 * (largest.best_bytes + largest.last_bytes)
    return {
        "features": float(np.quantile([o.feature_bytes for o in outcomes], QUANTILES[2])),
        "checkpoints": float(min(kept, sweep.search.num_trials) * largest.best_bytes + running),
        "images": float(pack_bytes),
        "TensorBoard": float(BOARD_BYTES * min(kept, sweep.search.num_trials)),
    }


def _num_gpus(whole: Mapping[str, float], num_slots: int) -> float:
    if not whole["gpu"]:
        return 0.0
    # Those that are shared are held whole.
    return float(min(num_slots, max(1, round(ray.cluster_resources().get("GPU", 0.0)))))


def _span(values: Sequence[float]) -> Span:
    low, middle, high = (float(value) for value in np.quantile(values, QUANTILES))
    return Span(low=low, middle=middle, high=high)
