"""The study as the one durable record of a sweep: params, states, epochs, checkpoints.

Everything is committed as it arrives and read back from here alone; nothing is unpickled. What a
sweep consists of is said by ``Sweep``; who runs it, by ``tuner``.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from lightning_modules.errors import InputError
from lightning_modules.seeds import derive_seed
from search.samplers.sampler import build_sampler, draw_params
from search.space import to_distributions
from search.study.integrity import check_consistency
from search.study.reading import STATES, Facts, read_facts, read_trial, reading
from search.study.recorded import Epoch, State, Trial
from search.study.storage import (
    STORAGE_ERRORS,
    held,
    name_is_taken,
    open_storage,
    unreachable,
    write_ahead,
)
from search.study.tables import KnownTrials, StudyTables, known_trial
from search.sweep import Sweep, TrialParams

# What becomes of a trial that an epoch stopped; for every other reason it is pruned.
ENDINGS: dict[str, State] = {"max_epochs": "complete", "diverged": "failed"}


class Record:
    """A sweep's study, open for reading and writing.

    One process writes at a time: the one that holds the sweep's folder, or its study. So what that
    one knows of the trials needs no looking up: their numbers, params, states, and values are kept
    in memory, about a KiB a trial; everything else is in the database only.

    Args:
        sweep: The sweep it belongs to.
        storage: The storage of its Optuna study.
    """

    def __init__(self, sweep: Sweep, storage: RDBStorage) -> None:
        self.sweep = sweep
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(sweep.name)
        self._tables = StudyTables(storage, self._study_id)
        self._distributions = to_distributions(sweep.space)

    def __getstate__(self) -> dict[str, Any]:
        """Stay out of Ray's snapshot, which is never read back."""
        return {}

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
        storage = open_storage(sweep)
        try:
            optuna.create_study(storage=storage, study_name=sweep.name, direction=direction)
            record = cls(sweep, storage)
            record._tables.put_study_attributes(facts)
            return record
        except optuna.exceptions.DuplicatedStudyError as error:
            raise name_is_taken(sweep) from error
        except STORAGE_ERRORS as error:
            raise unreachable(sweep, error) from error

    @classmethod
    def open(cls, sweep: Sweep) -> "Record":
        """Open the study of a sweep that was launched before.

        Raises:
            InputError: If there is none, it is damaged, or the storage cannot be reached.
        """
        if sweep.study_url is None and not (sweep.folder / "study.db").is_file():
            raise InputError(
                f"a sweep's record must exist; no study.db in {sweep.folder}: it was never "
                "launched, or its folder was moved"
            )
        storage = open_storage(sweep)
        try:
            return cls(sweep, storage)
        except KeyError as error:
            raise InputError(
                f"the study storage must hold {sweep.name}; it does not: check --storage"
            ) from error
        except STORAGE_ERRORS as error:
            raise unreachable(sweep, error) from error
        except (TypeError, ValueError) as error:  # a driver that reads nonsense
            raise unreachable(sweep, error) from error

    @property
    def facts(self) -> Facts:
        """What holds for the whole sweep."""
        with reading(self.sweep):
            return read_facts(self._tables.read_study_attributes())

    def check(self) -> None:
        """Check that samplers see what was recorded; for the one who writes, before going on.

        Raises:
            InputError: If the record is damaged.
        """
        with reading(self.sweep):
            check_consistency(self.sweep, self.trials(), self._known)

    @contextlib.contextmanager
    def being_written(self) -> Iterator[None]:
        """Hold the study, and make many commits cheap, for as long as this process writes to it.

        Raises:
            InputError: If another process does.
        """
        with held(self._storage, self.sweep), write_ahead(self._storage):
            yield

    def reopen(self) -> None:
        """Let go of a file that storage may have taken away; the next use opens it anew.

        Connections to a server are looked at before each use, and replaced.

        Raises:
            FileNotFoundError: If the study's file is not there: SQLite would make an empty one.
        """
        if self._storage.engine.name != "sqlite":
            return
        self._storage.engine.dispose()
        path = self._storage.engine.url.database
        if not Path(path or "").is_file():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)

    def add_fact(self, name: str, value: Any) -> None:
        """Record something that holds for the whole sweep and is known only once it runs."""
        self._tables.put_study_attributes({name: value})

    def delete(self) -> None:
        """Take the study out of its storage: no sweep comes of it."""
        self._storage.delete_study(self._study_id)

    @functools.cached_property
    def costs(self) -> dict[str, float]:
        """The sweep's second objective by backbone, as measured at launch; empty without one."""
        if self.sweep.cost is None:
            return {}
        return {name: cost[self.sweep.cost] for name, cost in self.facts["costs"].items()}

    def draw(self) -> Trial:
        """Draw the next trial's params and record it as running, all in one commit.

        The first is the baseline. The sampler's generator is a function of (sweep seed, trial
        number) alone.
        """
        number = self.num_trials
        if number == 0:
            baseline = dataclasses.asdict(self.sweep.params)
            drawn = {name: baseline[name] for name in self.sweep.space}
        else:
            drawn = self._sample(number)
        return self._add(
            dataclasses.replace(self.sweep.params, **drawn),
            seed=derive_seed("trial", self.sweep.seed, number),
            view_seed=self.sweep.seed,
            is_given=number == 0,
        )

    def add(self, params: TrialParams, *, seed: int, view_seed: int) -> Trial:
        """Record a trial with params and seeds of the caller's as running."""
        return self._add(params, seed=seed, view_seed=view_seed, is_given=True)

    def _add(self, params: TrialParams, *, seed: int, view_seed: int, is_given: bool) -> Trial:
        number = self.num_trials
        values = dataclasses.asdict(params)
        searched = {name: values[name] for name in self.sweep.space}
        # Optuna's mark of a trial that no sampler has drawn.
        marks = {"fixed_params": searched} if is_given else {}
        trial_id = self._tables.add_trial(
            number,
            searched,
            self._distributions,
            user_attributes={"params": values, "seed": seed, "view_seed": view_seed},
            system_attributes=marks,
        )
        known = known_trial(trial_id, number, self._distributions)
        known.params.update(searched)
        known.system_attrs.update(marks)
        self._known.append(known)
        return Trial(
            number=number,
            params=params,
            seed=seed,
            view_seed=view_seed,
            state="running",
            epochs=(),
            attempt=0,
            reason="",
        )

    def _sample(self, number: int) -> dict[str, Any]:
        sampler = build_sampler(
            self.sweep.search.sampler,
            space=self.sweep.space,
            seed=self.sweep.seed,
            trial_number=number,
            mode=self.sweep.mode,
            rung_epochs=self.sweep.rung_epochs,
            costs=self.costs,
        )
        return draw_params(sampler, self._study, number, self._distributions)

    def restart(self, number: int) -> Trial:
        """Record that an unfinished trial is started once more."""
        trial = self.trial(number)
        restarted = dataclasses.replace(trial, attempt=trial.attempt + 1)
        self._tables.update_trial(self._trial_id(number), {"attempt": restarted.attempt})
        return restarted

    def add_fault(self, number: int, fault: str) -> None:
        """Record what went wrong in an unfinished trial and is not held against it."""
        faults = [*self.trial(number).faults, fault]
        self._tables.update_trial(self._trial_id(number), {"faults": faults})

    def add_epoch(self, number: int, epoch: Epoch) -> None:
        """Record what an epoch reported, and if it stopped the trial, its end, in one commit.

        Recording the same epoch again changes nothing else.
        """
        value = epoch.metrics.get(self.sweep.metric)
        values = {} if value is None else {epoch.epoch: value}
        attributes = {_epoch_name(epoch.epoch): json.dumps(dataclasses.asdict(epoch))}
        state: State = "running"
        if epoch.stopped:
            state = ENDINGS.get(epoch.stopped, "pruned")
            attributes["reason"] = epoch.stopped
        self._update(number, attributes, values, state)

    def finish(self, number: int, state: State, reason: str) -> None:
        """Record how a trial ended that no epoch stopped."""
        self._update(number, {"reason": reason}, {}, state)

    def _update(
        self, number: int, attributes: dict[str, Any], values: dict[int, float], state: State
    ) -> None:
        known = self._known[number]
        if known.state.is_finished():
            raise RuntimeError(f"trial {number} has ended: {known.state.name.lower()}")
        told = next(key for key, name in STATES.items() if name == state)
        reported = known.intermediate_values | values
        value = None
        if state == "complete":
            # By its best epoch, whose checkpoint is kept.
            value = self._best(reported)
        elif state == "pruned" and reported:
            value = reported[max(reported)]  # as Optuna does
        known.datetime_complete = self._tables.update_trial(
            known._trial_id, attributes, intermediate_values=values, state=told, value=value
        )
        known.intermediate_values = reported
        known.state = told

    @property
    def num_trials(self) -> int:
        """How many trials were started."""
        return len(self._known)

    def state(self, number: int) -> State:
        """Return how a trial stands."""
        return STATES[self._known[number].state]

    def backbone(self, number: int) -> str:
        """Return a trial's backbone."""
        return str(self._known[number].params.get("backbone", self.sweep.params.backbone))

    def best_value(self, number: int) -> float | None:
        """Return a trial's best finite value of the metric; none if it has none."""
        values = self._known[number].intermediate_values
        return self._best(values) if values else None

    def _best(self, values: Mapping[int, float]) -> float:
        return (max if self.sweep.mode == "max" else min)(values.values())

    def is_finished(self) -> bool:
        """Tell whether every trial of the sweep has ended."""
        return self.num_trials >= self.sweep.search.num_trials and all(
            trial.state.is_finished() for trial in self._known
        )

    def trial(self, number: int) -> Trial:
        """Return one trial, read from the database."""
        with reading(self.sweep):
            [found] = self._tables.read_user_attributes(number)
            return read_trial(*found)

    def trials(self) -> list[Trial]:
        """Return every trial that was started, by number, read from the database."""
        with reading(self.sweep):
            trials = [read_trial(*found) for found in self._tables.read_user_attributes()]
            _check_numbers(trials)
            return trials

    def times(self) -> dict[int, tuple[datetime, datetime | None]]:
        """Return by number when each trial began and ended, in UTC; read from the database."""
        with reading(self.sweep):
            return self._tables.read_times()

    @functools.cached_property
    def _known(self) -> list[FrozenTrial]:
        with reading(self.sweep):
            known = self._tables.read_trials(self._distributions)
            _check_numbers(known)
            _check_known(known)
            return known

    @functools.cached_property
    def _study(self) -> optuna.Study:
        return KnownTrials(self.sweep.name, self._storage, self._known)

    def _trial_id(self, number: int) -> int:
        return self._known[number]._trial_id


def encode_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Return metrics as JSON can hold them: what is not finite becomes none."""
    return {name: float(v) if math.isfinite(v) else None for name, v in metrics.items()}


def _check_known(known: Sequence[FrozenTrial]) -> None:
    """Refuse what samplers would fail on; SQLite keeps text in a column of numbers."""
    for trial in known:
        for name, value in trial.params.items():
            trial.distributions[name].to_internal_repr(value)
        found = trial.intermediate_values
        is_plain = all(type(step) is int for step in found) and all(
            isinstance(value, int | float) and math.isfinite(value) for value in found.values()
        )
        if not is_plain or not isinstance(trial.system_attrs.get("fixed_params", {}), dict):
            raise ValueError(f"trial {trial.number} has values that are no numbers")


def _check_numbers(trials: Sequence[Trial] | Sequence[FrozenTrial]) -> None:
    """Refuse trials that could not be looked up by their number."""
    if [trial.number for trial in trials] != list(range(len(trials))):
        raise ValueError("trials are not numbered from 0 without gaps")


def _epoch_name(epoch: int) -> str:
    return f"epoch_{epoch:05d}"
