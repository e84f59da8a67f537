"""The database that a sweep's study is in: how it is opened, and how commits to it are made."""

import contextlib
import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import RDBStorage
from sqlalchemy import event, make_url

from lightning_modules.errors import InputError, said_by
from search.study.integrity import check_file
from search.sweep import Sweep

# Its news of every study and trial would break into our own lines.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# What a study raises when its storage is full, locked, or gone.
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

# Longer than a server takes to notice that a client is gone, which holds the study's lock until
# then.
RECONNECT_S = 90.0

# What the server takes to notice that a process of the same or a living machine is gone.
GONE_S = 2.0

# Who has written to a study last.
SELECT_RUN = (
    "SELECT value_json FROM study_system_attributes JOIN studies USING (study_id) "
    "WHERE study_name = %s AND key = 'run'"
)

# For libpq: both sides notice within a minute that the other is gone.
LIBPQ_OPTIONS: dict[str, Any] = {
    "connect_timeout": 10,
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
    "options": "-c tcp_keepalives_idle=30 -c tcp_keepalives_interval=10 -c tcp_keepalives_count=3",
    "application_name": "neurosweep",
}

# Where SQLite's write-ahead log may be used: it needs memory that all processes which have the file
# open share, so a file that several hosts see must not have one (https://sqlite.org/wal.html).
LOCAL_FILE_SYSTEMS = {"btrfs", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}


class UnreachableError(InputError):
    """A database does not answer; some come back by themselves."""


def open_storage(sweep: Sweep) -> RDBStorage:
    """Open the sweep's database, or make it.

    Raises:
        InputError: If it cannot be reached, or its file is damaged.
    """
    try:
        url = sweep.study_url or _url_of_file(sweep.folder / "study.db")
        return RDBStorage(url, engine_kwargs=_engine_options(url))
    except InputError:
        raise
    # RuntimeError: Optuna's, of tables that are another version's, or by damage seem so.
    except (ImportError, RuntimeError, ValueError, sqlite3.Error, *STORAGE_ERRORS) as error:
        raise unreachable(sweep, error) from error


def _url_of_file(path: Path) -> str:
    if path.is_file():
        _check_schema(path)
        check_file(path)
    # Not written out by hand: a folder's name may hold a question mark.
    return str(sqlalchemy.URL.create("sqlite", database=str(path)))


def _engine_options(url: str) -> dict[str, Any]:
    parsed = make_url(url)
    driver = parsed.drivername
    if driver.startswith("sqlite"):
        # A dashboard that reads may hold SQLite's lock for a moment: wait for it.
        return {"connect_args": {"timeout": 60}}
    # A connection that was lost since it was last used is replaced without a word.
    options: dict[str, Any] = {"pool_pre_ping": True}
    if driver in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"):
        given = {name: value for name, value in LIBPQ_OPTIONS.items() if name not in parsed.query}
        options["connect_args"] = given
    return options


def _check_schema(path: Path) -> None:
    """Refuse a database of a stranger that computes instead of holding: a query may never end.

    Raises:
        InputError: If it has views, triggers, or generated columns; Optuna makes none.
    """
    query = (
        "SELECT name FROM sqlite_master WHERE type IN ('view', 'trigger') OR sql LIKE '% VIRTUAL %'"
        " UNION ALL SELECT m.name FROM sqlite_master m, pragma_table_xinfo(m.name) c"
        " WHERE m.type = 'table' AND c.hidden != 0"
    )
    # What is no database at all is said by who opens it next.
    with contextlib.suppress(sqlite3.Error), contextlib.closing(sqlite3.connect(path)) as database:
        if found := database.execute(query).fetchone():
            raise InputError(
                f"a sweep's record must hold tables alone; {path} has {found[0]!r:.80}, which "
                "computes: restore it from a copy"
            )


def unreachable(sweep: Sweep, error: BaseException) -> UnreachableError:
    """Say what the user can do about a database that does not answer."""
    reason = said_by(error)
    if sweep.study_url is not None:
        remedy = "check study_url"
        if "psycopg" in reason and isinstance(error.__cause__ or error, ImportError):
            remedy = "install the extra postgresql, `pip install '.[postgresql]'`"
        elif sweep.study_url.startswith("postgresql"):
            remedy = "check study_url, the server, and PGPASSWORD or ~/.pgpass"
        return UnreachableError(
            f"the study storage {sweep.study_url.rsplit('@')[-1]} must be reachable; {reason}: "
            f"{remedy}"
        )
    remedy = "free space there, or give another folder with `--storage`"
    if "full" not in reason:
        remedy = "restore it from a copy, or launch anew with `--name`"
    return UnreachableError(
        f"the sweep's record {sweep.folder / 'study.db'} must be readable and writable; {reason}: "
        f"{remedy}"
    )


def check_name_is_free(sweep: Sweep) -> None:
    """Refuse a name that a study has already, in a database that sweeps share.

    Raises:
        InputError: If it is taken, or the database cannot be reached.
    """
    storage = open_storage(sweep)
    try:
        storage.get_study_id_from_name(sweep.name)
    except KeyError:
        return
    except STORAGE_ERRORS as error:
        raise unreachable(sweep, error) from error
    finally:
        storage.engine.dispose()
    raise name_is_taken(sweep)


