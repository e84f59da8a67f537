"""The study as the one durable record of a sweep: params, states, epochs, checkpoints.

Everything is committed as it arrives and read back from here alone; nothing is unpickled. What a
sweep consists of is said by ``Sweep``; who runs it, by ``tuner``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.sampler import build_sampler
from search.space import to_distributions
from search.sweep import Sweep, TrialParams

# Its news of every study and trial would break into our own lines.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# What a study raises when its storage is full, locked, or gone.
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

State = Literal["running", "complete", "pruned", "failed"]

STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


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
    epoch: int


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
    """

    epoch: int
    metrics: dict[str, float | None]
    confusion: list[list[int]]
    last: CheckpointFile | None
    best: CheckpointFile | None
    stopped: str
    features: str
    ran_on: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One trial as recorded.

    Attributes:
        number: Its place in the sweep; the baseline is 0.
        params: All of them, searched or not.
        seed: Governs its head, dropout, and batch order.
        state: ``running`` also if it was interrupted and waits to be resumed.
        epochs: In order, without gaps.
        attempt: How often it was started before.
        reason: Why it ended, for people.
    """

    number: int
    params: TrialParams
    seed: int
    state: State
    epochs: tuple[Epoch, ...]
    attempt: int
    reason: str

    @property
    def name(self) -> str:
        """Short and sortable: names the trial's folder and TensorBoard run."""
        return f"{self.number:05d}-{self.params.backbone}-d{self.params.unfreeze_depth}"

    def best_epoch(self, metric: str, mode: str) -> Epoch | None:
        """Return the epoch with the best finite value, the earliest of equals; none if none."""
        finite = [epoch for epoch in self.epochs if epoch.metrics.get(metric) is not None]
        sign = 1 if mode == "max" else -1
        return max(finite, key=lambda epoch: sign * (epoch.metrics[metric] or 0.0), default=None)


