"""What a sweep is: frozen settings with their defaults and meaning; one screen a section.

Reading them from YAML and checking them is ``config``'s.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lightning_modules.augmentation_settings import AugmentationSettings
from lightning_modules.data.phantom import PhantomSettings
from lightning_modules.stages import NUM_STAGES
from search.space import Choice, Float, Int, Space
from search.study.sweep_files import SweepFiles, files_at, is_object_storage

# What a sweep may rank by, and which way is better.
METRIC_MODES = {"val_macro_f1": "max", "val_accuracy": "max", "val_loss": "min"}

# What a sweep may want little of besides: both are the backbone's, whatever its weights.
COSTS = ("latency_ms", "size_mib")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialParams:
    """One trial's params. The defaults are the baseline, which every sweep runs as trial 0.

    Attributes:
        backbone: One of ``BACKBONES``.
        unfreeze_depth: Stages trained, counted from the head.
        dropout: Before the linear layer.
        lr: The head's learning rate.
        backbone_lr_factor: The unfrozen stages' learning rate, as a share of ``lr``.
        weight_decay: AdamW's.
        label_smoothing: Of the training loss.
        augmentation_strength: Scales ``augmentation``.
        batch_size: Images a step.
    """

    backbone: str = "mobilenet_v2"
    unfreeze_depth: int = 2
    dropout: float = 0.3
    lr: float = 1e-3
    backbone_lr_factor: float = 0.1
    weight_decay: float = 1e-4
    label_smoothing: float = 0.0
    augmentation_strength: float = 1.0
    batch_size: int = 32


# The values that make sense, both ends included; a space must lie within.
PARAM_LIMITS: dict[str, tuple[float, float]] = {
    "unfreeze_depth": (0, NUM_STAGES),
    "dropout": (0.0, 0.95),
    "lr": (1e-8, 10.0),
    "backbone_lr_factor": (0.0, 10.0),
    "weight_decay": (0.0, 10.0),
    "label_smoothing": (0.0, 0.9),
    "augmentation_strength": (0.0, 4.0),
    "batch_size": (2, 4096),
}

DEFAULT_SPACE: Space = {
    # Not all of BACKBONES: the default number of trials is few enough for two.
    "backbone": Choice(choices=("mobilenet_v2", "resnet50")),
    "unfreeze_depth": Int(low=0, high=NUM_STAGES),
    "dropout": Float(low=0.1, high=0.6),
    "lr": Float(low=1e-4, high=1e-2, log=True),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSettings:
    """Which images, and how they are split.

    Attributes:
        path: Manifest CSV, or folder of class folders.
        phantom: Simulated images instead of ``path``.
        image_size_px: Side of the square that images are brought to.
        group_pattern: Regular expression whose first group, found in an image's path, is the
            patient; for folders and manifests without ``group_id``.
        val_fraction: Share of the groups for validation, where the manifest has no splits.
        test_fraction: Share of the groups that stay locked.
        class_balance: How rare classes are made up for.
        source_weights: By source: how much an image counts in the training loss, beside its class;
            1 where nothing is said. Validation is never weighted.
        skip_bad_images: Go on without images that cannot be read, and record which.
        duplicates: Images that show one picture go into one split where splits are made here. If
            the manifest's own tear them apart, ``refuse`` refuses to launch, ``group`` moves them
            together, and ``allow`` goes on, which every result then says.
    """

    path: str | None = None
    phantom: PhantomSettings | None = None
    image_size_px: int = 224
    group_pattern: str | None = None
    val_fraction: float = 0.15
    test_fraction: float = 0.15
    class_balance: Literal["weighted_loss", "balanced_sampling", "none"] = "weighted_loss"
    source_weights: dict[str, float] | None = None
    skip_bad_images: bool = False
    duplicates: Literal["refuse", "group", "allow"] = "refuse"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingSettings:
    """What all trials share.

    Attributes:
        max_epochs: A trial that is never stopped runs this many.
        warmup_epochs: Linear warm-up of the learning rate; fractions are fine.
        precision: ``auto`` takes bf16-mixed for a backbone if it is faster, which is measured.
        compile: Whether ``torch.compile`` compiles the stages that are trained: once a worker,
            backbone, and depth, in a minute or more that no forecast counts. For sweeps of hours.
    """

    max_epochs: int = 12
    warmup_epochs: float = 0.5
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    compile: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSettings:
    """How many trials, and who draws them.

    Attributes:
        num_trials: Trials in all, the baseline included.
        sampler: ``gp`` fits one model of all rungs, ``tpe`` one per rung; ``cma_es``, ``random``,
            ``grid``.
        max_concurrent_trials: As many as the resources allow, if not given.
        time_budget_s: No trial goes on after this many seconds.
        keep_trials: How many of the best trials keep their checkpoints, beside the baseline; of
            each cost, where that is an objective.
    """

    num_trials: int = 32
    sampler: str = "gp"
    max_concurrent_trials: int | None = None
    time_budget_s: float | None = None
    keep_trials: int = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerSettings:
    """When ASHA stops a trial.

    Attributes:
        grace_period_epochs: The first rung. Not 1 by default: the first epoch says almost nothing
            about the last (rank correlation 0.03 on LCBench, 0.73 at epoch 3).
        reduction_factor: One in this many goes on at a rung; rungs are this factor apart.

    References:
        Li et al., "A System for Massively Parallel Hyperparameter Tuning",
        https://arxiv.org/abs/1810.05934.
    """

    grace_period_epochs: int = 3
    reduction_factor: int = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourceSettings:
    """What one trial takes.

    Attributes:
        cpus_per_trial: Cores; also its number of threads.
        gpus_per_trial: A fraction packs several trials on one GPU. If not given: one where the
            cluster has GPUs, as small a fraction as its memory allows; else none.
        feature_cache_gib: Most that the features of frozen stages may take on a node's disk; 0
            computes them anew in every trial. If not given: half of the memory, or of the free
            disk if that is less.
        price_per_gpu_hour: What a GPU costs an hour, in whatever currency; plans say what the sweep
            will cost.
    """

    cpus_per_trial: int = 1
    gpus_per_trial: float | None = None
    feature_cache_gib: float | None = None
    price_per_gpu_hour: float | None = None


WeightsSpec = str | tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """One sweep: what the user wrote, with every default filled in and every path absolute.

    Attributes:
        name: Names the sweep's folder, study, and TensorBoard runs.
        seed: Everything random in the sweep is a function of it.
        metric: What trials are ranked by; the best epoch counts.
        objectives: The metric, and a cost out of ``COSTS``: searched for the best at every cost.
            None searches for the best alone.
        storage: The folder that holds the sweep's folder; or scheme, bucket, and prefix of an
            object storage.
        study_url: Any Optuna storage; SQLite in the sweep's folder if not given. It holds no
            password, and is PostgreSQL's where ``storage`` is an object storage.
        weights: Initial weights of each backbone.
        data: Which images.
        params: The baseline, and the value of every param that is not searched.
        space: What is searched.
        augmentation: The ranges at strength 1.
        training: What all trials share.
        search: How many trials, and who draws them.
        scheduler: When trials are stopped; none never stops one.
        resources: What one trial takes.
    """

    name: str
    seed: int = 0
    metric: str = "val_macro_f1"
    objectives: tuple[str, str] | None = None
    storage: str = "sweeps"
    study_url: str | None = None
    weights: dict[str, WeightsSpec] = field(default_factory=dict)
    data: DataSettings
    params: TrialParams = field(default_factory=TrialParams)
    space: Space = field(default_factory=lambda: dict(DEFAULT_SPACE))
    augmentation: AugmentationSettings = field(default_factory=AugmentationSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    search: SearchSettings = field(default_factory=SearchSettings)
    scheduler: SchedulerSettings | None = field(default_factory=SchedulerSettings)
    resources: ResourceSettings = field(default_factory=ResourceSettings)

    @property
    def mode(self) -> str:
        """``max`` or ``min``: which way the metric is better."""
        return METRIC_MODES[self.metric]

    @property
    def cost(self) -> str | None:
        """The second objective, if there is one."""
        return None if self.objectives is None else self.objectives[1]

    @property
    def location(self) -> str:
        """The sweep's own folder, or its address in an object storage."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    @property
    def files(self) -> SweepFiles:
        """The sweep's files, wherever they are."""
        return files_at(self.location)

    @property
    def folder(self) -> Path:
        """The sweep's own folder; whoever asks has made sure that there is one."""
        if is_object_storage(self.storage):
            raise RuntimeError(f"{self.location} is no folder; its files are `files`")
        return Path(self.location)

    @property
    def reference(self) -> str:
        """What names the sweep on a command line that is typed here."""
        if Path(self.storage) == Path("sweeps").resolve():
            return self.name
        return f"{self.name} --storage {shlex.quote(self.storage)}"

    @property
    def backbones(self) -> tuple[str, ...]:
        """The backbones that trials may use."""
        domain = self.space.get("backbone")
        searched = domain.choices if isinstance(domain, Choice) else ()
        return tuple(sorted({*map(str, searched), self.params.backbone}))

    @property
    def rung_epochs(self) -> tuple[int, ...]:
        """The epochs at which ASHA compares, ascending, ``max_epochs`` last."""
        rungs = []
        if self.scheduler is not None:
            epoch = self.scheduler.grace_period_epochs
            while epoch < self.training.max_epochs:
                rungs.append(epoch)
                epoch *= self.scheduler.reduction_factor
        return (*rungs, self.training.max_epochs)
