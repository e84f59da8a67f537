"""Storage that does not answer: waited for, where it may come back by itself."""

import time
from collections.abc import Callable
from typing import TypeVar

from lightning_modules.errors import said_by
from search.study.sweep_files import StorageRefusedError

Result = TypeVar("Result")
Errors = tuple[type[BaseException], ...]

# A restart of a file server or a database, a network that is down for a moment.
PATIENCE_S = 120.0
PAUSE_S = 1.0

# What the operating system says when storage takes no more until somebody does something: no space
# left, read-only, not permitted, quota used up.
STORAGE_FAULTS = ("[Errno 28]", "[Errno 30]", "[Errno 13]", "[Errno 122]")

# The same of databases: full, damaged.
DATABASE_FAULTS = ("is full", "malformed", "not a database")


class StorageGoneError(OSError):
    """Storage did not come back."""


def patiently(
    action: Callable[[], Result],
    errors: Errors,
    *,
    tell: Callable[[str], None],
    reopen: Callable[[], None] = lambda: None,
) -> Result:
    """Return what an action returns, repeated for a while if storage is gone.

    Args:
        action: Done whole or not at all.
        errors: What it raises if storage is gone, or takes no more.
        tell: Given a line when waiting begins, and one when it ends.
        reopen: Done before each repetition.

    Raises:
        StorageGoneError: If storage does not come back.
        BaseException: What the action raised, if storage will not come back by itself.
    """
    try:
        return action()
    except errors as error:
        if not may_come_back(error):
            raise
        tell(f"storage does not answer ({said_by(error)}); waiting up to {PATIENCE_S:.0f} s")
    start_s = time.monotonic()
    while True:
        time.sleep(PAUSE_S)
        waited_s = time.monotonic() - start_s
        try:
            reopen()
            result = action()
        except errors as error:
            if not may_come_back(error):
                raise
            if waited_s >= PATIENCE_S:
                said = f"it has not answered for {waited_s:.0f} s ({said_by(error)})"
                raise StorageGoneError(said) from None
        else:
            tell(f"storage is back after {waited_s:.0f} s")
            return result


def may_come_back(error: BaseException) -> bool:
    """Tell whether storage that raised this may work again without anybody's help."""
    if isinstance(error, StorageRefusedError):
        return False
    return not any(fault in said_by(error) for fault in (*STORAGE_FAULTS, *DATABASE_FAULTS))
