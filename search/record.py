"""The study as the one durable record of a sweep: params, states, epochs, checkpoints.

Everything is committed as it arrives and read back from here alone; nothing is unpickled. What a
sweep consists of is said by ``Sweep``; who runs it, by ``tuner``.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optuna
import sqlalchemy.exc
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.sampler import build_sampler
from search.space import to_distributions
from search.sweep import Sweep, TrialParams

# Its news of every study and trial would break into our own lines.
optuna.logging.set_verbosity(optuna.logging.WARNING)

State = Literal["running", "complete", "pruned", "failed"]

STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
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
        ran_on: Host, device, and precision.
    """

    epoch: int
    metrics: dict[str, float | None]
    confusion: list[list[int]]
    last: CheckpointFile | None
    best: CheckpointFile | None
    stopped: str
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
        self._running: dict[int, optuna.trial.Trial] = {}

    @classmethod
    def create(cls, sweep: Sweep, facts: Mapping[str, Any]) -> "Record":
        """Create the study, with the baseline waiting to be its first trial.

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
            baseline = dataclasses.asdict(sweep.params)
            study.enqueue_trial({name: baseline[name] for name in sweep.space})
        except optuna.exceptions.DuplicatedStudyError as error:
            raise InputError(
                f"the sweep's name must be new; {sweep.name} exists in the study storage: "
                f"`neurosweep resume {sweep.reference}` goes on with it, `--name` takes another"
            ) from error
        except _STORAGE_ERRORS as error:
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
        except _STORAGE_ERRORS as error:
            raise _unreachable(sweep, error) from error

    @property
    def facts(self) -> dict[str, Any]:
        """What holds for the whole sweep."""
        return self._study.user_attrs

    def draw(self) -> Trial:
        """Draw the next trial's params and record it as running.

        The sampler's generator is a function of (sweep seed, trial number) alone.
        """
        number = len(self._study.get_trials(deepcopy=False, states=_STARTED))
        self._study.sampler = build_sampler(
            self.sweep.search.sampler,
            space=self.sweep.space,
            seed=self.sweep.seed,
            trial_number=number,
            mode=self.sweep.mode,
            rung_epochs=self.sweep.rung_epochs,
        )
        asked = self._study.ask(self._distributions)
        params = dataclasses.replace(self.sweep.params, **asked.params)
        asked.set_user_attr("params", dataclasses.asdict(params))
        asked.set_user_attr("seed", derive_seed("trial", self.sweep.seed, asked.number))
        self._running[asked.number] = asked
        return self.trial(asked.number)

    def restart(self, number: int) -> Trial:
        """Record that an unfinished trial is started once more."""
        handle = self._handle(number)
        handle.set_user_attr("attempt", handle.user_attrs.get("attempt", 0) + 1)
        return self.trial(number)

    def add_epoch(self, number: int, epoch: Epoch) -> None:
        """Commit what an epoch reported; recording the same epoch again changes nothing else."""
        handle = self._handle(number)
        value = epoch.metrics.get(self.sweep.metric)
        # The attribute first: it is the truth, the intermediate value is Optuna's view of it.
        handle.set_user_attr(f"epoch_{epoch.epoch:05d}", json.dumps(dataclasses.asdict(epoch)))
        if value is not None:
            handle.report(value, epoch.epoch)

    def finish(self, number: int, state: State, reason: str) -> None:
        """Tell Optuna how a trial ended; a complete one by its best epoch's value."""
        handle = self._handle(number)
        handle.set_user_attr("reason", reason)
        value = None
        if state == "complete":
            best = self.trial(number).best_epoch(self.sweep.metric, self.sweep.mode)
            value = None if best is None else best.metrics[self.sweep.metric]
        told = next(key for key, name in STATES.items() if name == state and key in _FINISHED)
        self._study.tell(number, value, state=told)
        self._running.pop(number, None)

    def trial(self, number: int) -> Trial:
        """Return one trial."""
        return _read_trial(self._storage.get_trial(self._trial_id(number)), self.sweep)

    def trials(self) -> list[Trial]:
        """Return every trial that was started, by number."""
        return [
            _read_trial(trial, self.sweep)
            for trial in self._study.get_trials(deepcopy=False, states=_STARTED)
        ]

    def _handle(self, number: int) -> optuna.trial.Trial:
        if number not in self._running:
            self._running[number] = optuna.trial.Trial(self._study, self._trial_id(number))
        return self._running[number]

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)


_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
_STARTED = (*_FINISHED, TrialState.RUNNING)


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON can hold them: what is not finite becomes none."""
    return {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}


def _read_trial(frozen: FrozenTrial, sweep: Sweep) -> Trial:
    attributes = frozen.user_attrs
    epochs = []
    for name in sorted(attributes):
        if name.startswith("epoch_"):
            stored = json.loads(attributes[name])
            for kind in ("last", "best"):
                if stored[kind] is not None:
                    stored[kind] = CheckpointFile(**stored[kind])
            epochs.append(Epoch(**stored))
    # A trial killed between being drawn and being described is described by what was drawn.
    given = dataclasses.asdict(sweep.params) | frozen.params
    return Trial(
        number=frozen.number,
        params=TrialParams(**attributes.get("params", given)),
        seed=attributes.get("seed", derive_seed("trial", sweep.seed, frozen.number)),
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
    except (ImportError, ValueError, *_STORAGE_ERRORS) as error:
        raise _unreachable(sweep, error) from error


_STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


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
