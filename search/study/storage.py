"""The database that a sweep's study is in: how it is opened, and how commits to it are made."""

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.storages import RDBStorage

from lightning_modules.errors import InputError
from search.study.integrity import check_file
from search.sweep import Sweep

# Its news of every study and trial would break into our own lines.
optuna.logging.set_verbosity(optuna.logging.WARNING)

# What a study raises when its storage is full, locked, or gone.
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)

# Where SQLite's write-ahead log may be used: it needs memory that all processes which have the file
# open share, so a file that several hosts see must not have one (https://sqlite.org/wal.html).
LOCAL_FILE_SYSTEMS = {"btrfs", "ext3", "ext4", "f2fs", "overlay", "tmpfs", "xfs", "zfs"}


def open_storage(sweep: Sweep) -> RDBStorage:
    """Open the sweep's database, or make it.

    Raises:
        InputError: If it cannot be reached, or its file is damaged.
    """
    path = sweep.folder / "study.db"
    # Not written out by hand: a folder's name may hold a question mark.
    url = sweep.study_url or str(sqlalchemy.URL.create("sqlite", database=str(path)))
    try:
        if sweep.study_url is None and path.is_file():
            _check_schema(path)
            check_file(path)
        # A dashboard that reads may hold SQLite's lock for a moment: wait for it.
        options = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        return RDBStorage(url, engine_kwargs=options)
    except InputError:
        raise
    # RuntimeError: Optuna's, of tables that are another version's, or by damage seem so.
    except (ImportError, RuntimeError, ValueError, sqlite3.Error, *STORAGE_ERRORS) as error:
        raise unreachable(sweep, error) from error


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


def unreachable(sweep: Sweep, error: BaseException) -> InputError:
    """Say what the user can do about a database that does not answer."""
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