def name_is_taken(sweep: Sweep) -> InputError:
    """Say what the user can do about a study that is there already."""
    return InputError(
        f"the sweep's name must be new; the study storage holds a {sweep.name} already, of "
        "another folder or of a launch that was killed: take another with `--name`"
    )


def discard_empty_study(sweep: Sweep) -> None:
    """Delete a study of the sweep's name in which no trial was started, if there is one.

    Raises:
        InputError: If the database cannot be reached.
    """
    if sweep.study_url is None:
        (sweep.folder / "study.db").unlink(missing_ok=True)
        return
    storage = open_storage(sweep)
    try:
        with contextlib.suppress(KeyError):
            study_id = storage.get_study_id_from_name(sweep.name)
            if storage.get_n_trials(study_id) == 0:
                storage.delete_study(study_id)
    except STORAGE_ERRORS as error:
        raise unreachable(sweep, error) from error
    finally:
        storage.engine.dispose()


@contextlib.contextmanager
def held(storage: RDBStorage, sweep: Sweep) -> Iterator[None]:
    """Hold a study on a PostgreSQL server, so that no two processes write to it.

    The lock belongs to the one connection that everything is written through, since nothing here
    is done in two transactions at a time. If the connection is lost, so is the lock, and the next
    connection takes it first, or is none. Another process may have run the sweep in between; what
    this one knows of the trials is then out of date, and it must end.
    Other databases are left as they are.

    Raises:
        InputError: If another process holds it; later, if another has held it meanwhile.
    """
    engine = storage.engine
    if engine.name != "postgresql":
        yield
        return
    digest = hashlib.sha256(sweep.name.encode()).digest()
    key = int.from_bytes(digest[:8], "big", signed=True)
    run = uuid.uuid4().hex
    is_first = True

    def take(connection: Any, _: Any) -> None:
        nonlocal is_first
        # A process that was killed a moment ago is gone in the next; a connection that was cut
        # holds the lock until the server notices.
        deadline_s = time.monotonic() + (GONE_S if is_first else RECONNECT_S)
        with connection.cursor() as cursor:
            while not _fetch(cursor, "SELECT pg_try_advisory_lock(%s)", key):
                if time.monotonic() > deadline_s:
                    connection.close()
                    raise in_use(sweep)
                time.sleep(0.2)
            if not is_first and _fetch(cursor, SELECT_RUN, sweep.name) != json.dumps(run):
                connection.close()
                raise InputError(
                    f"a sweep runs in one process at a time; another has gone on with {sweep.name} "
                    "while the study's server was out of reach"
                )
        connection.commit()
        is_first = False

    engine.dispose()
    event.listen(engine, "connect", take)
    try:
        study_id = storage.get_study_id_from_name(sweep.name)
        storage.set_study_system_attr(study_id, "run", run)
        yield
    finally:
        event.remove(engine, "connect", take)
        engine.dispose()


def _fetch(cursor: Any, statement: str, value: Any) -> Any:
    cursor.execute(statement, (value,))
    row = cursor.fetchone()
    return None if row is None else row[0]


def in_use(sweep: Sweep) -> InputError:
    """Say what the user can do about a sweep that another process runs."""
    return InputError(
        f"a sweep runs in one process at a time; another runs {sweep.name}: wait for it, "
        f"or look with `neurosweep top {sweep.reference}`"
    )


@contextlib.contextmanager
def write_ahead(storage: RDBStorage) -> Iterator[None]:
    """Write to SQLite through a log for a while, which takes one fsync a commit instead of four.

    A commit is on disk when it returns, as without, and survives a power cut; without, the last one
    may be undone by it. Whoever reads does not hold up the writer. At the end the log is folded in,
    so that a study at rest is one file; after a kill, the next to open the file does that. Other
    databases have logs of their own, and are left as they are.
    """
    path = storage.engine.url.database
    if storage.engine.name != "sqlite" or not _is_on_local_disk(Path(path or "")):
        yield
        return
    _set_journal(storage, "WAL")
    try:
        yield
    finally:
        # Not while somebody else has it open: then they fold it in when they close it.
        with contextlib.suppress(sqlalchemy.exc.OperationalError):
            _set_journal(storage, "DELETE")


def _set_journal(storage: RDBStorage, mode: str) -> None:
    storage.engine.dispose()
    with storage.engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 1000")
        connection.exec_driver_sql(f"PRAGMA journal_mode = {mode}")
    # The next connection waits for locks as long as the others.
    storage.engine.dispose()


def _is_on_local_disk(path: Path) -> bool:
    mounts = Path("/proc/self/mounts")
    if not mounts.is_file():
        return False
    found = (line.split() for line in mounts.read_text(errors="replace").splitlines())
    # Of several on the same folder the last is the one that is seen.
    systems = {folder.replace("\\040", " "): system for _, folder, system, *_ in found}
    parents = (str(parent) for parent in path.resolve().parents)
    return next((systems[p] for p in parents if p in systems), "") in LOCAL_FILE_SYSTEMS