class Record:
    """A sweep's study, open for reading and writing.

    One process writes at a time: the one that holds the sweep's lock.

    Args:
        sweep: The sweep it belongs to.
        study: Its Optuna study.
        storage: The study's storage.
    """

    def __init__(self, sweep: Sweep, study: optuna.Study, storage: BaseStorage) -> None:
        self.sweep = sweep
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(study.study_name)
        self._distributions = to_distributions(sweep.space)

    @classmethod
    def create(cls, sweep: Sweep, facts: Mapping[str, Any]) -> "Record":
        """Create the study.

        Args:
            sweep: Names it.
            facts: What holds for the whole sweep: digests, versions, where weights came from.

        Raises:
            InputError: If there is one of that name, or the storage cannot be reached.
        """
        direction = StudyDirection.MAXIMIZE if sweep.mode == "max" else StudyDirection.MINIMIZE
        storage = _open_storage(sweep)
        try:
            study = optuna.create_study(storage=storage, study_name=sweep.name, direction=direction)
            for name, value in facts.items():
                study.set_user_attr(name, value)
        except optuna.exceptions.DuplicatedStudyError as error:
            raise InputError(
                f"the sweep's name must be new; the study storage holds a {sweep.name} already, of "
                "another folder or of a launch that was killed: take another with `--name`"
            ) from error
        except STORAGE_ERRORS as error:
            raise _unreachable(sweep, error) from error
        return cls(sweep, study, storage)

    @classmethod
    def open(cls, sweep: Sweep) -> "Record":
        """Open the study of a sweep that was launched before.

        Raises:
            InputError: If there is none, or the storage cannot be reached.
        """
        if sweep.study_url is None and not (sweep.folder / "study.db").is_file():
            raise InputError(
                f"a sweep's record must exist; no study.db in {sweep.folder}: it was never "
                "launched, or its folder was moved"
            )
        storage = _open_storage(sweep)
        try:
            study = optuna.load_study(storage=storage, study_name=sweep.name)
            return cls(sweep, study, storage)
        except KeyError as error:
            raise InputError(
                f"the study storage must hold {sweep.name}; it does not: check --storage"
            ) from error
        except STORAGE_ERRORS as error:
            raise _unreachable(sweep, error) from error

    @property
    def facts(self) -> dict[str, Any]:
        """What holds for the whole sweep."""
        return self._study.user_attrs

    def add_fact(self, name: str, value: Any) -> None:
        """Record something that holds for the whole sweep and is known only once it runs."""
        self._study.set_user_attr(name, value)

    def draw(self) -> Trial:
        """Draw the next trial's params and record it as running, all in one commit.

        The first is the baseline. The sampler's generator is a function of (sweep seed, trial
        number) alone.
        """
        number = len(self._study.get_trials(deepcopy=False))
        if number == 0:
            baseline = dataclasses.asdict(self.sweep.params)
            drawn = {name: baseline[name] for name in self.sweep.space}
        else:
            drawn = self._sample(number)
        params = dataclasses.asdict(dataclasses.replace(self.sweep.params, **drawn))
        created = create_trial(
            state=TrialState.RUNNING,
            params=drawn,
            distributions=self._distributions,
            user_attrs={"params": params, "seed": derive_seed("trial", self.sweep.seed, number)},
            # Optuna's mark of a trial that no sampler has drawn.
            system_attrs={"fixed_params": drawn} if number == 0 else {},
        )
        created.datetime_start = datetime.now()
        self._storage.create_new_trial(self._study_id, template_trial=created)
        return self.trial(number)

    def _sample(self, number: int) -> dict[str, Any]:
        """Ask the sampler without creating a trial: `study.ask` commits param by param."""
        sampler = build_sampler(
            self.sweep.search.sampler,
            space=self.sweep.space,
            seed=self.sweep.seed,
            trial_number=number,
            mode=self.sweep.mode,
            rung_epochs=self.sweep.rung_epochs,
        )
        stand_in = create_trial(state=TrialState.RUNNING)
        stand_in.number = number
        drawn = dict(sampler.sample_relative(self._study, stand_in, self._distributions))
        for name, distribution in self._distributions.items():
            if name not in drawn:
                drawn[name] = sampler.sample_independent(self._study, stand_in, name, distribution)
        return drawn

    def restart(self, number: int) -> Trial:
        """Record that an unfinished trial is started once more."""
        attempt = self.trial(number).attempt + 1
        self._storage.set_trial_user_attr(self._trial_id(number), "attempt", attempt)
        return self.trial(number)

    def add_epoch(self, number: int, epoch: Epoch) -> None:
        """Commit what an epoch reported; recording the same epoch again changes nothing else."""
        trial_id = self._trial_id(number)
        # The attribute first: it is the truth, the intermediate value is Optuna's view of it.
        self._storage.set_trial_user_attr(
            trial_id, f"epoch_{epoch.epoch:05d}", json.dumps(dataclasses.asdict(epoch))
        )
        self._report(trial_id, epoch)

    def repair(self, number: int) -> None:
        """Complete Optuna's view of a trial whose driver died between the two commits."""
        trial_id = self._trial_id(number)
        known = self._storage.get_trial(trial_id).intermediate_values
        for epoch in self.trial(number).epochs:
            if epoch.epoch not in known:
                self._report(trial_id, epoch)

    def _report(self, trial_id: int, epoch: Epoch) -> None:
        value = epoch.metrics.get(self.sweep.metric)
        if value is not None:
            self._storage.set_trial_intermediate_value(trial_id, epoch.epoch, value)

    def finish(self, number: int, state: State, reason: str) -> None:
        """Tell Optuna how a trial ended; a complete one by its best epoch's value."""
        self._storage.set_trial_user_attr(self._trial_id(number), "reason", reason)
        value = None
        if state == "complete":
            best = self.trial(number).best_epoch(self.sweep.metric, self.sweep.mode)
            value = None if best is None else best.metrics[self.sweep.metric]
        told = next(key for key, name in STATES.items() if name == state)
        self._study.tell(number, value, state=told)

    def is_finished(self) -> bool:
        """Tell whether every trial of the sweep has ended."""
        trials = self._study.get_trials(deepcopy=False)
        return len(trials) >= self.sweep.search.num_trials and all(
            trial.state.is_finished() for trial in trials
        )

    def trial(self, number: int) -> Trial:
        """Return one trial."""
        return _read_trial(self._storage.get_trial(self._trial_id(number)))

    def trials(self) -> list[Trial]:
        """Return every trial that was started, by number."""
        return [_read_trial(trial) for trial in self._study.get_trials(deepcopy=False)]

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON can hold them: what is not finite becomes none."""
    return {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}


def _read_trial(frozen: FrozenTrial) -> Trial:
    attributes = frozen.user_attrs
    epochs = []
    for name in sorted(attributes):
        if name.startswith("epoch_"):
            stored = json.loads(attributes[name])
            for kind in ("last", "best"):
                if stored[kind] is not None:
                    stored[kind] = CheckpointFile(**stored[kind])
            epochs.append(Epoch(**stored))
    return Trial(
        number=frozen.number,
        params=TrialParams(**attributes["params"]),
        seed=attributes["seed"],
        state=STATES[frozen.state],
        epochs=tuple(epochs),
        attempt=attributes.get("attempt", 0),
        reason=attributes.get("reason", ""),
    )


def _open_storage(sweep: Sweep) -> optuna.storages.RDBStorage:
    url = sweep.study_url or f"sqlite:///{sweep.folder / 'study.db'}"
    try:
        # A dashboard that reads may hold SQLite's lock for a moment: wait for it.
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        return optuna.storages.RDBStorage(url, engine_kwargs=options)
    except (ImportError, ValueError, *STORAGE_ERRORS) as error:
        raise _unreachable(sweep, error) from error


def _unreachable(sweep: Sweep, error: BaseException) -> InputError:
    # Optuna wraps what the database says.
    reason = (str(error.__cause__ or error).splitlines() or [""])[0]
    if sweep.study_url is not None:
        return InputError(
            f"the study storage {sweep.study_url.rsplit('@')[-1]} must be reachable; {reason}: "
            "check study_url"
        )
    remedy = "free space there, or give another folder with `--storage`"
    if "full" not in reason:
        remedy = "restore it from a copy, or launch anew with `--name`"
    return InputError(
        f"the sweep's record {sweep.folder / 'study.db'} must be readable and writable; {reason}: "
        f"{remedy}"
    )
