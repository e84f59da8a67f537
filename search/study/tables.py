"""The rows of a sweep's study: one transaction an event, and no more in memory than is asked for.

Optuna's own storage commits every attribute and every value by itself, looks up each row before it
writes it, and keeps all that was ever reported of a finished trial in memory. The tables are its
own (read in Optuna 5.0.0, ``storages/_rdb/models.py``), so that everything else that reads studies
reads these; ``RDBStorage``, which opens the database, refuses any other version of them.
"""

import copy
import json
from collections.abc import Container, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Table, bindparam, insert, select, update

from search.study.integrity import CHECKSUM, with_checksum, without_checksum

TRIALS: Table = models.TrialModel.__table__
PARAMS: Table = models.TrialParamModel.__table__
VALUES: Table = models.TrialValueModel.__table__
INTERMEDIATE_VALUES: Table = models.TrialIntermediateValueModel.__table__
USER_ATTRIBUTES: Table = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRIBUTES: Table = models.TrialSystemAttributeModel.__table__
STUDY_ATTRIBUTES: Table = models.StudyUserAttributeModel.__table__


class _Put:
    """Adds a row, or replaces it, in words that every database understands.

    There is one writer, so nobody comes in between. Statements are built once, since building one
    takes longer than executing it.
    """

    def __init__(self, table: Table, *key: str) -> None:
        self._key = key
        matches = [table.c[name] == bindparam(f"the_{name}") for name in key]
        values = [c.name for c in table.c if c.name not in key and not c.primary_key]
        self._update = update(table).where(*matches).values({c: bindparam(c) for c in values})
        self._insert = insert(table)

    def __call__(self, connection: Connection, row: Mapping[str, Any]) -> None:
        where = {f"the_{name}": row[name] for name in self._key}
        values = {name: value for name, value in row.items() if name not in self._key}
        if connection.execute(self._update, where | values).rowcount == 0:
            connection.execute(self._insert, dict(row))


INSERT_TRIAL = insert(TRIALS)
FIND_TRIAL = select(TRIALS.c.trial_id).where(
    TRIALS.c.number == bindparam("number"), TRIALS.c.study_id == bindparam("study_id")
)
INSERT_PARAM = insert(PARAMS)
PUT_USER_ATTRIBUTE = _Put(USER_ATTRIBUTES, "trial_id", "key")
READ_SOME_USER_ATTRIBUTES = select(USER_ATTRIBUTES.c.key, USER_ATTRIBUTES.c.value_json).where(
    USER_ATTRIBUTES.c.trial_id == bindparam("trial_id"),
    USER_ATTRIBUTES.c.key.in_(bindparam("keys", expanding=True)),
)
PUT_STUDY_ATTRIBUTE = _Put(STUDY_ATTRIBUTES, "study_id", "key")
PUT_INTERMEDIATE_VALUE = _Put(INTERMEDIATE_VALUES, "trial_id", "step")
PUT_VALUE = _Put(VALUES, "trial_id", "objective")
END_TRIAL = (
    update(TRIALS)
    .where(TRIALS.c.trial_id == bindparam("the_trial_id"))
    .values(state=bindparam("state"), datetime_complete=bindparam("datetime_complete"))
)


def known_trial(
    trial_id: int,
    number: int,
    distributions: dict[str, BaseDistribution],
    state: TrialState = TrialState.RUNNING,
    datetime_complete: datetime | None = None,
) -> FrozenTrial:
    """Return a trial for samplers to read, its params yet to be filled in."""
    return FrozenTrial(
        number=number,
        state=state,
        value=None,
        datetime_start=None,
        datetime_complete=datetime_complete,
        params={},
        distributions=distributions,
        user_attrs={},
        system_attrs={},
        intermediate_values={},
        trial_id=trial_id,
    )


class KnownTrials(optuna.Study):
    """The study as samplers see it: its trials without what they do not read, and no queries.

    Args:
        name: The study's.
        storage: The study's.
        known: All trials by number; kept up to date by the record.
    """

    def __init__(self, name: str, storage: BaseStorage, known: list[FrozenTrial]) -> None:
        super().__init__(name, storage)
        self._known = known

    def get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the trials by number, or those in certain states."""
        trials = [trial for trial in self._known if states is None or trial.state in states]
        return copy.deepcopy(trials) if deepcopy else trials


class StudyTables:
    """Reads and writes one study.

    Args:
        storage: The study's; its database is used.
        study_id: The study's.
    """

    def __init__(self, storage: RDBStorage, study_id: int) -> None:
        self._engine = storage.engine
        self._study_id = study_id

    def add_trial(
        self,
        number: int,
        params: Mapping[str, Any],
        distributions: Mapping[str, BaseDistribution],
        user_attributes: Mapping[str, Any],
        system_attributes: Mapping[str, Any],
    ) -> int:
        """Add a running trial; return its id.

        One that is there already was added by a commit whose answer got lost.
        """
        with self._engine.begin() as connection:
            there = connection.execute(FIND_TRIAL, {"number": number, "study_id": self._study_id})
            found = there.scalar()
            if found is not None:
                return int(found)
            row = {
                "number": number,
                "study_id": self._study_id,
                "state": TrialState.RUNNING,
                "datetime_start": _now(),
            }
            key = connection.execute(INSERT_TRIAL, row).inserted_primary_key
            assert key is not None  # noqa: S101  narrows the type
            trial_id = int(key[0])
            rows = [
                {
                    "trial_id": trial_id,
                    "param_name": name,
                    "param_value": distributions[name].to_internal_repr(value),
                    "distribution_json": distribution_to_json(distributions[name]),
                }
                for name, value in params.items()
            ]
            connection.execute(INSERT_PARAM, rows)
            for table, attributes in (
                (USER_ATTRIBUTES, with_checksum(user_attributes, {})),
                (SYSTEM_ATTRIBUTES, system_attributes),
            ):
                for name, value in attributes.items():
                    row = {"trial_id": trial_id, "key": name, "value_json": json.dumps(value)}
                    connection.execute(insert(table), row)
        return trial_id

    def update_trial(
        self,
        trial_id: int,
        user_attributes: Mapping[str, Any],
        *,
        intermediate_values: Mapping[int, float] | None = None,
        state: TrialState = TrialState.RUNNING,
        value: float | None = None,
    ) -> datetime | None:
        """Write what became known of a running trial, all of it or nothing.

        Args:
            trial_id: The trial's.
            user_attributes: To add or replace.
            intermediate_values: To add or replace, by epoch; finite.
            state: Ends the trial unless it is ``RUNNING``.
            value: What the trial is told to have come to.

        Returns:
            When it ended, in UTC.
        """
        ended = _now() if state.is_finished() else None
        with self._engine.begin() as connection:
            asked = {"trial_id": trial_id, "keys": [*user_attributes, CHECKSUM]}
            rows = connection.execute(READ_SOME_USER_ATTRIBUTES, asked)
            replaced = {row.key: row.value_json for row in rows}
            for name, attribute in with_checksum(user_attributes, replaced).items():
                row = {"trial_id": trial_id, "key": name, "value_json": json.dumps(attribute)}
                PUT_USER_ATTRIBUTE(connection, row)
            for epoch, reported in (intermediate_values or {}).items():
                row = {"trial_id": trial_id, "step": epoch, "intermediate_value": reported}
                finite = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
                PUT_INTERMEDIATE_VALUE(connection, {**row, "intermediate_value_type": finite})
            if value is not None:
                row = {"trial_id": trial_id, "objective": 0, "value": value}
                kind = models.TrialValueModel.TrialValueType.FINITE
                PUT_VALUE(connection, {**row, "value_type": kind})
            if ended is not None:
                row = {"the_trial_id": trial_id, "state": state, "datetime_complete": ended}
                connection.execute(END_TRIAL, row)
        return ended

    def read_trials(self, distributions: dict[str, BaseDistribution]) -> list[FrozenTrial]:
        """Return all trials by number, as samplers need them: without user attributes.

        Args:
            distributions: Of every param; shared by all trials.

        Returns:
            The trials, their times in UTC.
        """
        trials: dict[int, FrozenTrial] = {}
        with self._engine.connect() as connection:
            query = select(TRIALS).where(TRIALS.c.study_id == self._study_id)
            for row in connection.execute(query.order_by(TRIALS.c.number)):
                trials[row.trial_id] = known_trial(
                    row.trial_id, row.number, distributions, row.state, row.datetime_complete
                )
            for row in self._rows(connection, PARAMS, PARAMS.c.param_id, trials):
                value = distributions[row.param_name].to_external_repr(row.param_value)
                trials[row.trial_id].params[row.param_name] = value
            for row in self._rows(
                connection, INTERMEDIATE_VALUES, INTERMEDIATE_VALUES.c.step, trials
            ):
                trials[row.trial_id].intermediate_values[row.step] = row.intermediate_value
            for row in self._rows(connection, SYSTEM_ATTRIBUTES, SYSTEM_ATTRIBUTES.c.key, trials):
                trials[row.trial_id].system_attrs[row.key] = json.loads(row.value_json)
        return list(trials.values())

    def read_times(self) -> dict[int, tuple[datetime, datetime | None]]:
        """Return by number when each trial began and ended, in UTC."""
        query = select(TRIALS).where(TRIALS.c.study_id == self._study_id)
        with self._engine.connect() as connection:
            return {
                row.number: (row.datetime_start, row.datetime_complete)
                for row in connection.execute(query.order_by(TRIALS.c.number))
            }

    def read_user_attributes(
        self, number: int | None = None
    ) -> Iterator[tuple[int, TrialState, dict[str, Any]]]:
        """Yield number, state, and user attributes of one trial, or of all by number.

        Raises:
            ValueError: If they are not what was written.
        """
        query = (
            select(TRIALS.c.number, TRIALS.c.state, USER_ATTRIBUTES.c.key)
            .add_columns(USER_ATTRIBUTES.c.value_json)
            # Also a trial without any: that it is damaged is for the reader to say.
            .join(USER_ATTRIBUTES, USER_ATTRIBUTES.c.trial_id == TRIALS.c.trial_id, isouter=True)
            .where(TRIALS.c.study_id == self._study_id)
            .order_by(TRIALS.c.number)
        )
        if number is not None:
            query = query.where(TRIALS.c.number == number)
        texts: dict[str, str] = {}
        current: tuple[int, TrialState] | None = None
        with self._engine.connect() as connection:
            for row in connection.execute(query):
                if current is not None and current[0] != row.number:
                    yield *current, without_checksum(texts, f"trial {current[0]}")
                    texts = {}
                current = (row.number, row.state)
                if row.key is not None:
                    texts[row.key] = row.value_json
        if current is not None:
            yield *current, without_checksum(texts, f"trial {current[0]}")

    def put_study_attributes(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes to the study, or replace them, all of them or nothing."""
        with self._engine.begin() as connection:
            there = self._study_texts(connection)
            replaced = {key: there[key] for key in (*attributes, CHECKSUM) if key in there}
            for name, attribute in with_checksum(attributes, replaced).items():
                row = {"study_id": self._study_id, "key": name, "value_json": json.dumps(attribute)}
                PUT_STUDY_ATTRIBUTE(connection, row)

    def read_study_attributes(self) -> dict[str, Any]:
        """Return the study's user attributes.

        Raises:
            ValueError: If they are not what was written.
        """
        with self._engine.connect() as connection:
            return without_checksum(self._study_texts(connection), "the sweep")

    def _study_texts(self, connection: Connection) -> dict[str, str]:
        query = select(STUDY_ATTRIBUTES.c.key, STUDY_ATTRIBUTES.c.value_json)
        rows = connection.execute(query.where(STUDY_ATTRIBUTES.c.study_id == self._study_id))
        return {row.key: row.value_json for row in rows}

    def _rows(
        self, connection: Connection, table: Table, order: Any, trials: Container[int]
    ) -> Iterator[Any]:
        query = select(table).join(TRIALS, TRIALS.c.trial_id == table.c.trial_id)
        query = query.where(TRIALS.c.study_id == self._study_id).order_by(order)
        # Whoever reads while the sweep runs may find rows of a trial that has just come.
        return (row for row in connection.execute(query) if row.trial_id in trials)


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
